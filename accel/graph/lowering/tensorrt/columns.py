"""Slices that cut a tensor into columns -> one Split.

TensorRT's parser makes more shape arithmetic of a Slice than of a Split: three layers of phi3 had 182 elementwise
layers with slices, and 56 with splits.

Case: two or more Slice nodes over one value, along its last axis, with constant bounds and steps of 1, that cover it
whole without overlap. Refused: anything else, and values that have other readers of the same columns.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.graph.edit import ints, last_dim, make_constant, replace_value

_Cut = tuple[int, int, ir.Node]  # first column, behind the last, node


def split_columns(model: ir.Model) -> int:
    """Rewrites in place; returns how many tensors were split."""
    graph, count = model.graph, 0
    by_source: dict[ir.Value, list[_Cut]] = {}
    for node in graph:
        source = node.inputs[0] if node.op_type == "Slice" else None
        bounds = None if source is None else _bounds(node, source)
        if source is not None and bounds is not None:
            by_source.setdefault(source, []).append((*bounds, node))
    for source, cuts in by_source.items():
        cuts.sort(key=lambda cut: cut[0])
        if len(cuts) > 1 and _covers(cuts, last_dim(source)):
            _split(graph, source, cuts)
            count += 1
    return count


def _bounds(node: ir.Node, source: ir.Value) -> tuple[int, int] | None:
    width, rank = last_dim(source), len(source.shape or ())
    starts, ends = ints(node.inputs[1]), ints(node.inputs[2])
    axes = ints(node.inputs[3]) if len(node.inputs) > 3 else None
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if width is None or axes not in ([-1], [rank - 1]) or steps != [1] or starts is None or ends is None:
        return None
    start, stop, _ = slice(starts[0], ends[0]).indices(width)
    return start, stop


def _covers(cuts: list[_Cut], width: int | None) -> bool:
    edges = [0, *(stop for _, stop, _ in cuts)]
    return [start for start, _, _ in cuts] == edges[:-1] and edges[-1] == width and edges == sorted(set(edges))


def _split(graph: ir.Graph, source: ir.Value, cuts: list[_Cut]) -> None:
    sizes = [stop - start for start, stop, _ in cuts]
    name = "sizes_" + "_".join(map(str, sizes))
    split = ir.node(
        "Split", [source, make_constant(graph, name, np.array(sizes, np.int64))], {"axis": -1}, num_outputs=len(cuts)
    )
    maker = source.producer()
    if maker is not None:
        graph.insert_after(maker, split)
    else:
        graph.insert_before(graph[0], split)
    for (_, _, node), output in zip(cuts, split.outputs, strict=True):
        output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
        replace_value(node.outputs[0], output)
        graph.remove(node, safe=True)


__all__ = ["split_columns"]
