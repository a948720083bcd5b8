"""Graphs of one node, in protobuf's own bytes: a server has no ``onnx``."""

from __future__ import annotations

INT64 = 7  # of onnx.TensorProto
_TENSOR = 4  # of onnx.AttributeProto


def identity(onnx_type: int) -> bytes:
    """The model ``y = Identity(x)`` over vectors of a type."""
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Identity")
    return _model(node, _value(b"x", onnx_type), _value(b"y", onnx_type))


def zeros() -> bytes:
    """The model ``y = ConstantOfShape(x)``: int64 [1] becomes int64 [x] of zeros."""
    zero = _field(1, 1) + _field(2, INT64) + _field(9, bytes(8))
    attribute = _field(1, b"value") + _field(5, zero) + _field(20, _TENSOR)
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"ConstantOfShape") + _field(5, attribute)
    return _model(node, _value(b"x", INT64), _value(b"y", INT64))


def _model(node: bytes, given: bytes, made: bytes) -> bytes:
    graph = _field(1, node) + _field(2, b"small") + _field(11, given) + _field(12, made)
    return _field(1, 10) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, 19))  # IR version, graph, opset


def _value(name: bytes, onnx_type: int) -> bytes:
    """A vector."""
    shape = _field(1, _field(2, b"N"))
    return _field(1, name) + _field(2, _field(1, _field(1, onnx_type) + _field(2, shape)))


def _field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last byte have the highest bit."""
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


__all__ = ["identity", "zeros"]
