"""Small readers and editors of onnx_ir graphs, shared by the passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

# A const_value larger than this is a weight: passes never read its data.
SMALL_ELEMENTS = 4096


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value's data if it is a small constant, else None."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > SMALL_ELEMENTS:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The value's number if it is a constant with one element, else None."""
    data = constant(value)
    return float(data.reshape(-1)[0]) if data is not None and data.size == 1 else None


def ints(value: ir.Value | None) -> list[int] | None:
    """The value's integers if it is a small integer constant, else None."""
    data = constant(value)
    if data is None or not np.issubdtype(data.dtype, np.integer):
        return None
    return [int(item) for item in data.reshape(-1)]


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes the value, if it is of one of the given types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def sole_consumer(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only node that reads the value, if it is of one of the given types and the value is no output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if not op_types or node.op_type in op_types else None


def operands(node: ir.Node | None, op_type: str) -> tuple[ir.Value, ir.Value] | None:
    """Both inputs of a two-input node of this type, else None."""
    if node is None or node.op_type != op_type or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    assert first is not None and second is not None
    return first, second


def split_operand(node: ir.Node | None, op_type: str, wanted: ir.Value) -> ir.Value | None:
    """The other input of a commutative node that has ``wanted`` as one input, else None."""
    pair = operands(node, op_type)
    if pair is None:
        return None
    if pair[0] is wanted:
        return pair[1]
    return pair[0] if pair[1] is wanted else None


def last_dim(value: ir.Value) -> int | None:
    """The static size of the last dimension, else None."""
    if value.shape is None or len(value.shape) == 0:
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None


def rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def through_reshapes(value: ir.Value | None) -> ir.Value:
    """The value below reshapes that only regroup leading dimensions or split heads off a flat row."""
    assert value is not None
    node = producer(value, "Reshape")
    return value if node is None else through_reshapes(node.inputs[0])


def make_constant(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    """A small named initializer; the same name twice gives the same value."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name,
        shape=ir.Shape(data.shape),
        type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
        const_value=ir.tensor(data, name=name),
    )
    graph.register_initializer(value)
    return value


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Makes every reader of ``old`` read ``new``; a graph output keeps its name."""
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_replaced"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    else:
        ir.convenience.replace_all_uses_with(old, new)


def substitute(old: ir.Node, new: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Puts ``new`` where ``old`` stands; ``outputs[i]`` takes over ``old.outputs[i]``; dead nodes go later."""
    graph = old.graph
    assert graph is not None
    graph.insert_before(old, new)
    for before, after in zip(old.outputs, outputs, strict=True):
        replace_value(before, after)
    if not any(output.uses() or output.is_graph_output() for output in old.outputs):
        graph.remove(old, safe=True)


def remove_dead(model: ir.Model) -> None:
    """Drops nodes and initializers that nothing reads."""
    common.RemoveUnusedNodesPass()(model)
