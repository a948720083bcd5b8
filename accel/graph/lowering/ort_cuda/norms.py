"""Residual sums and the norms behind them -> one kernel.

Case: ``norm(x + y)`` over the last axis, x and y of one shape -> ``SkipLayerNormalization`` or
``SkipSimplifiedLayerNormalization``, which also gives the sum to whoever else reads it. A bias that is added to x or y
just before (``x + (product + bias)``) goes in too. Refused: sums that broadcast, norms over other axes.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import last_dim, operands, producer, rank, sole_consumer

MICROSOFT = "com.microsoft"
_NORMS = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}
_LEAST_INPUTS = 2  # of a norm: value and scale


def fuse_skip_norms(model: ir.Model) -> int:
    """Rewrites in place; returns how many sums went into a norm."""
    count = 0
    for node in list(model.graph):
        if node.op_type == "Add" and not node.domain:
            norm = _norm_of(node)
            if norm is not None:
                _fuse(model.graph, node, norm)
                count += 1
    return count


def _norm_of(add: ir.Node) -> ir.Node | None:
    """The first norm that reads the sum, if it can take the sum in."""
    pair, total = operands(add, "Add"), add.outputs[0]
    if pair is None or total.is_graph_output() or not _same_shape(*pair):
        return None
    norms = [use.node for use in total.uses() if use.node.op_type in _NORMS and use.idx == 0 and not use.node.domain]
    norm = next(iter(norms), None)
    if norm is None or rank(total) not in (2, 3) or len(norm.inputs) < _LEAST_INPUTS:
        return None
    axis, width = norm.attributes.get_int("axis", -1), last_dim(total)
    whole = all(value is None or (value.is_initializer() and last_dim(value) == width) for value in norm.inputs[1:])
    return norm if whole and axis in (-1, rank(total) - 1) and len(_used(norm)) == 1 else None  # type: ignore[operator]


def _used(norm: ir.Node) -> list[ir.Value]:
    return [output for output in norm.outputs if output.uses() or output.is_graph_output()]


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Whether neither is broadcast: both computed, every dimension known to be the other's."""
    if first.is_initializer() or second.is_initializer() or first.shape is None or second.shape is None:
        return False
    known = all(isinstance(size, int) or size.value is not None for size in first.shape)
    return known and first.shape == second.shape


def _fuse(graph: ir.Graph, add: ir.Node, norm: ir.Node) -> None:
    first, second = operands(add, "Add")  # type: ignore[misc]
    first, second, bias = _take_bias(first, second)
    scale, *shift = norm.inputs[1:]
    inputs = [first, second, scale]
    if norm.op_type == "LayerNormalization":
        inputs.append(shift[0] if shift else None)
    if bias is not None:
        inputs.append(bias)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    total, normed = add.outputs[0], norm.outputs[0]
    others = [use for use in total.uses() if use.node is not norm]
    made = ir.node(_NORMS[norm.op_type], inputs, {"epsilon": epsilon}, domain=MICROSOFT, num_outputs=4 if others else 1)
    made.outputs[0].type, made.outputs[0].shape = normed.type, normed.shape
    graph.insert_before(add, made)
    if others:
        for unused in made.outputs[1:3]:  # mean and deviation, which inference does not compute
            unused.name = ""
        made.outputs[3].type, made.outputs[3].shape = total.type, total.shape
    _rewire(graph, norm, made.outputs[0])
    if others:
        ir.convenience.replace_all_uses_with(total, made.outputs[3])
    graph.remove(add, safe=True)


def _rewire(graph: ir.Graph, norm: ir.Node, normed: ir.Value) -> None:
    old = norm.outputs[0]
    if old.is_graph_output():
        normed.name, old.name = old.name, f"{old.name}_replaced"
    ir.convenience.replace_all_uses_with(old, normed, replace_graph_outputs=True)
    graph.remove(norm, safe=True)


def _take_bias(first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Both operands, and the bias that was added to one of them, now left out there."""
    for one, other in ((first, second), (second, first)):
        pair = operands(producer(one, "Add"), "Add")
        if pair is None or sole_consumer(one) is None:
            continue
        for value, bias in (pair, pair[::-1]):
            row = bias.is_initializer() and rank(bias) == 1 and last_dim(bias) == last_dim(value)
            if row and rank(value) == rank(one):
                return value, other, bias
    return first, second, None


__all__ = ["fuse_skip_norms"]
