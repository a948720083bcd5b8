"""Why the cuda engine is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from accel.engines.cuda import registry


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
