"""``accel::CachedAttention`` -> ``GroupQueryAttention`` over the in-place cache.

Dense layers see packed tokens [T, ...]; only around attention are rows padded to [B, S]
(one Gather in, one out). The kernel skips the padding, and ``query_seqlens`` (ONNX Runtime
1.32) lets prefill and decode rows share a step.

Per layer, where the graph allows:
    1. query, key and value from one projection (three merged, or one already) go in packed;
    2. their rotation by one pair of tables moves into the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.checks import attention_nodes
from accel.graph.edit import make_constant, producer, replace_value, through_reshapes
from accel.graph.fusions.rotary import column_range
from accel.graph.lowering.ort_cpu.packed import merge_linears
from accel.graph.lowering.rotary_tables import RotaryTables
from accel.spec import ArchSpec

_QUERY_SEQLENS = 16  # index of the last input
_ROTATED_STEP = 16  # the kernel rotates heads, and parts of heads, of whole multiples of this only


@dataclass
class _StepInputs:
    """Graph inputs that replace past_lengths and query_lengths, see ``accel.engines.ort``."""

    pad_index: ir.Value  # int64 [B, S]
    unpad_index: ir.Value  # int64 [T]
    seqlens_k: ir.Value  # int32 [B]
    total_length: ir.Value  # int32 []
    query_seqlens: ir.Value  # int32 [B]


def lower_cached_attention(model: ir.Model, arch: ArchSpec, max_positions: int) -> tuple[int, int]:
    """Lowers every attention node in place; returns how many took packed QKV and how many took the rotation."""
    graph = model.graph
    _require_head_sizes(arch)
    inputs = _add_step_inputs(graph)
    tables = RotaryTables(model, max_positions)
    packed = rotary = 0
    for index, node in enumerate(attention_nodes(model, "accel", "CachedAttention")):
        was_packed, was_rotated = _lower_layer(graph, node, index, inputs, tables)
        packed, rotary = packed + was_packed, rotary + was_rotated
    for name in ("past_lengths", "query_lengths"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    _drop_unread_positions(model)
    return packed, rotary


def _require_head_sizes(arch: ArchSpec) -> None:
    for index, layer in enumerate(arch.layers):
        if layer.head_dim % 8:
            raise FusionError(
                f"head size {layer.head_dim} is not a multiple of 8, which GroupQueryAttention needs",
                where=f"layer {index}, ort-cpu",
            )


def _add_step_inputs(graph: ir.Graph) -> _StepInputs:
    specs: dict[str, tuple[ir.DataType, tuple[str, ...]]] = {
        "pad_index": (ir.DataType.INT64, ("B", "S")),
        "unpad_index": (ir.DataType.INT64, ("T",)),
        "seqlens_k": (ir.DataType.INT32, ("B",)),
        "total_length": (ir.DataType.INT32, ()),
        "query_seqlens": (ir.DataType.INT32, ("B",)),
    }
    made = {
        name: ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for name, (dtype, shape) in specs.items()
    }
    position = next(i for i, value in enumerate(graph.inputs) if value.name == "past_lengths")
    for offset, value in enumerate(made.values()):
        graph.inputs.insert(position + offset, value)
    return _StepInputs(**made)


def _drop_unread_positions(model: ir.Model) -> None:
    """Position ids stay an input only where something besides the folded rotation reads them."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if value.name == "position_ids" and not value.uses():
            model.graph.inputs.remove(value)


def _lower_layer(
    graph: ir.Graph, node: ir.Node, index: int, inputs: _StepInputs, tables: RotaryTables
) -> tuple[bool, bool]:
    query, key, value = (through_reshapes(item) for item in node.inputs[:3])
    rotations = [producer(item, "RotaryEmbedding") for item in (query, key)]
    cos = sin = None
    if _kernel_rotates(node, rotations):
        folded = tables.fold(rotations[0])  # type: ignore[arg-type]
        if folded is not None:
            cos, sin = folded
            query, key = (through_reshapes(rotation.inputs[0]) for rotation in rotations)  # type: ignore[union-attr]
    whole = _one_projection(graph, node, (query, key, value), f"layers.{index}.qkv")
    parts = [whole] if whole is not None else [query, key, value]
    padded = [_pad(graph, node, part, inputs.pad_index) for part in parts]
    qkv: list[ir.Value | None] = [*padded, None, None] if whole is not None else list(padded)
    attention = _group_query_attention(node, index, qkv, inputs, cos, sin)
    graph.insert_before(node, attention)
    output = _unpad(graph, node, attention.outputs[0], inputs.unpad_index)
    for before, after in zip(node.outputs, (output, *attention.outputs[1:]), strict=True):
        replace_value(before, after)
    graph.remove(node, safe=True)
    return whole is not None, cos is not None


