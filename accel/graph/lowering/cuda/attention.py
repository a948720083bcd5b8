"""Attention nodes with what their kernels take in: the projections side by side, and the rotation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from accel.errors import InputError
from accel.graph.checks import attention_nodes
from accel.graph.edit import make_constant, producer, replace_value, through_reshapes
from accel.graph.fusions.rotary import column_range
from accel.graph.lowering.fused_linear import DOMAIN, join_linears
from accel.graph.lowering.rotary_tables import RotaryTables
from accel.kv_quantization import KvQuantization
from accel.spec import ArchSpec

BITS = 8  # of integers in a cache


def lower_cached_attention(
    model: ir.Model, arch: ArchSpec, max_positions: int, dtype: ir.DataType, kv: KvQuantization | None = None
) -> dict[str, int]:
    """Rewrites a decoder's attention in place; returns how many nodes there were, packed and rotating ones.

    Args:
        dtype: What the engine computes in.
        kv: Scales of the caches, whose inputs and outputs become int8 or 8-bit floats; None: they stay as they are.

    Raises:
        InputError: ``kv`` does not fit the model, or its caches are not of a kind that the kernels have.
    """
    if kv is not None:
        kv.check(arch)
        require_cache(kv)
    tables = RotaryTables(model, max_positions)
    nodes = attention_nodes(model, "accel", "CachedAttention")
    packed = rotating = 0
    for index, (node, layer) in enumerate(zip(nodes, arch.layers, strict=True)):
        parts = [through_reshapes(value) for value in node.inputs[:3]]
        folded = _fold_rotation(tables, parts, layer.head_dim)
        if folded is not None:
            parts = [through_reshapes(producer(part, "RotaryEmbedding").inputs[0]) for part in parts[:2]] + parts[2:]  # type: ignore[union-attr]
        operands, whole = _pack(model.graph, node, parts)
        rows = [_as_rows(model.graph, node, value) if value is not None else None for value in operands]
        tables_of_it = folded or (() if kv is None else (None, None))
        scales = () if kv is None else _scales(model.graph, index, (layer.kv_heads, layer.head_dim), kv)
        made = _replace(node, [*rows, *node.inputs[3:7], *tables_of_it, *scales], f"layers.{index}.attention")
        made.attributes["head_dim"] = ir.AttrInt64("head_dim", layer.head_dim)
        if kv is not None:
            _narrow(made, dtype, ir.DataType.FLOAT8E4M3FN if kv.float8 else ir.DataType.INT8)
        packed, rotating = packed + whole, rotating + (folded is not None)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    counts = {"CachedAttention": len(nodes), "packed_qkv": packed, "rotary_in_attention": rotating}
    return counts | ({} if kv is None else {f"{kv.kind}_cache": len(nodes)})


def require_cache(kv: KvQuantization) -> None:
    """Refuses caches that the kernels do not have.

    Raises:
        InputError: Integers of another width.
    """
    if kv.bits != BITS:
        what = f"the cuda engine's caches are floats or int{BITS}, not int{kv.bits}"
        raise InputError(what, where="kv.bits", remedy=f"Take +kv{BITS}")


def _scales(graph: ir.Graph, index: int, shape: tuple[int, int], kv: KvQuantization) -> tuple[ir.Value, ...]:
    """Of a layer's keys and values, [KV, D] each: one that a whole tensor shares stands in every place."""
    pairs = (("key", kv.keys[index]), ("value", kv.values[index]))
    return tuple(
        make_constant(graph, f"layers.{index}.{part}_scales", np.broadcast_to(scales, shape).astype(np.float32))
        for part, scales in pairs
    )


def _narrow(node: ir.Node, dtype: ir.DataType, cache: ir.DataType) -> None:
    """Its caches in 8 bits; what it computes in is told, for they no longer tell it."""
    node.attributes["dtype"] = ir.AttrInt64("dtype", dtype)
    for value in (*node.inputs[3:5], *node.outputs[1:3]):
        assert value is not None
        value.type = ir.TensorType(cache)


def lower_attention(model: ir.Model) -> dict[str, int]:
    """Rewrites an encoder's attention in place; returns how many nodes there were, and packed ones."""
    nodes = attention_nodes(model, "accel", "Attention")
    packed = 0
    for index, node in enumerate(nodes):
        operands, whole = _pack(model.graph, node, [value for value in node.inputs[:3] if value is not None])
        _replace(node, [*operands, *node.inputs[3:]], f"layers.{index}.attention")
        packed += whole
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return {"Attention": len(nodes), "packed_qkv": packed}


def _replace(node: ir.Node, inputs: Sequence[ir.Value | None], name: str) -> ir.Node:
    made = ir.node(
        node.op_type, list(inputs), dict(node.attributes), domain=DOMAIN, num_outputs=len(node.outputs), name=name
    )
    assert node.graph is not None
    node.graph.insert_before(node, made)
    for mine, theirs in zip(made.outputs, node.outputs, strict=True):
        mine.type, mine.shape = theirs.type, theirs.shape
        replace_value(theirs, mine)
    node.graph.remove(node, safe=True)
    return made


def _fold_rotation(tables: RotaryTables, parts: list[ir.Value], head_dim: int) -> tuple[ir.Value, ir.Value] | None:
    """The tables, if queries and keys turn whole heads by halves and by the same angles."""
    rotations = [producer(part, "RotaryEmbedding") for part in parts[:2]]
    query, key = rotations
    if query is None or key is None or query.inputs[1:3] != key.inputs[1:3] or len(query.inputs) > 3:
        return None
    for rotation in (query, key):
        partial = rotation.attributes.get_int("rotary_embedding_dim", 0) not in (0, head_dim)
        if partial or rotation.attributes.get_int("interleaved", 0):
            return None
    return tables.fold(query)


def _pack(graph: ir.Graph, before: ir.Node, parts: list[ir.Value]) -> tuple[list[ir.Value | None], bool]:
    """Query, key and value as one tensor where they come from one input, or lie in one tensor already."""
    ranges = [column_range(part) for part in parts]
    if all(ranges) and len({id(found[0]) for found in ranges if found}) == 1:
        source = ranges[0][0]  # type: ignore[index]
        edges = [0, *(found[2] for found in ranges if found)]
        width = source.shape[-1] if source.shape is not None else None
        if [found[1] for found in ranges if found] == edges[:-1] and edges[-1] == width:
            return [through_reshapes(source), None, None], True
    joined = join_linears(graph, before, parts)
    return ([joined, None, None], True) if joined is not None else (list(parts), False)


def _as_rows(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """[.., T, H, D] -> [T, H * D]."""
    assert value.shape is not None
    width = int(np.prod([size for size in value.shape if isinstance(size, int)]))
    if len(value.shape) == 2 and value.shape[-1] == width:
        return value
    shape = make_constant(graph, f"shape_m1_{width}", np.array([-1, width], np.int64))
    rows = ir.node("Reshape", [value, shape])
    rows.outputs[0].type, rows.outputs[0].shape = value.type, ir.Shape(["T", width])
    graph.insert_before(before, rows)
    return rows.outputs[0]
