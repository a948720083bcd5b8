"""Weights in integers or 8-bit floats -> DequantizeLinear before the products and look-ups that read them.

Which forms TensorRT keeps small was measured with TensorRT-RTX 1.7.1, by the sizes of engines for sm80 to sm120:

- INT4 in blocks of 32, 64 or 128 inputs, INT8 in such blocks or with one scale per output, and FP8 with one scale stay
  what they are when a matrix product reads the dequantised weight. The weight of a product is written [K, N].
- A look-up of dequantised rows becomes one kernel that reads the asked rows of the integers and their scales; nothing
  but a DequantizeLinear may read such a constant, so that the rows cannot be looked up first. A table is [N, K] for
  it, and a head tied to it reads the same integers (of INT8 without rounded inputs the builder keeps a second copy).
- INT4 with one scale per output has no form: it is stored as INT8, with the same values.
- Scales are in the type of what is computed, fp16. Those of groups are exact in it, the others lose one part in 2048.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.errors import FusionError
from accel.graph.edit import make_constant
from accel.graph.lowering.tensorrt.emit import Emitter
from accel.graph.quantized import quantized_of
from accel.quantized_tensor import QuantizedTensor, float8_scale, round_float8
from accel.scheme import Scheme

FLOAT, INT8, INT4, FLOAT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN
LEAST_STEP = float(np.finfo(np.float16).smallest_subnormal)


def lower_quantized(model: ir.Model, scheme: Scheme, static_scales: Mapping[str, float]) -> int:
    """Rewrites ``accel::Linear`` and ``Gather`` nodes in place; returns how many weights are stored in 8 or 4 bits.

    Cases:
        1. A weight that knows its integers -> INT4 or INT8, DequantizeLinear, and the node as it was.
        2. ``fp8``: the weight of a product whose input has a calibrated scale -> FP8 with one scale, likewise.
        3. ``w8a8`` and ``fp8``: the product's input -> QuantizeLinear, DequantizeLinear, once for all its products.
    Refused: any other reader of such a weight.

    Args:
        model: Before ``lower_linear``.
        scheme: Says whether inputs are rounded, and to what.
        static_scales: By a weight's name, the step of its product's input.

    Raises:
        FusionError: Another reader, or a product without a step.
    """
    graph = model.graph
    rounding = INT8 if scheme.activations == "static" else FLOAT8 if scheme.base == "fp8" else None
    readers = _readers(graph, static_scales if rounding == FLOAT8 else {})
    products: dict[ir.Node, str] = {}
    for weight, nodes in readers.items():
        products |= {node: weight.name or "" for node in nodes if _is_product(node)}
        value = _stored(weight, nodes).dequantized(graph, nodes[0])
        for node in nodes:
            node.replace_input_with(1 if node in products else 0, value)
    if rounding is not None:
        _round_inputs(graph, products, rounding, static_scales)
    return len(readers)


def _is_product(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == ("accel", "Linear")


def _readers(graph: ir.Graph, float8: Mapping[str, float]) -> dict[ir.Value, list[ir.Node]]:
    """Weights to be stored in few bits -> the nodes that read them, both in the graph's order."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        for place, value in enumerate(node.inputs):
            if value is None or not value.is_initializer():
                continue
            if quantized_of(value) is None and not (value.name in float8 and _is_product(node)):
                continue
            row = node.op_type == "Gather" and not node.domain and node.attributes.get_int("axis", 0) == 0
            if (place, _is_product(node)) != (1, True) and (place, row) != (0, True):
                raise FusionError(f"a {node.op_type} node reads the quantised {value.name}", where=node.name)
            found.setdefault(value, []).append(node)
    return found


@dataclass(frozen=True)
class _Stored:
    """A weight as the file holds it.

    Attributes:
        name: Of the weight.
        dtype: INT4, INT8 or FLOAT8E4M3FN.
        shape: [N, K] of a table that is looked up, [K, N] of others.
        values: Makes them.
        scales: float32: [] of all, [N] of the outputs, or of blocks along the inputs.
        attributes: Of its DequantizeLinear.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, int]
    values: Callable[[], NDArray[Any]]
    scales: NDArray[np.float32]
    attributes: Mapping[str, Any]

    def dequantized(self, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """Adds the initializers and the node; the weight in float32."""
        name = f"{self.name}.{self.dtype.name.lower()}"
        values = ir.Value(name=name, type=ir.TensorType(self.dtype), shape=ir.Shape(self.shape))
        values.const_value = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(self.values()).astype(self.dtype.numpy()), name=name),
            dtype=self.dtype, shape=ir.Shape(self.shape), name=name,
        )  # fmt: skip
        graph.register_initializer(values)
        scales = make_constant(graph, f"{self.name}.scale", self.scales)
        return Emitter(graph, before)("DequantizeLinear", [values, scales], self.shape, **self.attributes)


def _stored(weight: ir.Value, nodes: Sequence[ir.Node]) -> _Stored:
    """The weight's new form; products that read it [K, N] are told so."""
    name, quantized, tensor = weight.name or "", quantized_of(weight), weight.const_value
    table = not all(_is_product(node) for node in nodes)
    transposed = nodes[0].attributes.get_int("transposed", 0)
    for node in nodes:
        if not table:
            node.attributes["transposed"] = ir.AttrInt64("transposed", 0)
    if quantized is not None:
        return _integers(name, quantized, table)
    assert tensor is not None
    first, second = (int(size) for size in tensor.shape)
    scale = float8_scale(tensor.numpy())

    def values() -> NDArray[Any]:
        rounded = round_float8(tensor.numpy(), scale)
        return rounded.T if transposed else rounded

    return _Stored(
        name, FLOAT8, (second, first) if transposed else (first, second), values, np.array(scale, np.float32), {}
    )


def _integers(name: str, quantized: QuantizedTensor, table: bool) -> _Stored:
    inputs, outputs = (1, 0) if table else (0, 1)  # axes
    values, scales = (array if table else array.T for array in (quantized.values, quantized.scales))
    if quantized.group:
        attributes = {"axis": inputs, "block_size": quantized.group}
    else:
        attributes, scales = {"axis": outputs}, scales.reshape(-1)
    dtype = INT4 if quantized.bits == 4 and quantized.group else INT8
    shape = (int(values.shape[0]), int(values.shape[1]))
    return _Stored(name, dtype, shape, lambda: values, np.ascontiguousarray(scales), attributes)


def _round_inputs(
    graph: ir.Graph, products: Mapping[ir.Node, str], dtype: ir.DataType, static_scales: Mapping[str, float]
) -> None:
    """Puts a pair before each product (by its weight's name), or one for all that round one value to one step."""
    made: dict[tuple[ir.Value, float], ir.Value] = {}
    for node in [node for node in graph if node in products]:
        name, x = products[node], node.inputs[0]
        if name not in static_scales:
            raise FusionError("no calibrated scale for this product's input", where=name)
        step = max(static_scales[name], LEAST_STEP)
        assert x is not None
        if (x, step) not in made:
            emit, shape = Emitter(graph, node), x.shape or ()
            scale = emit.number(f"{name}.x_scale", step)
            rounded = emit("QuantizeLinear", [x, scale], shape, dtype, output_dtype=int(dtype))
            made[x, step] = emit("DequantizeLinear", [rounded, scale], shape)
        node.replace_input_with(0, made[x, step])


__all__ = ["LEAST_STEP", "lower_quantized"]
