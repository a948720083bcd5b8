"""Root-mean-square norm written out -> ``RMSNormalization`` (opset 23).

Case: ``Mul(scale, Mul(x, r))`` in either order with ``r = Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2), -1), eps)))``,
scale a vector over the last axis. Formula: Zhang & Sennrich 2019, y = x / sqrt(mean(x^2) + eps) * scale.
A transpose that leaves the last axis in place moves below the norm, where it can meet its inverse.
Refused: other axes, a mean that does not keep its axis, a scale that is not a vector, no scale.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import ints, operands, producer, rank, scalar, split_operand, substitute


def fuse_rms_norm(model: ir.Model) -> int:
    """Rewrites in place; returns how many norms were found."""
    found = sum(_fuse(node) for node in list(model.graph) if node.op_type == "Mul")
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            _lift_above_transpose(node)
    return found


def _lift_above_transpose(norm: ir.Node) -> None:
    """norm(transpose(x)) -> transpose(norm(x))."""
    transpose = producer(norm.inputs[0], "Transpose")
    if transpose is None or norm.outputs[0].is_graph_output():
        return
    perm = transpose.attributes.get_ints("perm", ())
    source = transpose.inputs[0]
    if not perm or perm[-1] != len(perm) - 1 or source is None:
        return
    if norm.attributes.get_int("axis", -1) not in (-1, len(perm) - 1):  # it normalises over axes that move
        return
    lifted = ir.node("RMSNormalization", [source, norm.inputs[1]], dict(norm.attributes))
    lifted.outputs[0].shape, lifted.outputs[0].type = source.shape, source.type
    moved = ir.node("Transpose", [lifted.outputs[0]], {"perm": perm})
    substitute(norm, [lifted, moved], [moved.outputs[0]])


def _fuse(node: ir.Node) -> bool:
    for scale, normalized in (node.inputs, node.inputs[::-1]):
        inner = producer(normalized, "Mul")
        if scale is None or inner is None or rank(scale) != 1 or not _is_parameter(scale):
            continue
        found = _normalized(inner)
        if found is None:
            continue
        x, epsilon = found
        fused = ir.node("RMSNormalization", [x, scale], {"axis": -1, "epsilon": epsilon})
        fused.outputs[0].name = node.outputs[0].name
        fused.outputs[0].shape, fused.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        substitute(node, [fused], [fused.outputs[0]])
        return True
    return False


def _is_parameter(scale: ir.Value) -> bool:
    """The scale must not depend on x; gemma's ``1 + weight`` is folded by now, or still one Add of initializers."""
    if scale.is_initializer():
        return True
    node = scale.producer()
    return node is not None and all(value is not None and value.is_initializer() for value in node.inputs)


def _normalized(inner: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, epsilon) if the node computes x / sqrt(mean(x^2) + eps)."""
    for x in inner.inputs:
        assert x is not None
        root = split_operand(inner, "Mul", x)
        reciprocal = producer(root, "Reciprocal")
        sqrt = producer(reciprocal.inputs[0], "Sqrt") if reciprocal is not None else None
        added = operands(producer(sqrt.inputs[0], "Add"), "Add") if sqrt is not None else None
        if added is None:
            continue
        for mean_value, epsilon_value in (added, added[::-1]):
            epsilon, mean = scalar(epsilon_value), producer(mean_value, "ReduceMean")
            if epsilon is not None and mean is not None and _mean_of_squares(mean, x):
                return x, epsilon
    return None


def _mean_of_squares(mean: ir.Node, x: ir.Value) -> bool:
    if mean.attributes.get_int("keepdims", 1) != 1:
        return False
    axes = ints(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes is None or len(axes) != 1 or axes[0] not in (-1, (rank(x) or 0) - 1):
        return False
    power = operands(producer(mean.inputs[0], "Pow"), "Pow")
    if power is not None:
        return power[0] is x and scalar(power[1]) == 2.0
    square = operands(producer(mean.inputs[0], "Mul"), "Mul")
    return square is not None and square[0] is x and square[1] is x
