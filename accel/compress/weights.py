"""Reading a layer's weights from the graph, and putting integers in their place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel.compress.layers import Layer
from accel.graph.quantized import QuantizedWeight
from accel.quantized_tensor import QuantizedTensor


def read_weight(layer: Layer) -> NDArray[np.float32]:
    """The layer's weights as float32 [N, K]."""
    tensor = layer.weight.const_value
    assert tensor is not None, layer.name
    array = tensor.numpy()
    return np.ascontiguousarray(array if layer.transposed else array.T, dtype=np.float32)


def write_quantized(layer: Layer, quantized: QuantizedTensor) -> None:
    """Makes the integers the layer's weight."""
    layer.weight.const_value = QuantizedWeight(quantized, layer.transposed, layer.name)


def weight_error(weight: NDArray[np.float32], quantized: QuantizedTensor) -> float:
    """|| W - W' || / || W ||, Frobenius."""
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(weight - quantized.dequantize())) / norm if norm else 0.0


__all__ = ["read_weight", "weight_error", "write_quantized"]
