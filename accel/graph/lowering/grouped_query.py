"""``GroupQueryAttention`` of ONNX Runtime, for the targets that have it: packed QKV, rotation in the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.edit import make_constant, producer, through_reshapes
from accel.graph.fusions.rotary import column_range
from accel.graph.lowering.packed import merge_linears
from accel.graph.lowering.rotary_tables import RotaryTables
from accel.spec import ArchSpec

Tables = tuple[ir.Value, ir.Value]
_ROTATED_STEP = 16  # the kernel rotates heads, and parts of heads, of whole multiples of this only


def require_head_sizes(arch: ArchSpec, target: str) -> None:
    """Refuses heads that the kernel does not take.

    Raises:
        FusionError: A head size is not a multiple of 8; names the layer.
    """
    for index, layer in enumerate(arch.layers):
        if layer.head_dim % 8:
            raise FusionError(
                f"head size {layer.head_dim} is not a multiple of 8, which GroupQueryAttention needs",
                where=f"layer {index}, {target}",
            )


def find_operands(
    graph: ir.Graph, node: ir.Node, index: int, tables: RotaryTables
) -> tuple[list[ir.Value], Tables | None]:
    """What the kernel takes instead of a layer's query, key and value.

    Returns:
        One value that holds all three side by side, or the three; and the tables of the rotation that the kernel does
        itself, None: it does none.
    """
    query, key, value = (through_reshapes(item) for item in node.inputs[:3])
    rotations = [producer(item, "RotaryEmbedding") for item in (query, key)]
    folded = None
    if _kernel_rotates(node, rotations):
        folded = tables.fold(rotations[0])  # type: ignore[arg-type]
        if folded is not None:
            query, key = (through_reshapes(rotation.inputs[0]) for rotation in rotations)  # type: ignore[union-attr]
    whole = _one_projection(graph, node, (query, key, value), f"layers.{index}.qkv")
    return ([query, key, value] if whole is None else [whole]), folded


def group_query_attention(
    node: ir.Node, index: int, qkv: Sequence[ir.Value], lengths: Sequence[ir.Value], tables: Tables | None
) -> ir.Node:
    """The kernel's node for a canonical one, which stays.

    Args:
        node: ``accel::CachedAttention``.
        index: Of the layer.
        qkv: As ``find_operands`` chose them, [B, S, W] each.
        lengths: ``seqlens_k`` int32 [B] and ``total_sequence_length`` int32 [].
        tables: Of the rotation; None: there is none, or it is done already.
    """
    cache = node.inputs[3]
    attributes: dict[str, int | float] = {
        "num_heads": node.attributes["num_heads"].as_int(),
        "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
        "scale": node.attributes["scale"].as_float(),
        "do_rotary": int(tables is not None),
    }
    if "window" in node.attributes:  # both count the query itself
        attributes["local_window_size"] = node.attributes["window"].as_int()
    if "softcap" in node.attributes:
        attributes["softcap"] = node.attributes["softcap"].as_float()
    packed: list[ir.Value | None] = [*qkv, *[None] * (3 - len(qkv))]
    made = ir.node(
        "GroupQueryAttention",
        [*packed, cache, node.inputs[4], *lengths, *(tables or ())],
        attributes,
        domain="com.microsoft",
        num_outputs=3,
        name=f"layers.{index}.attention",
    )
    for mine, theirs in zip(made.outputs[1:], node.outputs[1:], strict=True):
        mine.type, mine.shape = theirs.type, theirs.shape
    padded = made.outputs[0]
    width = attributes["num_heads"] * cache.shape[3]  # type: ignore[union-attr, index, operator]
    padded.type, padded.shape = node.outputs[0].type, ir.Shape(["B", "S", width])
    return made


def drop_unread_positions(model: ir.Model) -> None:
    """Position ids stay an input only where something besides the folded rotation reads them."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if value.name == "position_ids" and not value.uses():
            model.graph.inputs.remove(value)


def width_of(value: ir.Value) -> int:
    """Columns of one token's row: every static dimension but a leading unit batch."""
    assert value.shape is not None
    sizes = [size for size in value.shape if isinstance(size, int)]
    return int(np.prod(sizes))


def as_rows(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """The value as [tokens, columns]."""
    if value.shape is not None and len(value.shape) == 2:
        return value
    width = width_of(value)
    shape = make_constant(graph, f"shape_m1_{width}", np.array([-1, width], np.int64))
    rows = ir.node("Reshape", [value, shape])
    rows.outputs[0].type, rows.outputs[0].shape = value.type, ir.Shape([None, width])
    graph.insert_before(before, rows)
    return rows.outputs[0]


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


__all__ = [
    "as_rows",
    "drop_unread_positions",
    "find_operands",
    "group_query_attention",
    "require_head_sizes",
    "width_of",
]
