"""Rows of the proof about the lowered graph and its witness, the canonical graph that came from the trace.

The architecture holds each layer's attention; what it does not hold is read from the canonical graph: norms with their
epsilon and axis, rotations with their order and width, activations, sums and products with weights. The lowering
leaves their numbers as they are, or changes them in the ways that are written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from accel.builder.proof_table import ProofRow, row
from accel.builder.source import GraphSource, read_graph
from accel.spec import ArchSpec

# Operator -> its attributes that count, with ONNX's defaults.
_KEPT: dict[str, dict[str, Any]] = {
    "LayerNormalization": {"axis": -1, "epsilon": 1e-5},
    "RMSNormalization": {"axis": -1, "epsilon": 1e-5},
    "RotaryEmbedding": {"interleaved": 0, "rotary_embedding_dim": 0},
    "Gelu": {"approximate": b"none"},
    "Softmax": {"axis": -1},
    "Swish": {"alpha": 1.0},
    **{op: {} for op in ("Sigmoid", "Tanh", "Relu", "Erf", "Exp", "Log", "Pow", "Sqrt", "Softplus", "Reciprocal")},
}


def lowering_rows(source: GraphSource, canonical: Path, arch: ArchSpec) -> Iterator[ProofRow]:
    """The lowered graph beside its canonical one.

    Raises:
        EngineBuildError: The canonical graph cannot be read.
    """
    capped = sum(layer.softcap is not None for layer in arch.layers)
    expected = _counts(read_graph(canonical).graph.node)
    # A layer with a softcap is written out: Tanh, Softmax and two products.
    for name in ("Tanh", "Softmax axis -1"):
        expected[name] += capped
    expected["products with weights"] += 2 * capped
    found = _counts(source.proto.graph.node)
    for name in sorted({*expected, *found}):
        yield row(None, "", f"{name}, as traced", expected[name], found[name])


def _counts(nodes: Iterable[Any]) -> Counter[str]:
    from onnx import helper

    counts: Counter[str] = Counter()
    for node in nodes:
        op, attributes = node.op_type, {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if op in _KEPT and not node.domain:
            asked = [f"{name} {_said(attributes.get(name, usual))}" for name, usual in _KEPT[op].items()]
            counts[" ".join([op, *asked])] += 1
        linear = op == "Linear" and node.domain == "accel"
        counts["products with weights"] += linear or op in ("Gemm", "MatMul")
        biased = (linear or op == "Gemm") and len(node.input) > 2  # the sum of a Linear's bias may stand by itself
        counts["sums"] += op == "Add" or biased
    return counts


def _said(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    return f"{np.float32(value):.6g}" if isinstance(value, float) else str(value)


__all__ = ["lowering_rows"]
