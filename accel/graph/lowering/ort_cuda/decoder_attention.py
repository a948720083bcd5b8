"""``accel::CachedAttention`` -> ``GroupQueryAttention`` over the in-place cache, rows padded to [B, S].

The kernel of onnxruntime-gpu knows no ``query_seqlens``: all rows of a run bring as many tokens, and more than one
only when the row is alone or their caches are empty. The dense layers see the B * S tokens flat. Around the kernel
they take the shape ``step_shape``, an input [B, S, -1] that lies on the host: a Reshape costs nothing, and nothing
computes a shape, so that a run consists of kernels alone and can be captured.
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


@dataclass
class _StepInputs:
    """Graph inputs that replace past_lengths and query_lengths."""

    step_shape: ir.Value  # int64 [3]: B, S, -1
    seqlens_k: ir.Value  # int32 [B], each row's tokens after the run, less one
    total_length: ir.Value  # int32 [], the most tokens of a row after the run


def lower_cached_attention(model: ir.Model, arch: ArchSpec, max_positions: int) -> dict[str, int]:
    """Lowers every attention node in place; returns how many, and how many took packed QKV and the rotation.

    Raises:
        FusionError: A head size that the kernel refuses.
    """
    graph = model.graph
    require_head_sizes(arch, "ort-cuda")
    inputs = _add_step_inputs(graph)
    tables = RotaryTables(model, max_positions)
    packed = rotated = 0
    nodes = attention_nodes(model, "accel", "CachedAttention")
    for index, node in enumerate(nodes):
        was_packed, was_rotated = _lower_layer(graph, node, index, inputs, tables)
        packed, rotated = packed + was_packed, rotated + was_rotated
    for name in ("past_lengths", "query_lengths"):
        graph.inputs.remove(next(value for value in graph.inputs if value.name == name))
    drop_unread_positions(model)
    return {"GroupQueryAttention": len(nodes), "packed_qkv": packed, "rotary_in_attention": rotated}


def _add_step_inputs(graph: ir.Graph) -> _StepInputs:
    specs: dict[str, tuple[ir.DataType, tuple[str | int, ...]]] = {
        "step_shape": (ir.DataType.INT64, (3,)),
        "seqlens_k": (ir.DataType.INT32, ("B",)),
        "total_length": (ir.DataType.INT32, ()),
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
    padded = [_pad(graph, node, part, inputs.step_shape) for part in parts]
    attention = group_query_attention(node, index, padded, [inputs.seqlens_k, inputs.total_length], rotation)
    graph.insert_before(node, attention)
    output = as_rows(graph, node, attention.outputs[0])
    output.shape = ir.Shape(["T", width_of(attention.outputs[0])])
    for before, after in zip(node.outputs, (output, *attention.outputs[1:]), strict=True):
        replace_value(before, after)
    graph.remove(node, safe=True)
    return len(parts) == 1, rotation is not None


def _pad(graph: ir.Graph, before: ir.Node, value: ir.Value, step_shape: ir.Value) -> ir.Value:
    """[.., T, W], or split into heads, -> [B, S, W]."""
    made = ir.node("Reshape", [value, step_shape])
    made.outputs[0].type, made.outputs[0].shape = value.type, ir.Shape(["B", "S", width_of(value)])
    graph.insert_before(before, made)
    return made.outputs[0]


__all__ = ["lower_cached_attention"]
