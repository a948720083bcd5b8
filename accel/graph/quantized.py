"""Quantised weights in a graph: the initializer stays what it was, its tensor knows the integers.

Every pass and lowering sees float32 weights of the same names and shapes, with the values that the integers stand
for. A target that stores integers looks for them at its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from accel.quantized_tensor import QuantizedTensor, concatenate


class QuantizedWeight(ir.LazyTensor):
    """Stands for float32 [N, K], or [K, N] when ``transposed`` is 0; numbers are made when they are asked for.

    Args:
        quantized: The integers, one row per output.
        transposed: As of the ``accel::Linear`` that reads it: 1 where the weight's rows are outputs.
        name: Of the initializer.
    """

    def __init__(self, quantized: QuantizedTensor, transposed: int = 1, name: str | None = None) -> None:
        self.quantized, self.transposed = quantized, transposed
        shape = ir.Shape(quantized.shape if transposed else quantized.shape[::-1])
        super().__init__(self._float, dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def _float(self) -> ir.Tensor:
        weight = self.quantized.dequantize()
        return ir.Tensor(weight if self.transposed else weight.T.copy())


def quantized_of(value: ir.Value | None) -> QuantizedTensor | None:
    """The integers of an initializer, None: it has none."""
    tensor = value.const_value if value is not None else None
    return tensor.quantized if isinstance(tensor, QuantizedWeight) else None


def quantized_alike(values: Sequence[ir.Value | None]) -> bool:
    """Whether all are floats, or all integers of as many bits in as large groups."""
    found = [quantized_of(value) for value in values]
    return len({None if item is None else (item.bits, item.group) for item in found}) == 1


def concatenated(tensors: Sequence[ir.TensorProtocol | None], name: str) -> QuantizedWeight | None:
    """The tensors one under the other, if all are quantised alike, with outputs as rows."""
    if not all(isinstance(tensor, QuantizedWeight) and tensor.transposed for tensor in tensors):
        return None
    joined = concatenate([tensor.quantized for tensor in tensors if isinstance(tensor, QuantizedWeight)])
    return None if joined is None else QuantizedWeight(joined, 1, name)


__all__ = ["QuantizedWeight", "concatenated", "quantized_alike", "quantized_of"]
