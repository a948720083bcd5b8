"""Kernels run in Triton's interpreter where there is no GPU (``tests/conftest.py`` says so in time), else on it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.kernels.comparing import Maker

torch = pytest.importorskip("torch")


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> object:
    """The device of the tensors; each test runs once in the interpreter and once on a GPU, as far as they are there."""
    from accel_kernels.device import INTERPRETED

    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("kernels run on the GPU here; TRITON_INTERPRET=1 runs them in the interpreter")
        return torch.device("cpu")
    if INTERPRETED:
        pytest.skip("kernels run in Triton's interpreter here: no NVIDIA device, or TRITON_INTERPRET=1")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def make(request: pytest.FixtureRequest, device: object) -> Maker:
    """Makes tensors of each type on the device."""
    return Maker(device, getattr(torch, request.param))


@pytest.fixture(autouse=True)
def quiet_overflow() -> Iterator[None]:
    """exp of a large number is infinity, in the interpreter as on a GPU; NumPy would warn each time."""
    with np.errstate(over="ignore"):
        yield
