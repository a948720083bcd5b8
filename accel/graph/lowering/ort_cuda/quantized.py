"""Integer weights -> ONNX Runtime's own operators: ``MatMulNBits``, and ``GatherBlockQuantized`` for embeddings.

Both read uint8 [N, K / group, group * bits / 8], the first of a byte's two weights in its low half, with half the range
for zero: a table tied to the LM head is the head's own initializer. Scales are float16; the two operators want them in
two shapes, and a tied table has them twice (an eighth of 4-bit weights in groups of 32).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.graph.edit import make_constant, substitute
from accel.graph.quantized import quantized_of
from accel.quantized_tensor import QuantizedTensor

MICROSOFT = "com.microsoft"
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


def lower_quantized(model: ir.Model) -> int:
    """Rewrites every node that reads integer weights, in place; returns how many.

    Cases:
        1. ``accel::Linear`` -> ``MatMulNBits(x, weight, scales)``; a bias becomes an Add, which later passes absorb.
        2. ``Gather`` of rows -> ``GatherBlockQuantized``, and a Reshape that puts the groups side by side.
    """
    count = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) == ("accel", "Linear") and quantized_of(node.inputs[1]) is not None:
            _lower_linear(model.graph, node)
        elif (node.domain, node.op_type) == ("", "Gather") and quantized_of(node.inputs[0]) is not None:
            _lower_gather(model.graph, node)
        else:
            continue
        count += 1
    return count


def _lower_linear(graph: ir.Graph, node: ir.Node) -> None:
    weight, output = node.inputs[1], node.outputs[0]
    tensor = quantized_of(weight)
    assert weight is not None and tensor is not None
    attributes = {"N": tensor.shape[0], "K": tensor.shape[1], "bits": tensor.bits, "block_size": tensor.group}
    inputs = [node.inputs[0], _blocks(graph, weight, tensor), _scales(graph, weight, tensor, len(tensor.shape))]
    made = [ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)]
    if len(node.inputs) > 2:
        made.append(ir.node("Add", [made[0].outputs[0], node.inputs[2]]))
    for step in made:
        step.outputs[0].type, step.outputs[0].shape = output.type, output.shape
    substitute(node, made, [made[-1].outputs[0]])


def _lower_gather(graph: ir.Graph, node: ir.Node) -> None:
    (table, ids), output = node.inputs[:2], node.outputs[0]
    tensor = quantized_of(table)
    assert table is not None and ids is not None and tensor is not None and ids.shape is not None
    assert not node.attributes.get_int("axis", 0), node.name
    inputs = [_blocks(graph, table, tensor), ids, _scales(graph, table, tensor, 3)]
    attributes = {"gather_axis": 0, "quantize_axis": 2, "block_size": tensor.group, "bits": tensor.bits}
    rows = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)
    groups = tensor.scales.shape[1]
    rows.outputs[0].type = ir.TensorType(FLOAT16)
    rows.outputs[0].shape = ir.Shape([*ids.shape, groups, tensor.group])
    flat = [*[0] * len(ids.shape), tensor.shape[1]]
    shape = make_constant(graph, f"shape_rows_{len(ids.shape)}_{tensor.shape[1]}", np.array(flat, np.int64))
    joined = ir.node("Reshape", [rows.outputs[0], shape])
    joined.outputs[0].type, joined.outputs[0].shape = ir.TensorType(FLOAT16), output.shape
    wide = ir.node("Cast", [joined.outputs[0]], {"to": FLOAT})
    wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(FLOAT), output.shape
    substitute(node, [rows, joined, wide], [wide.outputs[0]])


def _blocks(graph: ir.Graph, weight: ir.Value, tensor: QuantizedTensor) -> ir.Value:
    """uint8 [N, K / group, group * bits / 8]."""
    rows, groups = tensor.scales.shape
    shape = rows, groups, tensor.group * tensor.bits // 8
    name = f"{weight.name}.blocks{tensor.bits}"
    return _initializer(graph, name, ir.DataType.UINT8, shape, lambda: pack_blocks(tensor))


def _scales(graph: ir.Graph, weight: ir.Value, tensor: QuantizedTensor, rank: int) -> ir.Value:
    """float16 [N, K / group], or [N, K / group, 1]."""
    shape = (*tensor.scales.shape, *[1] * (rank - 2))
    name = f"{weight.name}.scales" if rank == 2 else f"{weight.name}.scales{rank}"
    return _initializer(graph, name, FLOAT16, shape, lambda: tensor.scales.astype(np.float16).reshape(shape))


def _initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], NDArray]
) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = ir.LazyTensor(
            lambda: ir.tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def pack_blocks(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """The integers as the operators read them: uint8 [N, K / group, group * bits / 8]."""
    rows, groups = tensor.scales.shape
    unsigned: NDArray[np.uint8] = tensor.values.view(np.uint8) + np.uint8(1 << (tensor.bits - 1))
    if tensor.bits == 4:
        unsigned = unsigned[:, 0::2] | np.left_shift(unsigned[:, 1::2], 4, dtype=np.uint8)
    return unsigned.reshape(rows, groups, -1)


__all__ = ["lower_quantized", "pack_blocks"]
