"""The device: memory, copies, scratch memory, graphs. On the double everywhere, and on CUDA where there is a GPU."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import numpy as np
import pytest

from accel.engines.tensorrt import memory
from accel.engines.tensorrt.memory import ALIGNMENT, Device, DeviceMemoryError, import_cuda, shared_device
from accel.errors import DependencyError, EngineBrokenError, EngineUnavailableError
from tests.engines.tensorrt.gpu import Gpu, cudaError_t


@pytest.fixture(params=["double", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "double":
        return Device(Gpu())
    try:
        return Device(import_cuda())
    except (DependencyError, EngineUnavailableError) as error:
        pytest.skip(str(error))


def fetch(device: Device, address: int, count: int) -> np.ndarray:
    array = device.pinned((count,), np.int64)
    device.download(array, address)
    device.synchronize()
    return array


def test_copies_and_clears(device: Device) -> None:
    with device:
        source = device.pinned((4, 8), np.int64)
        assert not source.any()
        source[:] = np.arange(32).reshape(4, 8)
        first, second = (device.allocate(source.nbytes, "a test") for _ in range(2))
        assert first % ALIGNMENT == second % ALIGNMENT == 0
        device.upload(first, source)
        device.clear(second, source.nbytes)
        device.copy_rows(second, first, pitch=64, width=24, rows=3)
        expected = np.zeros((4, 8), np.int64)
        expected[:3, :3] = source[:3, :3]
        np.testing.assert_array_equal(fetch(device, second, 32).reshape(4, 8), expected)
        for address in (first, second):
            device.release(address)


def test_a_graph_repeats_what_was_queued(device: Device) -> None:
    with device:
        host = device.pinned((4,), np.int64)
        first, second = (device.allocate(32, "a test") for _ in range(2))
        device.clear(second, 32)
        graph = device.capture(lambda: device.copy_rows(second, first, 32, 32, 1))
        host[:] = 7
        device.upload(first, host)
        assert not fetch(device, second, 4).any(), "capturing runs nothing"
        device.launch(graph)
        assert (fetch(device, second, 4) == 7).all()
        device.destroy(graph)
        device.release(first)
        device.release(second)


def test_a_failed_capture_leaves_the_stream_usable(device: Device) -> None:
    def fail() -> None:
        raise EngineBrokenError("on purpose")

    with device:
        with pytest.raises(EngineBrokenError, match="on purpose"):
            device.capture(fail)
        with pytest.raises(EngineBrokenError, match="cudaErrorStreamCapture"):
            device.capture(device.synchronize)
        address = device.allocate(64, "a test")
        device.clear(address, 64)
        assert not fetch(device, address, 8).any()
        device.release(address)


def test_too_much_memory(device: Device) -> None:
    with device:
        with pytest.raises(DeviceMemoryError, match="bytes free, a test takes 1,125,899,906,842,624") as found:
            device.allocate(1 << 50, "a test")
        assert found.value.size == 1 << 50 and 0 < found.value.free < 1 << 50
        device.release(device.allocate(64, "a test"))


def test_scratch_memory_is_as_large_as_the_largest_needs(device: Device) -> None:
    with device:
        device.reserve("a", 1000)
        small = device.scratch
        device.reserve("b", 500)
        assert device.scratch == small and small[1] == 1000
        with pytest.raises(DeviceMemoryError):
            device.reserve("c", 1 << 50)
        assert device.scratch == small
        device.reserve("c", 5000)
        large = device.scratch
        assert large[1] == 5000
        for owner in ("c", "a"):
            device.give_up(owner)
            assert device.scratch == large
        device.give_up("b")
        device.give_up("b")
        assert device.scratch == (0, 0)


def test_other_threads_take_turns(device: Device) -> None:
    order = []

    def other() -> None:
        with device:
            device.synchronize()
            order.append("other")

    with device, device:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_pinned_memory_lives_as_long_as_it_is_looked_at() -> None:
    gpu = Gpu()
    view = Device(gpu).pinned((10, 10), np.float32)[3:]
    gc.collect()
    assert len(gpu.blocks) == 1 and not view.any()
    del view
    gc.collect()
    assert not gpu.blocks


def test_no_gpu() -> None:
    gpu = Gpu()
    gpu.fail["cudaGetDevice"] = cudaError_t.cudaErrorNoDevice
    with pytest.raises(EngineUnavailableError, match="no usable GPU.*cudaErrorNoDevice.*nvidia-smi"):
        Device(gpu)


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DependencyError, match='pip install "cuda-python>=12.8"'):
        shared_device()


def test_one_device_per_gpu_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = Gpu()
    monkeypatch.setattr(memory, "import_cuda", lambda: gpu)
    monkeypatch.setattr(memory, "_devices", {})
    first = shared_device()
    assert shared_device() is first and first.sm == "sm86"
    gpu.device = 1
    other = shared_device()
    assert other is not first and other.ordinal == 1
    with first:
        assert gpu.device == 0
    monkeypatch.setattr(memory.os, "getpid", lambda: -1)
    assert shared_device() is not first, "a fork opens its own"
