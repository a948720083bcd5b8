"""``accel::CachedAttention`` -> ``GroupQueryAttention`` over the in-place cache.

Dense layers see packed tokens [T, ...]; only around attention are rows padded to [B, S]
(one Gather in, one out). The kernel skips the padding, and ``query_seqlens`` (ONNX Runtime
1.32) lets prefill and decode rows share a step.

Per layer, where the graph allows:
    1. query, key and value from one projection (three merged, or one already) go in packed;
    2. their rotation by one pair of tables moves into the kernel.

Caches may be integers: the kernel quantises what it appends, and multiplies with what it reads back.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from accel.errors import InputError
from accel.graph.checks import attention_nodes
from accel.graph.edit import make_constant, replace_value
from accel.graph.lowering.grouped_query import (
    as_rows,
    drop_unread_positions,
    find_operands,
    group_query_attention,
    require_head_sizes,
    width_of,
)
from accel.graph.lowering.rotary_tables import RotaryTables
from accel.kv_quantization import KvQuantization
from accel.spec import ArchSpec

_KEY_SCALE, _VALUE_SCALE, _QUERY_SEQLENS = 12, 13, 16  # indices of inputs; the last is the last


@dataclass
class _StepInputs:
    """Graph inputs that replace past_lengths and query_lengths, see ``accel.engines.ort``."""

    pad_index: ir.Value  # int64 [B, S]
    unpad_index: ir.Value  # int64 [T]
    seqlens_k: ir.Value  # int32 [B]
    total_length: ir.Value  # int32 []
    query_seqlens: ir.Value  # int32 [B]


def lower_cached_attention(
    model: ir.Model, arch: ArchSpec, max_positions: int, kv: KvQuantization | None = None
) -> tuple[int, int]:
    """Lowers every attention node in place; returns how many took packed QKV and how many took the rotation.

    Args:
        model: Canonical; ``past`` and ``present`` of every layer become integers where ``kv`` is given.
        arch: The model's.
        max_positions: Rows of the rotary tables.
        kv: Scales of the caches; None: they stay float32.

    Raises:
        FusionError: A head size that the kernel refuses.
        InputError: ``kv`` does not fit the model, or holds floats.
    """
    graph = model.graph
    require_head_sizes(arch, "ort-cpu")
    if kv is not None:
        kv.check(arch)
        if kv.float8:
            raise InputError("ONNX Runtime has no caches of 8-bit floats", where="kv", remedy="Take kv8 or kv4")
    inputs = _add_step_inputs(graph)
    tables = RotaryTables(model, max_positions)
    packed = rotary = 0
    for index, node in enumerate(attention_nodes(model, "accel", "CachedAttention")):
        was_packed, was_rotated = _lower_layer(graph, node, index, inputs, tables, kv)
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
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    inputs: _StepInputs,
    tables: RotaryTables,
    kv: KvQuantization | None,
) -> tuple[bool, bool]:
    parts, rotation = find_operands(graph, node, index, tables)
    padded = [_pad(graph, node, part, inputs.pad_index) for part in parts]
    lengths = [inputs.seqlens_k, inputs.total_length]
    attention = group_query_attention(node, index, padded, lengths, rotation)
    attention.resize_inputs(_QUERY_SEQLENS + 1)
    attention.replace_input_with(_QUERY_SEQLENS, inputs.query_seqlens)
    if kv is not None:
        _quantize_cache(graph, attention, index, kv)
    graph.insert_before(node, attention)
    output = _unpad(graph, node, attention.outputs[0], inputs.unpad_index)
    for before, after in zip(node.outputs, (output, *attention.outputs[1:]), strict=True):
        replace_value(before, after)
    graph.remove(node, safe=True)
    return len(parts) == 1, rotation is not None


def _quantize_cache(graph: ir.Graph, attention: ir.Node, index: int, kv: KvQuantization) -> None:
    """The node's caches in integers: int8 [B, KV, C, D], or two int4 to a byte, uint8 [B, KV, C, D / 2].

    Channel 2i lies in a byte's lower half and 2i + 1 in its upper half, both plus 8. The kernel takes scales of one
    kind for keys and values, per channel [KV, D] or per tensor [1].
    """
    kind = "PER_CHANNEL" if kv.per_channel else "PER_TENSOR"
    attention.attributes["k_quant_type"] = ir.AttrString("k_quant_type", kind)
    attention.attributes["v_quant_type"] = ir.AttrString("v_quant_type", kind)
    attention.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", kv.bits)
    for position, part, scales in ((_KEY_SCALE, "key", kv.keys), (_VALUE_SCALE, "value", kv.values)):
        scale = make_constant(graph, f"layers.{index}.{part}_scale", scales[index])
        attention.replace_input_with(position, scale)
    dtype = ir.DataType.INT8 if kv.bits == 8 else ir.DataType.UINT8
    for value in (*attention.inputs[3:5], *attention.outputs[1:3]):
        assert value is not None and value.shape is not None
        *outer, head_dim = value.shape
        assert isinstance(head_dim, int)
        value.type, value.shape = ir.TensorType(dtype), ir.Shape([*outer, head_dim * kv.bits // 8])


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
