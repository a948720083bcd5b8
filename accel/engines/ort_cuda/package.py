"""onnxruntime-gpu: whether it is there and usable, and the GPU memory that is free."""

from __future__ import annotations

import ctypes
import threading
from types import ModuleType
from typing import Any

from accel.capabilities import CUDA_PROVIDER, MINIMUM_ONNXRUNTIME_GPU, clash_of, version_of
from accel.engines.ort.common import parse_version
from accel.errors import DependencyError

CUDA = CUDA_PROVIDER
INSTALL = 'pip install "accelrt[cuda]"'
_CUDA_RUNTIMES = ("libcudart.so.13", "libcudart.so.12")
_loaded = threading.Event()


def is_installed() -> bool:
    """Whether the package is there, without importing it."""
    return version_of("onnxruntime-gpu") is not None


def import_onnxruntime_gpu() -> ModuleType:
    """Imports ONNX Runtime with its CUDA provider, and loads CUDA's libraries for it once.

    Raises:
        DependencyError: It is missing, shadowed by another flavour, broken, too old, or without the provider.
    """
    flavours, clash = clash_of()
    names = [flavour.split()[0] for flavour in flavours]
    if "onnxruntime-gpu" not in names:
        there = f"; {' and '.join(flavours)} is installed, which has no CUDA" if flavours else ""
        swap = f"pip uninstall -y {' '.join(names)} && " if names else ""
        raise DependencyError(f"onnxruntime-gpu is not installed{there}", remedy=f"Run: {swap}{INSTALL}")
    mend = f"Run: pip uninstall -y {' '.join(names)} && {INSTALL}"
    try:
        import onnxruntime
    except ImportError as error:
        what = f"onnxruntime-gpu cannot be imported: {error}"
        raise DependencyError(what, remedy=mend) from error
    version = getattr(onnxruntime, "__version__", None)
    if version is None or not hasattr(onnxruntime, "InferenceSession"):
        raise DependencyError(clash or "onnxruntime-gpu is damaged: its folder holds no usable package", remedy=mend)
    if CUDA not in onnxruntime.get_available_providers():
        why = f": {clash}" if clash else ""
        raise DependencyError(f"the onnxruntime {version} that Python imports has no CUDA provider{why}", remedy=mend)
    if parse_version(version) < MINIMUM_ONNXRUNTIME_GPU:
        what = f"onnxruntime-gpu {version} is too old: 1.31 or newer is needed"
        raise DependencyError(what, remedy=f"Run: {INSTALL} --upgrade")
    _preload(onnxruntime)
    return onnxruntime


def _preload(ort: Any) -> None:
    """CUDA's and cuDNN's libraries from their wheels; what is missing shows when a session is opened."""
    if not _loaded.is_set() and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
        _loaded.set()


def free_memory() -> int | None:
    """Bytes that are free on CUDA's current GPU; None: CUDA's runtime library cannot be asked."""
    for name in _CUDA_RUNTIMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0:
            return int(free.value)
    return None


__all__ = ["CUDA", "INSTALL", "free_memory", "import_onnxruntime_gpu", "is_installed"]
