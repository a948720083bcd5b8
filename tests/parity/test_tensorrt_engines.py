"""Engines of TensorRT-RTX from really lowered models: the proof is green, and attention is fused wherever it can be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from accel.builder.build import BuildSettings, build_plan
from accel.builder.network import NetworkView
from accel.builder.parse import parse
from accel.builder.profiles import default_profiles
from accel.builder.proof import Proof, prove
from accel.builder.repair import repair
from accel.builder.source import GraphSource
from accel.engines.tensorrt.adapter import load_flavour
from accel.variants import add_variant, canonical_graph
from tests.parity.families import ALL

pytest.importorskip("tensorrt_rtx")
BUILT = {"llama", "qwen2_windowed", "gemma2", "gpt2", "bert", "mpnet", "modernbert"}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "variant", "sm", "fused"),
    [
        ("llama", "fp16", "sm86", 3),
        ("qwen2_windowed", "bf16", "sm120", 3),
        ("gemma2", "fp16", "sm89", 0),  # a softcap: every layer is written out
        ("gpt2", "fp32", "sm86", 3),
        ("bert", "fp16", "sm86", 3),
        ("mpnet", "bf16", "sm120", 3),  # a position bias as mask
        ("modernbert", "fp32", "sm89", 3),
    ],
)
def test_engine(name: str, variant: str, sm: str, fused: int, bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bundle_of(name), tmp_path / name)
    bundle = add_variant(tmp_path / name, variant, check=False)
    arch = bundle.manifest.arch
    capacity = 64 if arch.kind == "decoder" else None
    settings = BuildSettings("rtx", (sm,), default_profiles(arch, 2, capacity), capacity, DTYPES[variant])
    canonical = bundle.file(bundle.graph("fp32", "canonical").file)
    built = build_plan(bundle.file(bundle.graph(variant, "tensorrt").file), arch, settings, canonical=canonical)
    assert built.proof.ok and len(arch.layers) == 3
    assert built.facts.fused_attention == fused and built.facts.warnings == ()
    assert built.facts.layers.get("kv_cache_update", 0) == (6 if capacity else 0)


@pytest.mark.parametrize("name", sorted(ALL.keys() - BUILT))
def test_proof(name: str, bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The other families: parsed and proven, not built. Every operator of theirs is known to the proof."""
    shutil.copytree(bundle_of(name), tmp_path / name)
    bundle = add_variant(tmp_path / name, "fp16", check=False)
    arch = bundle.manifest.arch
    graph = bundle.file(bundle.graph("fp16", "tensorrt").file)
    capacity = 64 if arch.kind == "decoder" else None
    parsed = parse(load_flavour("rtx"), GraphSource(graph, capacity, bundle.variant("fp16").weights))
    view = NetworkView(parsed.flavour, parsed.network)
    repairs = repair(view)
    table = prove(Proof(view, parsed.source, arch, "float16", canonical_graph(bundle)), repairs)
    assert table.ok, table.text()
    (row,) = (row for row in table.rows if row.check == "operators proven by presence alone")
    assert row.found == "none"
