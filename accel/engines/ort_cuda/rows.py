"""Copies cache rows on the device: a graph of one Identity, its input and output bound to the rows' addresses."""

from __future__ import annotations

from typing import Any

from accel.engines.ort_cuda.provider import ONNX_TYPES, Provider, run_error


class RowCopier:
    """Copies memory on a provider's device.

    Args:
        provider: Where.
        dtype: Of what is copied.
    """

    def __init__(self, provider: Provider, dtype: str) -> None:
        self._provider, self._type = provider, ONNX_TYPES[dtype]
        self._session: Any = provider.open(_identity(self._type))

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


def _identity(onnx_type: int) -> bytes:
    """The model ``y = Identity(x)`` over vectors of a type, in protobuf's own bytes: a server has no ``onnx``."""

    def field(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return bytes([number << 3, content])
        assert len(content) < 128, "one byte holds the length"
        return bytes([number << 3 | 2, len(content)]) + content

    def value(name: bytes) -> bytes:
        shape = field(1, field(2, b"N"))
        return field(1, name) + field(2, field(1, field(1, onnx_type) + field(2, shape)))

    node = field(1, b"x") + field(2, b"y") + field(4, b"Identity")
    graph = field(1, node) + field(2, b"copy") + field(11, value(b"x")) + field(12, value(b"y"))
    return field(1, 10) + field(7, graph) + field(8, field(1, b"") + field(2, 19))


__all__ = ["RowCopier"]
