"""Why the cuda engine is passed over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.bundle import Bundle
from accel.engines.cuda import registry
from accel.engines.cuda.program import weight_bytes
from accel.errors import BundleError
from tests.graph.test_external import QKV, graph, write
from tests.parity.families import ALL, build_model


@pytest.mark.parametrize(
    "lacking,said",
    [("there is no GPU", "there is no GPU"), (None, "triton and onnx_ir missing: pip install triton onnx-ir")],
)
def test_what_is_missing_is_named_where_there_is_a_gpu(
    lacking: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one: the extra would bring onnxruntime-gpu into the folder of onnxruntime."""
    bundle: Any = None
    monkeypatch.setattr(registry, "pick_precision", lambda *_: "fp16")
    monkeypatch.setattr(registry, "find_spec", lambda name: object() if name == "torch" else None)
    monkeypatch.setattr(registry, "missing_gpu", lambda: lacking)
    assert registry.probe(bundle, "auto") == said


@pytest.fixture(scope="module")
def decoder(made_once: Callable[..., Path]) -> Path:
    """Exported without a comparison, for which the ONNX Runtime beside a GPU may be too old."""
    unchecked, task = {"parity": {"enabled": False}}, ALL["llama"].task
    return made_once("unchecked-llama", lambda out: accel.export(build_model("llama"), out, unchecked, task=task))


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("w4g32", "no graph of the cuda engine for variant 'w4g32': {command} w4g32 --target cuda adds one"),
        ("fp32+kv8", "no graph of the cuda engine for variant 'fp32+kv8': {command} fp16+kv8 --target cuda adds one"),
        ("fp32+kv4", "the cuda engine does not run 'fp32+kv4': its caches are floats, of 8 bits too, or int8"),
        ("w8a8-dyn", "the cuda engine does not run 'w8a8-dyn': its kernels take floats times integer weights"),
        ("mine", "no graph of the cuda engine for variant 'mine': {command} mine --target cuda adds one"),
    ],
)
def test_no_command_is_advised_that_is_refused(
    decoder: Path, variant: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "missing_gpu", lambda: None)
    opened = Bundle.open(decoder)
    variants = {**opened.manifest.variants, variant: opened.variant("fp32")}
    bundle = Bundle(opened.path, dataclasses.replace(opened.manifest, variants=variants))
    assert said.format(command=f"accel quantize {opened.path} --variant") in str(registry.probe(bundle, variant))
    monkeypatch.setattr(registry, "missing_gpu", lambda: "there is no GPU")
    without = str(registry.probe(bundle, variant))
    assert without == "there is no GPU" or without.startswith("the cuda engine does not run"), "no graph would help"


def test_weights_take_what_the_graph_reads_and_not_their_files(tmp_path: Path) -> None:
    """One file may hold another graph's weights too."""
    write(tmp_path, "all", graph(QKV))
    write(tmp_path, "some", graph({"q": QKV["q"], "k": QKV["k"]}), "all")
    assert weight_bytes(tmp_path / "some.onnx") == QKV["q"].nbytes + QKV["k"].nbytes
    assert weight_bytes(tmp_path / "all.onnx") == sum(array.nbytes for array in QKV.values())
    (tmp_path / "some.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot be read"):
        weight_bytes(tmp_path / "some.onnx")
