"""Indexing as torch traces it -> the plain ONNX op.

Cases:
    1. ``x[:, positions]``: Transpose, GatherND, Transpose -> ``Gather(axis=1)``.
    2. ``x.view(..., n, h, d)[..., i, :, :]`` of a packed projection: Reshape, Slice, Squeeze
       -> a column ``Slice`` of the projection and a ``Reshape`` to [..., h, d].
    3. ``x * 1.0`` -> x.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.graph.edit import ints, make_constant, producer, rank, replace_value, scalar, sole_consumer, substitute


def simplify_indexing(model: ir.Model) -> int:
    """Rewrites in place; returns how many places changed."""
    rewrites = {"GatherND": _gather_rows, "Squeeze": _select_columns, "Mul": _drop_unit_factor}
    return sum(rewrites[node.op_type](model.graph, node) for node in list(model.graph) if node.op_type in rewrites)


def _gather_rows(graph: ir.Graph, node: ir.Node) -> bool:
    before, after = producer(node.inputs[0], "Transpose"), sole_consumer(node.outputs[0], "Transpose")
    index = producer(node.inputs[1], "Unsqueeze")
    if before is None or after is None or index is None or node.attributes.get_int("batch_dims", 0) != 0:
        return False
    perms = [tuple(part.attributes.get_ints("perm", ())) for part in (before, after)]
    positions = index.inputs[0]
    if perms != [(1, 0, 2), (1, 0, 2)] or positions is None or rank(positions) != 1 or ints(index.inputs[1]) != [-1]:
        return False
    gather = ir.node("Gather", [before.inputs[0], positions], {"axis": 1})
    gather.outputs[0].name = after.outputs[0].name
    substitute(after, [gather], [gather.outputs[0]])
    return True


def _select_columns(graph: ir.Graph, node: ir.Node) -> bool:
    cut = producer(node.inputs[0], "Slice")
    view = producer(cut.inputs[0], "Reshape") if cut is not None else None
    if cut is None or view is None or view.inputs[0] is None or view.inputs[0].shape is None:
        return False
    source, shape = view.inputs[0], view.outputs[0].shape
    starts, stops, axes = (ints(value) for value in cut.inputs[1:4])
    removed = ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or len(shape) != len(source.shape) + 2 or axes != [-3] or removed != [-3]:  # type: ignore[arg-type]
        return False
    parts, heads, dim = shape[-3:]
    if not all(isinstance(size, int) for size in (parts, heads, dim)) or starts is None or stops is None:
        return False
    if stops[0] - starts[0] != 1 or source.shape[-1] != parts * heads * dim:  # type: ignore[operator]
        return False
    width = heads * dim  # type: ignore[operator]
    bounds = [
        make_constant(graph, f"int_{value}".replace("-", "m"), np.array([value], np.int64))
        for value in (starts[0] * width, stops[0] * width, -1)
    ]
    columns = ir.node("Slice", [source, *bounds])
    columns.outputs[0].shape = ir.Shape([*source.shape[:-1], width])
    target = make_constant(graph, f"shape_0_0_{heads}_{dim}", np.array([0, 0, heads, dim], np.int64))
    heads_view = ir.node("Reshape", [columns.outputs[0], target])
    for made in (columns, heads_view):
        made.outputs[0].type = source.type
    substitute(node, [columns, heads_view], [heads_view.outputs[0]])
    return True


def _drop_unit_factor(graph: ir.Graph, node: ir.Node) -> bool:
    for x, factor in (node.inputs, node.inputs[::-1]):
        small = factor is not None and rank(factor) == 0 and scalar(factor) == 1.0
        if x is not None and small and not node.outputs[0].is_graph_output():
            replace_value(node.outputs[0], x)
            return True
    return False
