"""Caches that are rounded spelled out on a canonical graph: keys and values rounded before attention sees them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.checks import CANONICAL, attention_nodes
from accel.graph.edit import last_dim, make_constant
from accel.kv_quantization import KvQuantization

_KEY, _VALUE = 1, 2  # inputs of accel::CachedAttention


def spell_cache(model: ir.Model, kv: KvQuantization) -> int:
    """Puts in front of every layer's attention what a rounded cache does to keys and values; returns how many layers.

    The caches stay float32 and hold what the rounded numbers stand for: that is the graph to compare an engine's with.
    The same happens there, to each token once, before its own query or a later one reads it.

    Args:
        model: Canonical; rewritten in place.
        kv: Scales of its layers.

    Raises:
        FusionError: A key or value that is no row of all heads.
    """
    nodes = attention_nodes(model, *CANONICAL["decoder"])
    for index, node in enumerate(nodes):
        heads = node.attributes["kv_num_heads"].as_int()
        for place, part, scales in ((_KEY, "key", kv.keys), (_VALUE, "value", kv.values)):
            value = node.inputs[place]
            width = last_dim(value) if value is not None else None
            if value is None or width is None or (kv.per_channel and width != scales[index].size):
                raise FusionError(f"{part}s are {value}, no rows of {heads} heads", where=f"layer {index}")
            name = f"layers.{index}.{part}"
            node.replace_input_with(place, _round(model.graph, node, value, name, scales[index], kv))
    return len(nodes)


def _round(
    graph: ir.Graph, before: ir.Node, value: ir.Value, name: str, scales: np.ndarray, kv: KvQuantization
) -> ir.Value:
    """clip(round(value / scale)) * scale; halves go to the even neighbour."""
    lowest, highest = kv.range
    scale = make_constant(graph, f"{name}_scale_row", scales.reshape(-1))
    one, least, most = (
        make_constant(graph, f"{kv.kind}_{end}", np.array(limit, np.float32))
        for end, limit in (("unit", 1), ("lowest", lowest), ("highest", highest))
    )
    rounded: tuple[tuple[str, ir.Value | None], ...] = (("Round", None), ("Max", least), ("Min", most))
    if kv.float8:
        rounded = ("QuantizeLinear", one), ("DequantizeLinear", one)
    made = value
    for op, operand in (("Div", scale), *rounded, ("Mul", scale)):
        attributes = {"output_dtype": ir.DataType.FLOAT8E4M3FN} if op == "QuantizeLinear" else {}
        node = ir.node(op, [made] if operand is None else [made, operand], attributes)
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph.insert_before(before, node)
        made = node.outputs[0]
    return made


__all__ = ["spell_cache"]
