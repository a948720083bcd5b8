"""The comparisons are worth something: models that differ in one thing fail them, and by how much."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import accel
from accel.api import run_parity
from accel.bundle import Bundle
from accel.errors import FusionError, ParityError
from accel.exporter.tracer import takes_token_types
from accel.graph import parity
from accel.graph.parity import compute_references, make_cases
from accel.manifest import ParityResult
from accel.recipe import ParityRecipe
from tests.parity.comparison import (
    COURSES,
    decoder_yardstick,
    deviation,
    draw_rows,
    encoder_batches,
    encoder_references,
    excess,
    flatten_real,
    open_decoder,
    run_course,
    select,
)
from tests.parity.families import ALL
from tests.parity.mutations import MUTATIONS, Mutation, zero_parameter

CLEAR = 10  # times the limit
BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]
COURSE = COURSES["rows that join, wait and go"]


def compare(bundle: Path, unchanged: Any, model: Any) -> float:
    """Error over the limit, of the bundle against a model that need not be its own."""
    kind = Bundle.open(bundle).manifest.arch.kind
    if kind == "decoder":
        rows, found = draw_rows(), _decoder_results(bundle)
        own, exact = decoder_yardstick(model, rows)
        return excess(deviation(np.concatenate(found), select(found, exact)), own)
    parts: list[list[NDArray]] = [[], [], []]
    for feeds, output in _encoder_results(bundle, unchanged):
        references = encoder_references(model, feeds, ["last_hidden_state"])
        for collected, result in zip(parts, (output, *references)):
            collected.append(flatten_real(result, feeds))
    found_values, eager_values, exact_values = (np.concatenate(part) for part in parts)
    return excess(deviation(found_values, exact_values), deviation(eager_values, exact_values))


@functools.cache
def _decoder_results(bundle: Path) -> list[NDArray]:
    session = open_decoder(bundle)
    found = run_course(session, draw_rows(), COURSE)
    session.close()
    return found


@functools.cache
def _encoder_results(bundle: Path, model: Any) -> list[tuple[dict[str, NDArray], dict[str, NDArray]]]:
    with accel.load(bundle, threads=1) as encoder:
        return [(feeds, dict(encoder(**feeds))) for feeds in encoder_batches(model).values()]


def gate(path: Path, model: Any) -> ParityResult:
    """The export's own gate, with its own limit, of a bundle against a model that need not be its own."""
    bundle, recipe = Bundle.open(path), ParityRecipe()
    arch = bundle.manifest.arch
    types = model.config.type_vocab_size if arch.kind == "encoder" and takes_token_types(model) else 0
    cases = make_cases(arch, recipe, pad_id=model.config.pad_token_id or 0, token_types=types)
    compute_references(model, arch, cases)
    return run_parity(path, bundle.manifest, arch, cases, recipe)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_seen(mutation: Mutation, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    bundle, mutated = bundle_of(mutation.family), mutation.build()
    assert compare(bundle, plain_model(mutation.family), mutated) > CLEAR
    with pytest.raises(ParityError, match=r"differs from PyTorch by .* more than the limit 1\.0e-04"):
        gate(bundle, mutated)


@pytest.mark.parametrize("family", sorted({mutation.family for mutation in MUTATIONS}))
def test_unchanged_model_passes(family: str, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    """The same two comparisons, so that none of the above fails for another reason."""
    bundle, model = bundle_of(family), plain_model(family)
    assert compare(bundle, model, model) <= 1
    result = gate(bundle, model)
    assert result.max_rel_error < result.limit / 3


def test_invisible_mutation_passes(bundle_of: BundleOf, plain_model: ModelOf) -> None:
    """A key bias adds one number to all scores of a query: softmax drops it, so it is no mutation."""
    mutated = Mutation("bert", "no bias on the keys", edit=zero_parameter("key.bias")).build()
    assert compare(bundle_of("bert"), plain_model("bert"), mutated) < CLEAR
    gate(bundle_of("bert"), mutated)


def test_every_family_with_an_option_of_its_own_is_mutated() -> None:
    assert {mutation.family for mutation in MUTATIONS} >= ALL.keys() - {
        "phi3", "bert_pairs", "roberta_tokens", "distilbert_answers", "modernbert_mask", "mpnet_mask",
    }  # fmt: skip


def test_export_refuses_a_wrong_graph(tmp_path: Path, plain_model: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that writes another activation's factor: the export fails and leaves nothing behind."""
    lowering = importlib.import_module("accel.graph.lowering.ort_cpu.lower")
    real = lowering.fuse_silu

    def quick_gelu(model: ir.Model) -> int:
        count = real(model)
        for node in model.graph:
            if node.op_type == "QuickGelu":
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.01)
        return int(count)

    monkeypatch.setattr(lowering, "fuse_silu", quick_gelu)
    with pytest.raises(ParityError, match="more than the limit"):
        accel.export(plain_model("llama"), tmp_path / "llama", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_export_sees_the_kernel_of_long_rows(
    tmp_path: Path, minilm_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another scale in the one kernel that only long rows without padding reach."""
    lowering = importlib.import_module("accel.graph.lowering.ort_cpu.encoder_attention")
    real = lowering._branch

    def spoil(node: ir.Node, name: str, like: ir.Node) -> ir.Graph:
        if name.endswith(".flash"):
            node.attributes["scale"] = ir.AttrFloat32("scale", 3 * node.attributes["scale"].as_float())
        return real(node, name, like)

    monkeypatch.setattr(lowering, "_branch", spoil)
    assert lowering.SHORT < parity.LONG_ROW
    with pytest.raises(ParityError, match="one long row"):
        accel.export(minilm_source, tmp_path / "minilm", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_lost_option(tmp_path: Path, plain_model: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace whose nodes carry no softcap is stopped before any number is computed."""
    attention = importlib.import_module("accel.exporter.attention")
    real = attention._attributes
    monkeypatch.setattr(
        attention, "_attributes", lambda spec: {key: v for key, v in real(spec).items() if key != "softcap"}
    )
    with pytest.raises(FusionError, match="layer 0"):
        accel.export(plain_model("gemma2"), tmp_path / "gemma2", show_progress=False)
    assert list(tmp_path.iterdir()) == []
