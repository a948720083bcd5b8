"""Stands in for ``cuda.bindings.runtime``: a GPU whose memory is host memory, and whose stream runs late.

What is queued runs at ``cudaStreamSynchronize``, so that buffers changed too early show. Fresh memory is full of
NaNs. Every address is looked up: touching what was never allocated, or is free again, breaks the GPU for good.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

cudaError_t = enum.IntEnum(
    "cudaError_t",
    {
        "cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2, "cudaErrorNoDevice": 100,
        "cudaErrorIllegalAddress": 700, "cudaErrorStreamCaptureUnsupported": 900,
    },
)  # fmt: skip
OK = cudaError_t.cudaSuccess
ALIGNMENT = 256
Work = Callable[[], None]


class Illegal(Exception):
    """Something on the GPU broke a rule."""


@dataclass
class Block:
    """One allocation. ``data`` keeps the host memory behind it."""

    address: int
    size: int
    device: bool
    data: Any


@dataclass
class Graph:
    """Work that was captured; ``live``: not destroyed yet."""

    works: list[Work]
    live: bool = True


@dataclass
class Gpu:
    """The module's functions and constants. ``fail``: name of a call -> the error it returns from now on."""

    memory: int = 1 << 30
    major: int = 8
    minor: int = 6
    device: int = 0
    fail: dict[str, Any] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    queue: list[Work] = field(default_factory=list)
    capturing: list[Work] | None = None
    capture_broken: bool = False
    graphs: list[Graph] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    sticky: Any = OK
    why: str = ""

    cudaError_t = cudaError_t
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind",
        {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3},
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr",
        {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76},
    )

    # What the tests and TensorRT's double look at

    def find(self, address: int, size: int, device: bool = True) -> Block:
        """The live allocation that holds a range."""
        for block in self.blocks.values():
            if block.device == device and block.address <= address and address + size <= block.address + block.size:
                return block
        raise Illegal(f"{size} bytes at {address:#x} are not in {'device' if device else 'pinned'} memory")

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Device memory as an array."""
        item = np.dtype(dtype)
        count = int(np.prod(shape))
        self.find(address, count * item.itemsize)
        buffer = (ctypes.c_char * (count * item.itemsize)).from_address(address)
        return np.frombuffer(memoryview(buffer).cast("B"), item, count).reshape(shape)

    def submit(self, work: Work) -> Any:
        """Queues work, or captures it."""
        (self.queue if self.capturing is None else self.capturing).append(work)
        return self.sticky

    @property
    def used(self) -> int:
        """Bytes of device memory in use."""
        return sum(block.size for block in self.blocks.values() if block.device)

    # cuda.bindings.runtime

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name[4].isupper() and name in type(self).__dict__:
            found = object.__getattribute__(self, name)
            if callable(found) and not isinstance(found, type):
                self.calls.append(name)
                if name in self.fail:
                    self.capturing = None  # a capture that fails is over
                    return lambda *arguments: (self.fail[name], None)
            return found
        return object.__getattribute__(self, name)

    def cudaGetDevice(self) -> Any:
        return OK, self.device

    def cudaSetDevice(self, ordinal: int) -> Any:
        self.device = ordinal
        return (OK,)

    def cudaGetLastError(self) -> Any:
        return (self.sticky,)

    def cudaDeviceGetAttribute(self, attribute: Any, ordinal: int) -> Any:
        return OK, self.major if attribute == self.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor else self.minor

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        return OK, 0x5EED

    def cudaMemGetInfo(self) -> Any:
        return OK, self.memory - self.used, self.memory

    def cudaMalloc(self, size: int) -> Any:
        if self.used + size > self.memory:
            return cudaError_t.cudaErrorMemoryAllocation, None
        return self._allocate(size, True)

    def cudaMallocHost(self, size: int) -> Any:
        return self._allocate(size, False)

    def cudaFree(self, address: int) -> Any:
        return self._free(address, True)

    def cudaFreeHost(self, address: int) -> Any:
        return self._free(address, False)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> Any:
        def work() -> None:
            self.find(address, size)
            ctypes.memset(address, value, size)

        return (self.submit(work),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> Any:
        kinds = self.cudaMemcpyKind

        def work() -> None:
            self.find(target, size, kind != kinds.cudaMemcpyDeviceToHost)
            self.find(source, size, kind != kinds.cudaMemcpyHostToDevice)
            ctypes.memmove(target, source, size)

        return (self.submit(work),)

    def cudaMemcpy2DAsync(
        self, target: int, wide: int, source: int, pitch: int, width: int, rows: int, kind: Any, stream: Any
    ) -> Any:
        assert width <= wide and width <= pitch and kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def work() -> None:
            for row in range(rows):
                self.find(target + row * wide, width)
                self.find(source + row * pitch, width)
                ctypes.memmove(target + row * wide, source + row * pitch, width)

        return (self.submit(work),)

    def cudaStreamSynchronize(self, stream: Any) -> Any:
        if self.capturing is not None:
            self.capture_broken = True
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        works, self.queue = self.queue, []
        for work in works:
            try:
                if self.sticky == OK:
                    work()
            except Illegal as error:
                self.sticky, self.why = cudaError_t.cudaErrorIllegalAddress, str(error)
        return (self.sticky,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        self.capturing, self.capture_broken = [], False
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        works, self.capturing = self.capturing, None
        if self.capture_broken:
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        return OK, works

    def cudaGraphInstantiate(self, works: Any, flags: int) -> Any:
        self.graphs.append(Graph(works))
        return OK, self.graphs[-1]

    def cudaGraphDestroy(self, works: Any) -> Any:
        return (OK,)

    def cudaGraphLaunch(self, graph: Graph, stream: Any) -> Any:
        def work() -> None:
            if not graph.live:
                raise Illegal("a destroyed graph runs")
            for part in graph.works:
                part()

        return (self.submit(work),)

    def cudaGraphExecDestroy(self, graph: Graph) -> Any:
        assert graph.live
        graph.live = False
        return (OK,)

    def _allocate(self, size: int, device: bool) -> Any:
        data = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # NaN in every float type
        address = -(-data.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = Block(address, size, device, data)
        return OK, address

    def _free(self, address: int, device: bool) -> Any:
        if address not in self.blocks or self.blocks[address].device != device:
            return (cudaError_t.cudaErrorInvalidValue,)
        if device:
            self.cudaStreamSynchronize(None)  # as cudaFree does
        del self.blocks[address]
        return (OK,)
