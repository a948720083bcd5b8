"""Rows of the proof about the numbers of a layer, as the graph holds them: its scale and its softcap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from accel.builder.proof_table import ProofRow, row
from accel.builder.source import GraphSource
from accel.spec import AttentionSpec

# What a constant loses when it is stored: half a unit in the last place, relative.
_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class Number:
    """A scalar constant of the graph."""

    name: str
    value: float
    dtype: str


def number_row(index: int, node: str, check: str, expected: float, found: Number | None) -> ProofRow:
    """Whether a constant is the model's number, in its type."""
    close = found is not None and abs(found.value - expected) <= _ROUNDING.get(found.dtype, 0.0) * abs(expected)
    return ProofRow(index, node, check, f"{expected:.6g}", "none" if found is None else f"{found.value:.6g}", close)


def scale_of(source: GraphSource, index: int) -> Number | None:
    """The constant that layer ``index`` multiplies its query by; None: there is no such product."""
    return _factor(source, source.nodes.get(f"layers.{index}.scale"), "Mul")


def capped_rows(source: GraphSource, index: int, layer: AttentionSpec) -> Iterator[ProofRow]:
    """A written-out layer: softmax over ``softcap * tanh(scores / softcap)``, the scores of the scaled query.

    The chain is read upwards from the layer's last product, casts and changes of shape left out.
    """
    name, cap = f"layers.{index}.attention", layer.softcap
    assert cap is not None
    softmax = _above(source, source.nodes.get(name), "MatMul", 0)
    where = _above(source, softmax, "Softmax", 0)
    outer = _above(source, where, "Where", 1)
    tanh = _above(source, outer, "Mul", 0)
    inner = _above(source, tanh, "Tanh", 0)
    product = _above(source, inner, "Div", 0)
    scale = _above(source, product, "MatMul", 0)
    found = [node.op_type if node is not None else "none" for node in (softmax, where, outer, tanh, inner, product)]
    yield row(index, name, "softcap chain", ["Softmax", "Where", "Mul", "Tanh", "Div", "MatMul"], found)
    yield number_row(index, name, "softcap", cap, _factor(source, outer, "Mul"))
    yield number_row(index, name, "softcap within", cap, _factor(source, inner, "Div"))
    yield row(index, name, "scaled query", f"layers.{index}.scale", "none" if scale is None else scale.name)
    yield number_row(index, f"layers.{index}.scale", "scale of the model", layer.scale, scale_of(source, index))


def _above(source: GraphSource, node: Any, op: str, place: int) -> Any:
    """The node that makes an operand of a node of this operator; None where there is none."""
    if node is None or node.op_type != op:
        return None
    made = source.maker(node.input[place])
    while made is not None and made.op_type == "Reshape":
        made = source.maker(made.input[0])
    return made


def _factor(source: GraphSource, node: Any, op: str) -> Number | None:
    """The one constant of a product or quotient, a scalar."""
    if node is None or node.op_type != op:
        return None
    constants = [name for name in node.input if source.is_constant(name)]
    value = source.constant(constants[0]) if len(constants) == 1 else None
    if value is None or value.size != 1 or (op == "Div" and constants[0] != node.input[1]):
        return None
    return Number(constants[0], float(value.astype(np.float32).ravel()[0]), value.dtype.name)


__all__ = ["Number", "capped_rows", "number_row", "scale_of"]
