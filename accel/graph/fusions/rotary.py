"""Rotary position embedding written out -> ``RotaryEmbedding`` (opset 23) on [B, S, H*D].

Case: ``x * cos + concat(-x[D/2:], x[:D/2]) * sin`` with x a transpose to [B, H, S, D] and
cos, sin unsqueezed over the heads, each from ``Concat(f, f)`` of half-width angles (Su et
al. 2021, in the half-split order of GPT-NeoX and Llama). A part of the head left unrotated
(``concat(rotated x[:R], x[R:])``) becomes the attribute ``rotary_embedding_dim``.
Refused: the interleaved order (GPT-J, Cohere), angles that are not two equal halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from accel.graph.edit import ints, make_constant, operands, producer, replace_value, scalar, sole_consumer

_HEADS_FIRST = (0, 2, 1, 3)


@dataclass
class _Rotation:
    node: ir.Node  # the last node of the pattern
    source: ir.Value  # [B, S, H, D]
    cos: ir.Value  # [B or 1, S, R] both halves
    sin: ir.Value
    dim: int  # R, the rotated part of the head


def fuse_rotary(model: ir.Model) -> int:
    """Rewrites in place; returns how many tensors' rotations were found (two per layer: query and key)."""
    count = 0
    for node in list(model.graph):
        rotation = _match(node) if node.op_type == "Add" else None
        if rotation is not None and _rewrite(model.graph, rotation):
            count += 1
    return count


def _match(add: ir.Node) -> _Rotation | None:
    pair = operands(add, "Add")
    if pair is None:
        return None
    for straight, turned in (pair, pair[::-1]):
        found = _match_products(straight, turned)
        if found is None:
            continue
        x, cos, sin = found
        width = x.shape[-1] if x.shape is not None else None
        if not isinstance(width, int):
            return None
        source, last = _whole_head(x, add)
        transpose = producer(source, "Transpose")
        if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != _HEADS_FIRST:
            return None
        heads_last = transpose.inputs[0]
        assert heads_last is not None
        return _Rotation(last, heads_last, cos, sin, width)
    return None


