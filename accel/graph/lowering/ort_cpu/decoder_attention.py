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

import onnx_ir as ir

from accel.graph.checks import attention_nodes
from accel.graph.edit import replace_value
from accel.graph.lowering.grouped_query import (
    as_rows,
    drop_unread_positions,
    find_operands,
    group_query_attention,
    require_head_sizes,
    width_of,
)
from accel.graph.lowering.rotary_tables import RotaryTables
from accel.spec import ArchSpec

_QUERY_SEQLENS = 16  # index of the last input


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
    require_head_sizes(arch, "ort-cpu")
    inputs = _add_step_inputs(graph)
    tables = RotaryTables(model, max_positions)
    packed = rotary = 0
    for index, node in enumerate(attention_nodes(model, "accel", "CachedAttention")):
        was_packed, was_rotated = _lower_layer(graph, node, index, inputs, tables)
        packed, rotary = packed + was_packed, rotary + was_rotated
    for name in ("past_lengths", "query_lengths"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    drop_unread_positions(model)
    return packed, rotary


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


def _lower_layer(
    graph: ir.Graph, node: ir.Node, index: int, inputs: _StepInputs, tables: RotaryTables
) -> tuple[bool, bool]:
    parts, rotation = find_operands(graph, node, index, tables)
    padded = [_pad(graph, node, part, inputs.pad_index) for part in parts]
    lengths = [inputs.seqlens_k, inputs.total_length]
    attention = group_query_attention(node, index, padded, lengths, rotation)
    attention.resize_inputs(_QUERY_SEQLENS + 1)
    attention.replace_input_with(_QUERY_SEQLENS, inputs.query_seqlens)
    graph.insert_before(node, attention)
    output = _unpad(graph, node, attention.outputs[0], inputs.unpad_index)
    for before, after in zip(node.outputs, (output, *attention.outputs[1:]), strict=True):
        replace_value(before, after)
    graph.remove(node, safe=True)
    return len(parts) == 1, rotation is not None


def _pad(graph: ir.Graph, before: ir.Node, value: ir.Value, pad_index: ir.Value) -> ir.Value:
    """[.., T, W] -> [B, S, W]."""
    rows = as_rows(graph, before, value)
    gather = ir.node("Gather", [rows, pad_index], {"axis": 0})
    gather.outputs[0].type = value.type
    gather.outputs[0].shape = ir.Shape(["B", "S", width_of(value)])
    graph.insert_before(before, gather)
    return gather.outputs[0]


def _unpad(graph: ir.Graph, before: ir.Node, value: ir.Value, unpad_index: ir.Value) -> ir.Value:
    """[B, S, W] -> [T, W]."""
    rows = as_rows(graph, before, value)
    gather = ir.node("Gather", [rows, unpad_index], {"axis": 0})
    gather.outputs[0].type = value.type
    gather.outputs[0].shape = ir.Shape(["T", width_of(value)])
    graph.insert_before(before, gather)
    return gather.outputs[0]
