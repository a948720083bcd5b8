"""What PyTorch raises, in our words, and what a load that failed leaves on the GPU."""

from __future__ import annotations

import weakref

import pytest
import torch

from accel.engines.cuda.device import Device, translated_errors
from accel.engines.gpu_memory import OutOfMemoryError
from accel.errors import BundleError, EngineBrokenError

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
DRIVER = "CUDA error: out of memory\nCUDA kernel errors might be reported later\nFor debugging consider more"
KERNEL = "Triton Error [CUDA]: out of memory"
LIBRARIES = (
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
)
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be reported later"


@pytest.mark.parametrize(
    ("error", "first"),
    [
        (torch.cuda.OutOfMemoryError(FULL), FULL),
        (torch.cuda.OutOfMemoryError(), "OutOfMemoryError"),
        (RuntimeError(DRIVER), "CUDA error: out of memory"),
        (RuntimeError(KERNEL), KERNEL),
        *((RuntimeError(library), library) for library in LIBRARIES),
    ],
)
@pytest.mark.parametrize(
    ("where", "remedy"),
    [
        ("loading", "Close other programs"),
        ("decoder step", "Load with a smaller max_batch or capacity"),
        ("encoder run", "Use a smaller batch or shorter inputs"),
    ],
)
def test_full_memory(error: Exception, first: str, where: str, remedy: str) -> None:
    with pytest.raises(OutOfMemoryError) as caught, translated_errors(where):
        raise error
    assert caught.value.what == f"the GPU's memory is full: {first}" and caught.value.where == where
    assert (caught.value.remedy or "").startswith(remedy)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(BUSY), f"RuntimeError: {BUSY.splitlines()[0]}"),
        (ValueError("a kernel\ndoes not compile"), "ValueError: a kernel\ndoes not compile"),
        (RuntimeError(), "RuntimeError: "),
    ],
)
def test_anything_else_breaks_the_engine(error: Exception, said: str) -> None:
    with pytest.raises(EngineBrokenError) as caught, translated_errors("loading"):
        raise error
    assert caught.value.what == f"the CUDA engine failed: {said}"


def test_our_own_errors_stay() -> None:
    with pytest.raises(BundleError, match="damaged"), translated_errors("loading"):
        raise BundleError("damaged")


def test_what_a_failed_load_made_is_free_before_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception's frames hold the tensors; PyTorch gives back what nobody holds."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def load() -> None:
        weights = torch.zeros(3)
        made.append(weakref.ref(weights))
        raise torch.cuda.OutOfMemoryError(FULL)

    monkeypatch.setattr(Device, "release", lambda _: alive.append(made[0]() is not None))
    try:
        with translated_errors("loading"):
            load()
    except OutOfMemoryError as error:
        Device(torch.device("cpu")).release_failed(error)
    assert alive == [False]
