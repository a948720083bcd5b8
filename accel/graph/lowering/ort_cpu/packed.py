"""Packing: three projections into one, and a decoder's unit batch dimension away."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from accel.graph.edit import ints, make_constant, producer, rank
from accel.spec import PARTS, ROWS


def merge_linears(graph: ir.Graph, before: ir.Node, outputs: Sequence[ir.Value], name: str) -> ir.Value | None:
    """One ``accel::Linear`` over the same input that computes all outputs side by side.

    Returns None unless all come from transposed linears of one input, all with or all without bias.
    """
    linears = [producer(value, "Linear") for value in outputs]
    first = linears[0]
    if first is None or any(node is None or node.inputs[0] is not first.inputs[0] for node in linears):
        return None
    nodes = [node for node in linears if node is not None]
    if any(node.attributes.get_int("transposed", 0) != 1 or len(node.inputs) != len(first.inputs) for node in nodes):
        return None
    merged = [
        merge_rows(graph, [node.inputs[i] for node in nodes], f"{name}.{kind}")  # type: ignore[misc]
        for i, kind in enumerate(("weight", "bias"), start=1)
        if len(first.inputs) > i
    ]
    made = ir.node("Linear", [first.inputs[0], *merged], {"transposed": 1}, domain="accel")
    output, like = made.outputs[0], first.outputs[0]
    output.type = like.type
    if like.shape is not None:
        output.shape = ir.Shape([*like.shape[:-1], merged[0].shape[0]])  # type: ignore[index]
    graph.insert_before(before, made)
    return output


def merge_rows(graph: ir.Graph, values: Sequence[ir.Value], name: str) -> ir.Value:
    """An initializer that stands for the row-wise concatenation; the weight writer lays the parts side by side."""
    if name in graph.initializers:
        return graph.initializers[name]
    shapes = [value.shape for value in values]
    assert all(shape is not None for shape in shapes)
    rows = sum(shape[0] for shape in shapes)  # type: ignore[index, misc]
    merged = ir.Value(name=name, type=values[0].type, shape=ir.Shape([rows, *shapes[0][1:]]))  # type: ignore[index]
    merged.metadata_props[PARTS] = "\n".join(value.name or "" for value in values)
    tensors = [value.const_value for value in values]
    assert all(tensor is not None for tensor in tensors)
    merged.const_value = ir.LazyTensor(
        lambda: ir.tensor(_concatenate(tensors)),
        dtype=tensors[0].dtype,
        shape=merged.shape,
        name=name,  # type: ignore[union-attr]
    )
    graph.register_initializer(merged)
    return merged


def rows_of(graph: ir.Graph, value: ir.Value, start: int, stop: int) -> ir.Value:
    """An initializer that stands for a range of another's rows: the same bytes of the weight file."""
    name = f"{value.name}.rows_{start}_{stop}"
    if name in graph.initializers:
        return graph.initializers[name]
    assert value.shape is not None and value.const_value is not None
    tensor = value.const_value
    part = ir.Value(name=name, type=value.type, shape=ir.Shape([stop - start, *value.shape[1:]]))
    part.metadata_props[ROWS] = f"{value.name}\n{start}\n{stop}"
    part.const_value = ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy()[start:stop]), dtype=tensor.dtype, shape=part.shape, name=name
    )
    graph.register_initializer(part)
    return part


def _concatenate(tensors: Sequence[ir.TensorProtocol | None]):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.concatenate([tensor.numpy() for tensor in tensors if tensor is not None])


# Ops that treat every row of [1, T, W] alike: without the unit batch they do the same on [T, W].
_ROW_WISE = {
    "Add",
    "Mul",
    "Sub",
    "Div",
    "Tanh",
    "Sigmoid",
    "Gelu",
    "Cast",
    "FusedMatMul",
    "MatMul",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "RMSNormalization",
    "BiasGelu",
    "FastGelu",
    "QuickGelu",
    "Relu",
    "Neg",
}


def drop_unit_batch(model: ir.Model) -> int:
    """[1, T, W] -> [T, W] between the embedding and the logits; returns 1 if it applied.

    Applies only when every node on the way is understood; otherwise the graph stays as it is,
    which costs a few reshapes per layer.
    """
    graph = model.graph
    plan = [(node, _role(node)) for node in graph]
    if any(role is None for _, role in plan):
        return 0
    for node, role in plan:
        if role == "unsqueeze" or role == "squeeze":
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0], replace_graph_outputs=True)  # type: ignore[arg-type]
            if role == "squeeze":
                node.inputs[0].name = "logits"  # type: ignore[union-attr]
        elif role == "reshape":
            target = (ints(node.inputs[1]) or [])[1:]
            name = "shape_" + "_".join(str(size).replace("-", "m") for size in target)
            node.replace_input_with(1, make_constant(graph, name, _array(target)))
        elif role == "gather_rows":
            node.attributes["axis"] = ir.AttrInt64("axis", 0)
        elif role == "last_axis":
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        if role != "keep":
            for output in node.outputs:
                _drop_first(output)
    return 1


def _array(values: list[int]):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.array(values, np.int64)


def _drop_first(value: ir.Value) -> None:
    if value.shape is not None and len(value.shape) >= 3 and value.shape[0] == 1:
        value.shape = ir.Shape(value.shape[1:])


def _role(node: ir.Node) -> str | None:
    """What dropping the batch means for this node; None: not understood."""
    batched = [v for v in (*node.inputs, *node.outputs) if v is not None and _is_batched(v)]
    if node.op_type == "Unsqueeze":
        return "unsqueeze" if ints(node.inputs[1]) == [0] else ("keep" if not batched else None)
    if node.op_type == "Squeeze":
        return "squeeze" if ints(node.inputs[1]) == [0] and node.outputs[0].name == "logits" else None
    if not batched:
        return "keep"
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0)
        return "row_wise" if axis == 0 else ("gather_rows" if axis == 1 else None)
    if node.op_type == "Reshape":
        return _reshape_role(node)
    if node.op_type in ("Split", "Concat", "Slice"):
        return _last_axis_role(node)
    return "row_wise" if node.op_type in _ROW_WISE and _keeps_rows(node) else None


def _keeps_rows(node: ir.Node) -> bool:
    """No operand would bring the batch back, and no axis is counted from the front."""
    flat = all(_is_batched(value) or rank(value) in (0, 1, 2) for value in node.inputs if value is not None)
    return flat and node.attributes.get_int("axis", -1) == -1


def _is_batched(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) >= 3 and value.shape[0] == 1 and not value.is_initializer()


def _reshape_role(node: ir.Node) -> str | None:
    target = ints(node.inputs[1])
    if target is None:
        return None
    if not _is_batched(node.outputs[0]):
        return "keep" if -1 in target and 0 not in target else None
    return "reshape" if target[0] == 1 and 0 not in target else None


def _last_axis_role(node: ir.Node) -> str | None:
    last = len(node.inputs[0].shape or ()) - 1 if node.inputs[0] is not None else -1
    if node.op_type == "Slice":
        return "row_wise" if len(node.inputs) > 3 and ints(node.inputs[3]) == [-1] else None
    return "last_axis" if node.attributes.get_int("axis", 0) in (-1, last) else None
