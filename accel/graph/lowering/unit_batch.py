"""A decoder's unit batch dimension away: packed tokens have no batch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.graph.edit import ints, make_constant, rank

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
    "Linear",
    "GatedLinear",
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
            node.replace_input_with(1, make_constant(graph, name, np.array(target, np.int64)))
        elif role == "gather_rows":
            node.attributes["axis"] = ir.AttrInt64("axis", 0)
        elif role == "last_axis" and node.op_type == "Slice":
            node.replace_input_with(3, make_constant(graph, "axes_m1", np.array([-1], np.int64)))
        elif role == "last_axis":
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        if role != "keep":
            for output in node.outputs:
                _drop_first(output)
    return 1


def _drop_first(value: ir.Value) -> None:
    if value.shape is not None and len(value.shape) >= 3 and value.shape[0] == 1:
        value.shape = ir.Shape(value.shape[1:])


def _role(node: ir.Node) -> str | None:
    """What dropping the batch means for this node; None: not understood."""
    batched = [v for v in (*node.inputs, *node.outputs) if v is not None and _is_batched(v)]
    if node.op_type == "Unsqueeze":
        return "unsqueeze" if ints(node.inputs[1]) == [0] else ("keep" if not batched else None)
    if node.op_type == "Squeeze":
        logits = ints(node.inputs[1]) == [0] and node.outputs[0].name == "logits"
        return "squeeze" if logits else ("keep" if not batched else None)
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
    if target is None:  # a computed shape: what it says does not depend on the batch
        return None if _is_batched(node.outputs[0]) else "keep"
    if not _is_batched(node.outputs[0]):
        return "keep" if -1 in target and 0 not in target else None
    return "reshape" if target[0] == 1 and 0 not in target else None


def _last_axis_role(node: ir.Node) -> str | None:
    last = len(node.inputs[0].shape or ()) - 1 if node.inputs[0] is not None else -1
    if node.op_type == "Slice":
        axes = ints(node.inputs[3]) if len(node.inputs) > 3 else None
        return "last_axis" if axes in ([-1], [last]) else None
    return "last_axis" if node.attributes.get_int("axis", 0) in (-1, last) else None
