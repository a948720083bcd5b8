"""Device memory that goes back when it is dropped.

What ``OrtValue`` allocates comes from an arena of the whole process, which grows by powers of two and keeps what it
has. A session's arena, as ``Provider`` sets it, grows by what is asked for, and ends with the session and its outputs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from accel.engines.ort_cuda.provider import ITEM_BYTES, Provider, run_error
from accel.engines.ort_cuda.small_graphs import zeros

_ITEM = 8  # bytes of an int64
_MOST_ITEMS = (1 << 31) - (1 << 16)  # ONNX Runtime's kernel that fills memory counts in int32


class Allocator:
    """Allocates on a provider's device.

    Args:
        provider: Where.

    Raises:
        OutOfMemoryError: Not even the allocator fits.
        EngineUnavailableError: See ``Provider.open``.
    """

    def __init__(self, provider: Provider) -> None:
        self._provider, self._session = provider, provider.open(zeros())

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An ``OrtValue`` over at least so much memory, its type and contents undefined; its address is what counts.

        Raises:
            OutOfMemoryError: It does not fit.
            EngineBrokenError, EngineError: The device failed; see ``run_error``.
        """
        count = -(-prod(shape) * ITEM_BYTES[dtype] // _ITEM)
        if count > _MOST_ITEMS:
            return self._provider.allocate(shape, dtype)
        io = self._session.io_binding()
        io.bind_cpu_input("x", np.array([count]))
        io.bind_output("y", self._provider.device, self._provider.index)
        try:
            self._session.run_with_iobinding(io)
        except Exception as error:
            raise run_error(error, "allocating device memory") from error
        return io.get_outputs()[0]


__all__ = ["Allocator"]