def _kernel_rotates(node: ir.Node, rotations: list[ir.Node | None]) -> bool:
    """Whether query and key turn by the same angles, in sizes that the kernel takes; else they turn before it."""
    query, key = rotations
    if query is None or key is None or query.inputs[1:3] != key.inputs[1:3]:
        return False
    if any(rotation.attributes.get_int("interleaved", 0) for rotation in (query, key)):
        return False
    head = node.inputs[3].shape[3]  # type: ignore[union-attr, index]
    parts = [rotation.attributes.get_int("rotary_embedding_dim", 0) for rotation in (query, key)]
    return parts[0] == parts[1] and all(size % _ROTATED_STEP == 0 for size in (head, parts[0]))  # type: ignore[operator]


def _group_query_attention(
    node: ir.Node,
    index: int,
    qkv: list[ir.Value | None],
    inputs: _StepInputs,
    cos: ir.Value | None,
    sin: ir.Value | None,
) -> ir.Node:
    attributes: dict[str, int | float] = {
        "num_heads": node.attributes["num_heads"].as_int(),
        "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
        "scale": node.attributes["scale"].as_float(),
        "do_rotary": int(cos is not None),
    }
    if "window" in node.attributes:  # both count the query itself
        attributes["local_window_size"] = node.attributes["window"].as_int()
    if "softcap" in node.attributes:
        attributes["softcap"] = node.attributes["softcap"].as_float()
    operands: list[ir.Value | None] = [
        *qkv,
        node.inputs[3],
        node.inputs[4],
        inputs.seqlens_k,
        inputs.total_length,
        cos,
        sin,
    ]
    operands += [None] * (_QUERY_SEQLENS - len(operands))
    made = ir.node(
        "GroupQueryAttention",
        [*operands, inputs.query_seqlens],
        attributes,
        domain="com.microsoft",
        num_outputs=3,
        name=f"layers.{index}.attention",
    )
    for mine, theirs in zip(made.outputs[1:], node.outputs[1:], strict=True):
        mine.type, mine.shape = theirs.type, theirs.shape
    padded = made.outputs[0]
    width = attributes["num_heads"] * node.inputs[3].shape[3]  # type: ignore[union-attr, index, operator]
    padded.type, padded.shape = node.outputs[0].type, ir.Shape(["B", "S", width])
    return made


def _one_projection(
    graph: ir.Graph, before: ir.Node, parts: tuple[ir.Value, ir.Value, ir.Value], name: str
) -> ir.Value | None:
    """One tensor that holds query, key and value side by side, made of three projections if need be."""
    ranges = [column_range(part) for part in parts]
    if all(ranges):
        source = ranges[0][0]  # type: ignore[index]
        bounds = [(found[1], found[2]) for found in ranges if found is not None and found[0] is source]
        width = source.shape[-1] if source.shape is not None else None
        # q | k | v next to each other, covering the whole width
        edges = [0, *(stop for _, stop in bounds)]
        covers = len(bounds) == 3 and [start for start, _ in bounds] == edges[:-1] and edges[-1] == width
        return through_reshapes(source) if covers else None
    return merge_linears(graph, before, parts, name)


def _pad(graph: ir.Graph, before: ir.Node, value: ir.Value, pad_index: ir.Value) -> ir.Value:
    """[.., T, W] -> [B, S, W]."""
    rows = _as_rows(graph, before, value)
    gather = ir.node("Gather", [rows, pad_index], {"axis": 0})
    gather.outputs[0].type = value.type
    gather.outputs[0].shape = ir.Shape(["B", "S", _width(value)])
    graph.insert_before(before, gather)
    return gather.outputs[0]


def _unpad(graph: ir.Graph, before: ir.Node, value: ir.Value, unpad_index: ir.Value) -> ir.Value:
    """[B, S, W] -> [T, W]."""
    rows = _as_rows(graph, before, value)
    gather = ir.node("Gather", [rows, unpad_index], {"axis": 0})
    gather.outputs[0].type = value.type
    gather.outputs[0].shape = ir.Shape(["T", _width(value)])
    graph.insert_before(before, gather)
    return gather.outputs[0]


def _width(value: ir.Value) -> int:
    """Columns of one token's row: every static dimension but a leading unit batch."""
    assert value.shape is not None
    sizes = [size for size in value.shape if isinstance(size, int)]
    return int(np.prod(sizes))


def _as_rows(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    if value.shape is not None and len(value.shape) == 2:
        return value
    width = _width(value)
    shape = make_constant(graph, f"shape_m1_{width}", np.array([-1, width], np.int64))
    rows = ir.node("Reshape", [value, shape])
    rows.outputs[0].type, rows.outputs[0].shape = value.type, ir.Shape([None, width])
    graph.insert_before(before, rows)
    return rows.outputs[0]
