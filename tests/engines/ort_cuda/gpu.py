"""What tests on a real GPU need."""

from __future__ import annotations

import pytest

from accel.engines.ort_cuda.package import import_onnxruntime_gpu
from accel.errors import DependencyError
from accel.machine import has_nvidia_device


def missing() -> str | None:
    """Why ``ort-cuda`` cannot run here."""
    if not has_nvidia_device():
        return "there is no NVIDIA GPU here"
    try:
        import_onnxruntime_gpu()
    except DependencyError as error:
        return str(error)
    return None


WHY = missing()
needs_gpu = pytest.mark.skipif(WHY is not None, reason=f"needs onnxruntime-gpu and a GPU: {WHY}")