def _match_products(straight: ir.Value, turned: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(x, cos, sin) from x * cos and rotate_half(x) * sin."""
    left, right = operands(producer(straight, "Mul"), "Mul"), operands(producer(turned, "Mul"), "Mul")
    if left is None or right is None:
        return None
    for x, cos in (left, left[::-1]):
        for half, sin in (right, right[::-1]):
            if _is_half_turn_of(half, x):
                plain_cos, plain_sin = _over_heads(cos), _over_heads(sin)
                if plain_cos is not None and plain_sin is not None:
                    return x, plain_cos, plain_sin
    return None


def _over_heads(value: ir.Value) -> ir.Value | None:
    node = producer(value, "Unsqueeze")
    return node.inputs[0] if node is not None and ints(node.inputs[1]) == [1] else None


def _is_half_turn_of(value: ir.Value, x: ir.Value) -> bool:
    concat = producer(value, "Concat")
    if concat is None or not _joins_columns(concat) or x.shape is None:
        return False
    negated = producer(concat.inputs[0], "Neg")
    width = x.shape[-1]
    if negated is None or not isinstance(width, int):
        return False
    upper, lower = column_range(negated.inputs[0]), column_range(concat.inputs[1])
    return upper == (x, width // 2, width) and lower == (x, 0, width // 2)


def _joins_columns(concat: ir.Node) -> bool:
    """Whether it puts two values side by side, along the last axis."""
    shape = concat.outputs[0].shape
    last = -1 if shape is None else len(shape) - 1
    return len(concat.inputs) == 2 and concat.attributes["axis"].as_int() in (-1, last)


def column_range(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(source, start, stop) if the value is a slice, or an output of a split, over the source's last axis."""
    node = producer(value, "Slice", "Split")
    source = node.inputs[0] if node is not None else None
    if node is None or value is None or source is None or source.shape is None:
        return None
    width, last = source.shape[-1], len(source.shape) - 1
    if not isinstance(width, int):
        return None
    if node.op_type == "Split":
        if node.attributes.get_int("axis", 0) not in (-1, last):
            return None
        sizes = [output.shape[-1] if output.shape is not None else None for output in node.outputs]
        if not all(isinstance(size, int) for size in sizes):
            return None
        index = value.index()
        assert index is not None
        start = sum(sizes[:index])  # type: ignore[arg-type]
        return source, start, start + sizes[index]  # type: ignore[operator]
    starts, stops, axes = (ints(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2, 3))
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if starts is None or stops is None or axes is None or len(axes) != 1 or axes[0] not in (-1, last) or steps != [1]:
        return None
    start, stop = (max(0, bound + width if bound < 0 else min(bound, width)) for bound in (starts[0], stops[0]))
    return source, start, stop


def _whole_head(x: ir.Value, add: ir.Node) -> tuple[ir.Value, ir.Node]:
    """Widens a rotation of x = head[:R] to the whole head when the rest is concatenated back unchanged."""
    part = column_range(x)
    concat = sole_consumer(add.outputs[0], "Concat")
    if part is None or concat is None or part[1] != 0 or concat.inputs[0] is not add.outputs[0]:
        return x, add
    head, _, stop = part
    rest = column_range(concat.inputs[1]) if _joins_columns(concat) else None
    width = head.shape[-1] if head.shape is not None else None
    return (head, concat) if rest == (head, stop, width) else (x, add)


def _rewrite(graph: ir.Graph, rotation: _Rotation) -> bool:
    shape = rotation.source.shape
    if shape is None or not isinstance(shape[2], int) or not isinstance(shape[3], int):
        return False
    halves = [_half(graph, value, rotation.node) for value in (rotation.cos, rotation.sin)]
    cos, sin = halves
    if cos is None or sin is None:
        return False
    heads, dim = shape[2], shape[3]
    batch = 1 if shape[0] == 1 else 0
    flat_shape = make_constant(graph, f"shape_{batch}_m1_{heads * dim}", np.array([batch, -1, heads * dim], np.int64))
    flat = ir.node("Reshape", [rotation.source, flat_shape])
    flat.outputs[0].shape = ir.Shape([shape[0], shape[1], heads * dim])
    new = [flat]
    if shape[0] != 1:  # the operator wants one row of angles per batch row
        (cos, sin), expand = _per_row(graph, rotation.source, (cos, sin))
        new.extend(expand)
    attributes = {"num_heads": heads}
    if rotation.dim != dim:
        attributes["rotary_embedding_dim"] = rotation.dim
    rotary = ir.node("RotaryEmbedding", [flat.outputs[0], cos, sin], attributes)
    rotary.outputs[0].shape = flat.outputs[0].shape
    back_shape = make_constant(graph, f"shape_{batch}_m1_{heads}_{dim}", np.array([batch, -1, heads, dim], np.int64))
    back = ir.node("Reshape", [rotary.outputs[0], back_shape])
    back.outputs[0].shape = shape
    heads_first = ir.node("Transpose", [back.outputs[0]], {"perm": _HEADS_FIRST})
    output = rotation.node.outputs[0]
    heads_first.outputs[0].shape = output.shape
    for made in (flat, rotary, back, heads_first):
        made.outputs[0].type = output.type
    graph.insert_before(rotation.node, [*new, rotary, back, heads_first])
    replace_value(output, heads_first.outputs[0])
    return True


def _half(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value | None:
    """The same angles' cosine or sine at half width: f(Concat(a, a)) * s -> f(a) * s; None when they differ."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Concat":
        first, second = node.inputs[0], node.inputs[-1]
        return first if _joins_columns(node) and first is second else None
    if node.op_type == "Mul" and scalar(node.inputs[1]) is not None:
        inner, extra = _half(graph, node.inputs[0], before), [node.inputs[1]]  # type: ignore[arg-type]
    elif node.op_type in ("Cos", "Sin", "Cast"):
        inner, extra = _half(graph, node.inputs[0], before), []  # type: ignore[arg-type]
    else:
        return None
    if inner is None:
        return None
    copy = ir.node(node.op_type, [inner, *extra], dict(node.attributes))
    copy.outputs[0].type = value.type
    if value.shape is not None and isinstance(value.shape[-1], int):
        copy.outputs[0].shape = ir.Shape([*value.shape[:-1], value.shape[-1] // 2])
    graph.insert_before(before, copy)
    return copy.outputs[0]


def _per_row(
    graph: ir.Graph, like: ir.Value, tables: tuple[ir.Value, ir.Value]
) -> tuple[tuple[ir.Value, ir.Value], list[ir.Node]]:
    """Expands [1, S, R/2] tables to the batch of ``like``."""
    # Read from a graph input of the same batch, so that all layers share one expansion.
    batch = like.shape[0] if like.shape is not None else None
    same = [value for value in graph.inputs if value.shape is not None and value.shape[0] == batch]
    rows = ir.node("Shape", [same[0] if same else like], {"start": 0, "end": 1})
    ones = make_constant(graph, "ones_2", np.array([1, 1], np.int64))
    shape = ir.node("Concat", [rows.outputs[0], ones], {"axis": 0})
    expanded = [ir.node("Expand", [table, shape.outputs[0]]) for table in tables]
    for table, node in zip(tables, expanded, strict=True):
        node.outputs[0].type = table.type
        if table.shape is not None and like.shape is not None:
            node.outputs[0].shape = ir.Shape([like.shape[0], *table.shape[1:]])
    return (expanded[0].outputs[0], expanded[1].outputs[0]), [rows, shape, *expanded]
