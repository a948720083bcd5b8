"""Rows of the proof about one layer: its attention and its two cache updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from accel.builder.network import NetworkView
from accel.builder.number_proof import capped_rows, number_row, scale_of
from accel.builder.proof_table import ProofRow, row
from accel.builder.repair import attention_name
from accel.builder.source import GraphSource
from accel.spec import AttentionSpec


def attention_rows(
    view: NetworkView, source: GraphSource, index: int, layer: AttentionSpec, dtype: str | None
) -> Iterator[ProofRow]:
    """Whether layer ``index`` attends once, as its node says; a layer with a softcap is written out instead."""
    name = f"layers.{index}.attention"
    node = source.nodes.get(name)
    found = [item for item in view.of_type("ATTENTION_INPUT") if attention_name(item) == name]
    if layer.softcap is not None:
        products = sum(item.type.name == "MATRIX_MULTIPLY" for item in view.of_node(name))
        yield row(index, name, "attention", "written out (softcap)", _written_out(len(found), products))
        yield from capped_rows(source, index, layer)
        return
    ends = sum(item.type.name == "ATTENTION_OUTPUT" for item in view.of_node(name))
    yield row(index, name, "attention", "1 fused", f"{len(found)} fused" if ends == len(found) else "a torn pair")
    yield row(index, name, "attention node", "Attention, scale = 1.0", _asked(node))
    if node is None or len(found) != 1:
        return
    heads = [view.shape(found[0].get_input(place))[1::2] for place in range(3)]  # of [B, H, S, D]
    sizes = [(count, layer.head_dim) for count in (layer.heads, layer.kv_heads, layer.kv_heads)]
    yield row(index, name, "heads and their size", sizes, heads)
    yield from _kernel_rows(view, index, name, node, found[0])
    yield from _scale_rows(view, source, index, layer, found[0], dtype)


def _written_out(fused: int, products: int) -> str:
    return "written out (softcap)" if fused == 0 and products == 1 else f"{fused} fused, {products} products"


def _asked(node: Any) -> str:
    """All that a node asks for beyond query, key, value and mask. The parser drops some of it without a word."""
    if node is None:
        return "no node of that name"
    from onnx import helper

    kind = f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)
    asked = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    parts = [f"{name} = {value}" for name, value in sorted(asked.items())]
    parts += [f"input {place} = {name}" for place, name in enumerate(node.input) if place > 3 and name]
    parts += [f"output {place} = {name}" for place, name in enumerate(node.output) if place > 0 and name]
    return ", ".join([kind, *parts])


def _kernel_rows(view: NetworkView, index: int, name: str, node: Any, layer: Any) -> Iterator[ProofRow]:
    """The attention itself: operands as in the graph, its mask, and no causality or lengths of its own."""
    attention, flavour = layer.attention, view.flavour
    for place, operand in enumerate(("query", "key", "value")):
        yield row(index, name, operand, _name_in(node, place), getattr(layer.get_input(place), "name", None))
    mask = attention.mask
    yield row(index, name, "mask", _name_in(node, 3) or "a mask", None if mask is None else mask.name)
    if mask is not None:
        needed = "position_ids" if "position_ids" in view.inputs else "attention_mask"
        read = view.reads(mask)
        yield ProofRow(index, name, "mask made from", needed, "+".join(sorted(read)), needed in read)
    yield row(index, name, "causality", "none", flavour.causal_kind(attention))
    lengths = [None if tensor is None else tensor.name for tensor in flavour.lengths(attention)]
    yield row(index, name, "lengths", [None, None], lengths)
    yield row(index, name, "normalization", "SOFTMAX", attention.norm_op.name)
    wide = view.dtype(layer.get_input(0)) == "float32"
    yield row(index, name, "decomposable", wide, bool(attention.decomposable))


def _name_in(node: Any, place: int) -> str | None:
    return str(node.input[place]) if place < len(node.input) and node.input[place] else None


def _scale_rows(
    view: NetworkView, source: GraphSource, index: int, layer: AttentionSpec, inlet: Any, dtype: str | None
) -> Iterator[ProofRow]:
    """The query is a product with the constant of the graph's scale node, which is the model's scale in its type."""
    name, scale = f"layers.{index}.scale", scale_of(source, index)
    if scale is None:
        yield row(index, name, "scale node", "Mul by a constant", "none")
        return
    found = [view.dtype(inlet.get_input(place)) for place in range(3)]
    yield row(index, f"layers.{index}.attention", "query, key, value dtype", [dtype or scale.dtype] * 3, found)
    yield number_row(index, name, "scale of the model", layer.scale, scale)
    product = _product_by(view, inlet, scale.name, scale.value)
    yield row(index, name, "scale", f"{scale.value:.6g} ({scale.name})", product)


def _product_by(view: NetworkView, inlet: Any, constant: str, value: float) -> str:
    """What the query is multiplied by, in the words of the expectation."""
    product = view.producer(inlet.get_input(0))
    if product is None or product.type.name != "ELEMENTWISE" or product.op.name != "PROD":
        return "no product"
    for tensor in view.operands(product):
        if (found := view.constant(tensor)) is not None:
            name, weights = found
            # bfloat16 constants cannot be read back; the parser names them after their initializer.
            number = value if weights is None and name == constant else np.nan
            if weights is not None and weights.size == 1:
                number = float(weights.astype(np.float32).ravel()[0])
            return f"{number:.6g} ({constant if np.isclose(number, value, rtol=1e-6) else name})"
    return "a product without a constant"


def cache_rows(view: NetworkView, source: GraphSource, index: int) -> Iterator[ProofRow]:
    """The two updates in place: cache = network input, result = network output, at ``write_index``."""
    for part in ("key", "value"):
        name = f"layers.{index}.{part}_update"
        found = [item for item in view.of_node(name) if item.type.name == "KV_CACHE_UPDATE"]
        yield row(index, name, f"{part} update", "1 in place", f"{len(found)} in place")
        if len(found) != 1:
            continue
        past, present = f"past.{index}.{part}", f"present.{index}.{part}"
        layer = found[0]
        cache, result, place = layer.get_input(0), layer.get_output(0), view.origin(layer.get_input(2))
        yield row(index, name, f"{part} cache", past, cache.name if cache.name in view.inputs else "no input")
        yield row(index, name, f"{part} result", present, result.name if result.name in view.outputs else "no output")
        yield row(index, name, f"{part} written at", "write_index", place.name if place is not None else None)
        yield row(index, name, f"{part} cache mode", "LINEAR", layer.cache_mode.name)
        yield row(index, name, f"{part} cache dtype", view.dtype(cache), view.dtype(layer.get_input(1)))
        inlets = [
            item for item in view.of_type("ATTENTION_INPUT") if attention_name(item) == f"layers.{index}.attention"
        ]
        for inlet in inlets:  # a written-out layer has none; its products are nodes of the graph
            operand = inlet.get_input(1 if part == "key" else 2)
            maker = view.producer(operand)
            straight = maker is not None and operand.name == result.name
            yield row(index, name, f"{part} attended", "straight from the cache", _way(straight, maker))


def _way(straight: bool, maker: Any) -> str:
    return "straight from the cache" if straight else f"through {maker.type.name if maker is not None else 'an input'}"


__all__ = ["attention_rows", "cache_rows"]
