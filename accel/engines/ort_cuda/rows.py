"""Copies cache rows on the device: a graph of one Identity, its input and output bound to the rows' addresses."""

from __future__ import annotations

from typing import Any

from accel.engines.ort_cuda.provider import ONNX_TYPES, Provider, run_error
from accel.engines.ort_cuda.small_graphs import identity


class RowCopier:
    """Copies memory on a provider's device.

    Args:
        provider: Where.
        dtype: Of what is copied.
    """

    def __init__(self, provider: Provider, dtype: str) -> None:
        self._provider, self._type = provider, ONNX_TYPES[dtype]
        self._session: Any = provider.open(identity(self._type))

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies ``count`` elements from one address to another.

        Raises:
            EngineBrokenError: The device failed.
        """
        device, index = self._provider.device, self._provider.index
        io = self._session.io_binding()
        io.bind_input("x", device, index, self._type, [count], source)
        io.bind_output("y", device, index, self._type, [count], target)
        try:
            self._session.run_with_iobinding(io)
        except Exception as error:
            raise run_error(error, "copying a cache row") from error


__all__ = ["RowCopier"]
