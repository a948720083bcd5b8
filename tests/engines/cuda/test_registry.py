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
from tests.parity.families import ALL, build_model


@pytest.mark.parametrize(
    "gpus,said",
    [((), "there is no NVIDIA GPU here"), (("Some GPU",), "triton and onnx_ir missing: pip install triton onnx-ir")],
)
def test_what_is_missing_is_named_where_there_is_a_gpu(
    gpus: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one: the extra would bring onnxruntime-gpu into the folder of onnxruntime."""
    bundle: Any = None
    monkeypatch.setattr(registry, "pick_precision", lambda *_: "fp16")
    monkeypatch.setattr(registry, "find_spec", lambda name: object() if name == "torch" else None)
    monkeypatch.setattr(registry, "gpu_models", lambda: (gpus, "580"))
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
def test_no_command_is_advised_that_is_refused(decoder: Path, variant: str, said: str) -> None:
    opened = Bundle.open(decoder)
    variants = {**opened.manifest.variants, variant: opened.variant("fp32")}
    bundle = Bundle(opened.path, dataclasses.replace(opened.manifest, variants=variants))
    assert said.format(command=f"accel quantize {opened.path} --variant") in str(registry.probe(bundle, variant))
