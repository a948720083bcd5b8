"""Device memory of a session's own."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import onnxruntime
import pytest

from accel.engines.gpu_memory import OutOfMemoryError
from accel.engines.ort_cuda import memory as module
from accel.engines.ort_cuda.memory import Allocator
from accel.engines.ort_cuda.provider import Provider
from accel.engines.ort_cuda.small_graphs import identity, zeros
from tests.engines.ort_cuda.gpu import needs_gpu
from tests.engines.ort_cuda.stand_in import CPU, fake_gpu


@pytest.mark.parametrize("provider", [CPU, pytest.param(None, marks=[needs_gpu, pytest.mark.gpu])], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    ("shape", "dtype", "size"), [((3, 5), "float16", 30), ((2, 1, 4), "float32", 32), ((1,), "bfloat16", 2)]
)
def test_there_is_as_much_as_is_asked_for(provider: Provider | None, shape: Any, dtype: str, size: int) -> None:
    allocator = Allocator(provider or Provider(onnxruntime))
    values = [allocator.allocate(shape, dtype) for _ in range(3)]
    found = [value.numpy() for value in values]
    assert {array.nbytes for array in found} == {-(-size // 8) * 8} and not any(array.any() for array in found)
    places = sorted(value.data_ptr() for value in values)
    assert min(np.diff(places)) >= size


def test_what_a_kernel_cannot_fill_comes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ITEMS", 10)
    allocator = Allocator(CPU)
    assert allocator.allocate((4, 10), "float16").shape() == [10]
    assert allocator.allocate((4, 11), "float16").shape() == [4, 11]


def test_memory_that_is_full() -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 96")

    with pytest.raises(OutOfMemoryError, match="size 96"):
        Allocator(fake_gpu(full)).allocate((6,), "float32")


def test_its_session_ends_with_it() -> None:
    allocator = Allocator(CPU)
    value, session = allocator.allocate((6,), "float32"), weakref.ref(allocator._session)
    del allocator
    gc.collect()
    assert session() is None and value.numpy().tolist() == [0, 0, 0], "what was allocated stays"


def test_small_graphs() -> None:
    import onnx

    for content in (identity(10), zeros()):
        onnx.checker.check_model(onnx.load_model_from_string(content))
    session = onnxruntime.InferenceSession(identity(1), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.arange(3, dtype=np.float32)})[0].tolist() == [0, 1, 2]
