"""Device memory, pinned host memory, one stream and its graphs, through ``cuda-python``.

All engines of the process share one ``Device`` per GPU: one stream, and one scratch memory as large as the most
demanding of them needs. Whoever runs holds the device (``with device:``), so the scratch has one user at a time.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from accel.engines.capturing import capturing
from accel.errors import DependencyError, EngineBrokenError, EngineError, EngineUnavailableError

ALIGNMENT = 256  # bytes; of every address that TensorRT is given (NvInferRuntime.h, setTensorAddress)


class DeviceMemoryError(EngineError):
    """The GPU has not as much free memory as was asked for.

    Attributes:
        size: Bytes asked for.
        free: Bytes that were free.
    """

    def __init__(self, size: int, free: int, what: str, remedy: str | None = None) -> None:
        self.size, self.free = size, free
        default = "Close other sessions or programs on this GPU, or build an engine of a smaller capacity or batch"
        text = f"the GPU has {free:,} bytes free, {what} takes {size:,}"
        super().__init__(text, where="GPU memory", remedy=remedy or default)


def import_cuda() -> Any:
    """``cuda.bindings.runtime``.

    Raises:
        DependencyError: The package is missing or cannot be loaded; carries the pip command.
    """
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError, RuntimeError) as error:
        what = f"the CUDA bindings cannot be imported: {error}"
        raise DependencyError(what, where="cuda.bindings", remedy='Run: pip install "cuda-python>=12.8"') from error
    return runtime


def aligned(size: int) -> int:
    """The size, rounded up so that what stands behind is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Device:
    """One GPU: its memory, a stream, and graphs captured from it. A context manager that holds it for this thread.

    Addresses are plain integers, sizes are in bytes. Copies and clears are queued on the stream;
    ``synchronize`` waits for them.

    Args:
        runtime: ``cuda.bindings.runtime``, or what stands in for it.
        ordinal: CUDA's number of the GPU.

    Raises:
        EngineUnavailableError: There is no usable GPU.
    """

    def __init__(self, runtime: Any, ordinal: int | None = None) -> None:
        self._runtime = runtime
        self._lock, self._held = threading.RLock(), 0
        try:
            self.ordinal: int = self._call("cudaGetDevice") if ordinal is None else ordinal
            self._call("cudaSetDevice", self.ordinal)
            self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
            major, minor = (self._attribute(name) for name in ("Major", "Minor"))
        except EngineBrokenError as error:
            remedy = "Check nvidia-smi and the driver's version, or load with another engine"
            raise EngineUnavailableError("there is no usable GPU", where=error.what, remedy=remedy) from error
        self.sm = f"sm{major}{minor}"
        self._needs: dict[object, int] = {}
        self._scratch = self._scratch_size = 0

    # Holding

    def __enter__(self) -> Self:
        self._lock.acquire()
        self._held += 1
        if self._held == 1:
            try:
                self._call("cudaSetDevice", self.ordinal)  # CUDA's current device is one of the thread
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held -= 1
        self._lock.release()

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream)

    def synchronize(self) -> None:
        """Waits until all that was queued is done.

        Raises:
            EngineBrokenError: Some of it failed.
        """
        self._call("cudaStreamSynchronize", self._stream)

    # Memory

    def free_memory(self) -> int:
        """Bytes of device memory that nobody uses."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int, what: str) -> int:
        """Address of ``size`` bytes, aligned. ``what``: what for, as an error says it.

        Raises:
            DeviceMemoryError: There are not as many.
        """
        status, address = self._runtime.cudaMalloc(max(size, ALIGNMENT))
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            self._runtime.cudaGetLastError()  # takes it back, or a later call would report it
            raise DeviceMemoryError(size, self.free_memory(), what)
        self._check("cudaMalloc", status)
        assert address % ALIGNMENT == 0, address
        return int(address)

    def release(self, address: int) -> None:
        """Frees an allocation."""
        self._call("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """A zeroed array in page-locked host memory, freed with the last array that looks at it."""
        count, item = int(np.prod(shape)), np.dtype(dtype)
        size = max(count, 1) * item.itemsize
        status, address = self._runtime.cudaMallocHost(size)
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            self._runtime.cudaGetLastError()
            remedy = "Raise ulimit -l, or use a smaller batch"
            raise EngineError(
                f"{size:,} bytes of host memory cannot be page-locked", where="host memory", remedy=remedy
            )
        self._check("cudaMallocHost", status)
        buffer = (ctypes.c_byte * size).from_address(int(address))
        weakref.finalize(buffer, _free_pinned, self._runtime, int(address), os.getpid()).atexit = False
        array: NDArray = np.frombuffer(memoryview(buffer).cast("B"), item, count).reshape(shape)
        array.fill(0)
        return array

    def clear(self, address: int, size: int) -> None:
        """Queues filling with zeros."""
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def upload(self, address: int, array: NDArray) -> None:
        """Queues a copy of a pinned, contiguous array to the device; leave it as it is until ``synchronize``."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: NDArray, address: int) -> None:
        """Queues a copy from the device to a pinned, contiguous array."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Queues a copy of the first ``width`` bytes of ``rows`` rows that lie ``pitch`` bytes apart."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, pitch, source, pitch, width, rows, kind, self._stream)

    # Scratch memory

    @property
    def scratch(self) -> tuple[int, int]:
        """Address and size of the scratch memory; another one after ``reserve`` or ``give_up``."""
        return self._scratch, self._scratch_size

    def reserve(self, owner: object, size: int) -> None:
        """Makes the scratch memory large enough for one more engine.

        Raises:
            DeviceMemoryError: There is not enough; the owner has none then, the others keep theirs.
        """
        if size > self._scratch_size:
            self._replace_scratch(self.allocate(size, "the scratch memory of the engine"), size)
        self._needs[owner] = size

    def give_up(self, owner: object) -> None:
        """An engine needs its scratch memory no longer; the last one frees it."""
        if self._needs.pop(owner, None) is not None and not self._needs:
            self._replace_scratch(0, 0)

    def _replace_scratch(self, address: int, size: int) -> None:
        old, self._scratch, self._scratch_size = self._scratch, address, size
        if old:
            self.synchronize()
            self.release(old)

    # Graphs

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` queues on the stream, as an executable graph; nothing of it runs.

        Raises:
            EngineError: ``work`` failed, or queued what cannot be captured.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with capturing:
            self._call("cudaStreamBeginCapture", self._stream, mode)
            try:
                work()
            except BaseException:
                self._runtime.cudaStreamEndCapture(self._stream)  # back to normal; what it says adds nothing
                self._runtime.cudaGetLastError()
                raise
            graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Queues a captured graph."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def destroy(self, graph: Any) -> None:
        """Frees a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    # Calls

    def _attribute(self, part: str) -> int:
        attribute = getattr(self._runtime.cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}")
        return int(self._call("cudaDeviceGetAttribute", attribute, self.ordinal))

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self._call("cudaMemcpyAsync", target, source, size, getattr(self._runtime.cudaMemcpyKind, kind), self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A CUDA call's values without its status: none, one, or several.

        Raises:
            EngineBrokenError: It failed.
        """
        status, *values = getattr(self._runtime, name)(*arguments)
        self._check(name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, name: str, status: Any) -> None:
        if status == self._runtime.cudaError_t.cudaSuccess:
            return
        remedy = "Check nvidia-smi and the kernel's log; load the bundle again, on another engine if it comes back"
        raise EngineBrokenError(f"CUDA failed: {status.name}", where=name, remedy=remedy)


def _free_pinned(runtime: Any, address: int, process: int) -> None:
    if os.getpid() == process:  # a fork has no CUDA
        runtime.cudaFreeHost(address)


_devices: dict[tuple[int, int], Device] = {}  # by process, for a fork must open its own, and GPU
_devices_lock = threading.Lock()


def shared_device() -> Device:
    """The process's ``Device`` for CUDA's current GPU.

    Raises:
        DependencyError: cuda-python is missing.
        EngineUnavailableError: There is no usable GPU.
    """
    runtime = import_cuda()
    status, ordinal = runtime.cudaGetDevice()
    key = os.getpid(), int(ordinal) if status == runtime.cudaError_t.cudaSuccess else -1
    with _devices_lock:
        if key not in _devices:
            _devices[key] = Device(runtime)
        return _devices[key]


__all__ = ["ALIGNMENT", "Device", "DeviceMemoryError", "aligned", "import_cuda", "shared_device"]
