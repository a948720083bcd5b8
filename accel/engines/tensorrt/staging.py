"""The small inputs of a run: written to one pinned buffer, sent by one copy to addresses that never change."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from accel.engines.tensorrt.buffers import staging_bytes
from accel.engines.tensorrt.engine import Profile
from accel.engines.tensorrt.memory import Device

_ITEM = np.dtype(np.int64).itemsize


class Staging:
    """Room for the int64 inputs of a profile's largest run.

    Attributes:
        addresses: Input -> where it lies on the device.

    Raises:
        DeviceMemoryError: The GPU's memory does not hold it.
    """

    def __init__(self, device: Device, profile: Profile, names: list[str]) -> None:
        self._device = device
        self._offsets = {name: staging_bytes(profile.ranges, names[:index]) for index, name in enumerate(names)}
        size = staging_bytes(profile.ranges, names)
        self._host = device.pinned((size // _ITEM,), np.int64)
        self._base = device.allocate(size, "the inputs of the engine")
        self.addresses = {name: self._base + offset for name, offset in self._offsets.items()}

    def send(self, arrays: Mapping[str, NDArray[np.int64]]) -> None:
        """Queues the copy; the device is synchronized before the next one."""
        end = 0
        for name, array in arrays.items():
            start = self._offsets[name] // _ITEM
            self._host[start : start + array.size] = array.reshape(-1)
            end = max(end, start + array.size)
        self._device.upload(self._base, self._host[:end])

    def close(self) -> None:
        """Frees the device's part."""
        self._device.release(self._base)


__all__ = ["Staging"]
