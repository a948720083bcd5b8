"""Rows of the proof about few bits: which weights and inputs each product reads, and how they are rounded.

The node rows prove every QuantizeLinear and DequantizeLinear by itself, in the words below. The rows of this module
prove what they are there for: that a product's weight is a constant of the type that the graph stores, dequantised and
nothing else on the way, and that its input is rounded to the type that the graph says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accel.builder.network import NetworkView
from accel.builder.proof_table import ProofRow, row
from accel.builder.source import GraphSource

ROUNDINGS = {"QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE"}
_WEIGHT = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # which operand of a node may be a dequantised weight
_LAYERS = {"MATRIX_MULTIPLY": ("product", 1), "GATHER": ("look-up", 0)}


def quantized_rows(view: NetworkView, source: GraphSource) -> Iterator[ProofRow]:
    """A row for each kind of reader and type; none for graphs without rounding."""
    expected, found = _in_graph(source), _in_network(view)
    for what in sorted({*expected, *found}):
        yield row(None, "", what, expected[what], found[what])


def rounding_head(view: NetworkView, layer: Any) -> str:
    """A layer in words: what it makes of what, and along which axis its scales run."""
    x, scale = layer.get_input(0), layer.get_input(1)
    return _said(layer.type.name, view.dtype(x), view.dtype(layer.get_output(0)), view.shape(scale), layer.axis)


def rounding_line(
    op: str, operands: list[str], attributes: Mapping[str, Any], source: GraphSource, shape: Callable[[str], Any]
) -> str:
    """A node in the same words, without its operands.

    Args:
        operands: Values that it reads: data and scale. A zero point has no word: the row fails.
        shape: Of a value, by its name.
    """
    x, scale = operands[:2]
    wide, few = source.type_of(scale) or "?", source.type_of(x)
    if op == "QuantizeLinear":
        few = _output_type(attributes)
    elif few is None:
        maker = source.maker(x)
        few = "?" if maker is None or maker.op_type != "QuantizeLinear" else _output_type(_attributes(maker))
    types = (wide, few) if op == "QuantizeLinear" else (few, wide)
    return _said(ROUNDINGS[op], *types, shape(scale), int(attributes.get("axis", 1)) % len(shape(x)))


def _said(kind: str, before: str, after: str, scale: tuple[int, ...], axis: int) -> str:
    sizes = [size for size in scale if size != 1]
    return f"{kind} {before} to {after}" + (f" scales {list(scale)} axis {axis}" if sizes else "")


def _in_graph(source: GraphSource) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in source.needed():
        place = _WEIGHT.get(node.op_type)
        if place is None:
            continue
        kind = "look-up" if node.op_type == "Gather" else "product"
        stored = _stored_type(source, node.input[place])
        if stored is not None:
            counts[f"{kind}s with {stored} weights"] += 1
        made = source.maker(node.input[0]) if kind == "product" else None
        rounded = source.maker(made.input[0]) if made is not None and made.op_type == "DequantizeLinear" else None
        if rounded is not None and rounded.op_type == "QuantizeLinear":
            counts[f"products with {_output_type(_attributes(rounded))} inputs"] += 1
    return counts


def _stored_type(source: GraphSource, name: str) -> str | None:
    """The type of the initializer that a value is dequantised from, changes of shape left out."""
    node = source.maker(name)
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        node = source.maker(node.input[0])
    return source.type_of(node.input[0]) if node is not None and node.op_type == "DequantizeLinear" else None


def _output_type(attributes: Mapping[str, Any]) -> str:
    """Of a QuantizeLinear."""
    from onnx import TensorProto, helper

    return str(helper.tensor_dtype_to_np_dtype(attributes.get("output_dtype", TensorProto.UINT8)).name)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _in_network(view: NetworkView) -> Counter[str]:
    counts: Counter[str] = Counter()
    for layer in view.layers:
        kind, place = _LAYERS.get(layer.type.name, ("", 0))
        if not kind:
            continue
        weight = _behind(view, layer.get_input(place), "DEQUANTIZE", "CONSTANT")
        if weight is not None:
            counts[f"{kind}s with {view.dtype(weight)} weights"] += 1
        x = _behind(view, layer.get_input(0), "DEQUANTIZE", "QUANTIZE") if kind == "product" else None
        if x is not None:
            counts[f"products with {view.dtype(x)} inputs"] += 1
    return counts


def _behind(view: NetworkView, tensor: Any, last: str, before: str) -> Any:
    """What a layer of type ``last`` reads from one of type ``before``, where it makes the tensor; else None."""
    layer = view.producer(view.origin(tensor))
    if layer is None or layer.type.name != last:
        return None
    source = layer.get_input(0)
    maker = view.producer(source)
    return source if maker is not None and maker.type.name == before else None


__all__ = ["ROUNDINGS", "quantized_rows", "rounding_head", "rounding_line"]
