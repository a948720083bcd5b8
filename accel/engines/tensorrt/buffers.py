"""Device memory of a session beside the engine's weights and scratch memory: the builder knows it beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from accel.engines.tensorrt.memory import ALIGNMENT, Device, aligned
from accel.spec import ArchSpec, Task

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]  # input -> its least, best and largest shape

# What is reserved for an encoder's outputs. Hidden states of 64 rows of 512 tokens take 100 MB (768 wide), so that runs
# of most models are never split; the logits of a masked language model take 60 MB a row: four rows keep a GPU busy.
OUTPUT_BYTES = 256 << 20
# Page-locked memory that outputs pass through on their way to the caller: one copy of this size takes a millisecond, so
# that waiting for each costs nothing beside it.
FETCH_BYTES = 16 << 20
_FLOAT, _INT64 = 4, 8


def staging_bytes(ranges: Ranges, names: Iterable[str]) -> int:
    """Bytes of a profile's int64 inputs, each aligned."""
    return sum(aligned(int(np.prod(ranges[name][2])) * _INT64) for name in names)


def logits_bytes(profiles: Iterable[Ranges], vocab_size: int) -> int:
    """Bytes of a decoder's logits: of the run that gives most rows of them."""
    return _FLOAT * vocab_size * max(ranges["logits_positions"][2][0] for ranges in profiles)


def buffer_bytes(
    arch: ArchSpec, profiles: Sequence[Ranges], outputs: Mapping[str, Sequence[int | str]], cache_bytes: int
) -> int:
    """All that a session reserves: caches, inputs, outputs.

    Args:
        profiles: The engine's.
        outputs: Shapes of its outputs, by name.
        cache_bytes: Of all cache rows; 0 for encoders.
    """
    inputs = sum(staging_bytes(r, [name for name in r if not name.startswith("past.")]) for r in profiles)
    if arch.kind == "decoder":
        return cache_bytes + inputs + logits_bytes(profiles, arch.vocab_size)
    return inputs + OutputLayout(arch.task, outputs).reserved(profiles)


class OutputLayout:
    """Where the outputs of an encoder's run lie: one behind the other.

    Args:
        task: The model's; it says whether outputs are per token or per row. Their shapes do not: where all profiles
            have one length, the engine has it in them as a number.
        shapes: Output -> [B, S, ...] or [B, ...]; only what follows B and S is read.
    """

    def __init__(self, task: Task, shapes: Mapping[str, Sequence[int | str]]) -> None:
        self.per_token = task != "text-classification"
        self._rest = {name: tuple(map(int, shape[2 if self.per_token else 1 :])) for name, shape in shapes.items()}

    def shapes(self, batch: int, length: int) -> dict[str, Shape]:
        """Shapes of one run's outputs."""
        head = (batch, length) if self.per_token else (batch,)
        return {name: head + rest for name, rest in self._rest.items()}

    def offsets(self, batch: int, length: int) -> dict[str, int]:
        """Output -> bytes from the beginning."""
        found, end = {}, 0
        for name, shape in self.shapes(batch, length).items():
            found[name] = end
            end += aligned(_FLOAT * int(np.prod(shape)))
        return found

    def size(self, batch: int, length: int) -> int:
        """Bytes of all outputs of one run."""
        return sum(aligned(_FLOAT * int(np.prod(shape))) for shape in self.shapes(batch, length).values())

    def reserved(self, profiles: Iterable[Ranges]) -> int:
        """Bytes to reserve: for the largest run, within ``OUTPUT_BYTES``."""
        return min(OUTPUT_BYTES, max(self.size(*ranges["input_ids"][2]) for ranges in profiles))


class OutputBuffers:
    """An encoder's outputs on the device, shared by its profiles, and their way to the host.

    Raises:
        DeviceMemoryError: The GPU's memory does not hold them.
    """

    def __init__(self, device: Device, layout: OutputLayout, reserved: int) -> None:
        self.layout, self.reserved = layout, reserved
        self._device = device
        length = min(max(reserved, ALIGNMENT), FETCH_BYTES) // _FLOAT
        self._fetched: NDArray[np.float32] = device.pinned((length,), np.float32)
        self._base = device.allocate(reserved, "the outputs of the engine")

    @contextmanager
    def addresses(self, batch: int, length: int) -> Iterator[dict[str, int]]:
        """Output -> address, for one run. One that needs more than is reserved gets memory of its own meanwhile.

        Raises:
            DeviceMemoryError: The GPU's memory does not hold that.
        """
        size, offsets = self.layout.size(batch, length), self.layout.offsets(batch, length)
        larger = size > self.reserved
        base = self._device.allocate(size, f"the outputs of {batch} x {length} tokens") if larger else self._base
        try:
            yield {name: base + offset for name, offset in offsets.items()}
        finally:
            if larger:
                self._device.release(base)

    def fetch(self, address: int, shape: Shape) -> NDArray[np.float32]:
        """Copies an output to an array of its own; waits for the run."""
        whole = np.empty(shape, np.float32)
        flat, step = whole.reshape(-1), self._fetched.size
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            self._device.download(self._fetched[: part.size], address + _FLOAT * start)
            self._device.synchronize()
            part[:] = self._fetched[: part.size]
        return whole

    def close(self) -> None:
        """Frees the device's part."""
        self._device.release(self._base)


__all__ = [
    "FETCH_BYTES",
    "OUTPUT_BYTES",
    "OutputBuffers",
    "OutputLayout",
    "Ranges",
    "buffer_bytes",
    "logits_bytes",
    "staging_bytes",
]
