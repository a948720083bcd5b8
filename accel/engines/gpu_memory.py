"""A GPU's memory that is full, whoever says so: PyTorch, Triton, ONNX Runtime, a library or the driver."""

from __future__ import annotations

import gc
import re
import traceback

from accel.errors import EngineError

_FULL = re.compile(
    r"out of memory|[Ff]ailed to allocate memory|bad_alloc|CUDA failure 2\b|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED\b.*cublasCreate"
)


class OutOfMemoryError(EngineError):
    """The device's memory did not suffice for one run, one allocation, or for loading. The engine is sound."""


def says_full(text: str) -> bool:
    """Whether an error's text says that memory was full: whoever asks for less may get it."""
    return _FULL.search(text) is not None


def let_go(error: BaseException) -> None:
    """Frees what a load that failed still holds: the next engine may want it, and what fits is counted by it.

    Args:
        error: How it failed; its frames lose their variables, sessions and tensors among them.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()


__all__ = ["OutOfMemoryError", "let_go", "says_full"]
