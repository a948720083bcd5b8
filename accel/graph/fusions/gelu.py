"""The tanh form of GELU written out -> ``Gelu(approximate="tanh")`` (opset 20).

Case: ``0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))`` in any order of its factors
(Hendrycks & Gimpel 2016). The erf form arrives from torch as one node already. The two are
kept apart: they differ by up to 5e-4.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from accel.graph.edit import operands, producer, scalar, substitute

_ROOT = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def fuse_gelu_tanh(model: ir.Model) -> int:
    """Rewrites in place; returns how many were found."""
    return sum(_fuse(node) for node in list(model.graph) if node.op_type == "Mul")


def _fuse(node: ir.Node) -> bool:
    for half_x, one_plus in (node.inputs, node.inputs[::-1]):
        x = _scaled(half_x, 0.5)
        tanh = producer(_shifted(one_plus, 1.0), "Tanh")
        if x is None or tanh is None or not _is_inner(_scaled(tanh.inputs[0], _ROOT), x):
            continue
        fused = ir.node("Gelu", [x], {"approximate": "tanh"})
        fused.outputs[0].name = node.outputs[0].name
        substitute(node, [fused], [fused.outputs[0]])
        return True
    return False


def _is_inner(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether value is x + 0.044715 * x^3."""
    pair = operands(producer(value, "Add"), "Add")
    if pair is None:
        return False
    for first, cubic in (pair, pair[::-1]):
        power = operands(producer(_scaled(cubic, _CUBIC), "Pow"), "Pow")
        if first is x and power is not None and power[0] is x and scalar(power[1]) == 3.0:
            return True
    return False


def _scaled(value: ir.Value | None, factor: float) -> ir.Value | None:
    """v if value is v * factor."""
    return _with_constant(value, "Mul", factor)


def _shifted(value: ir.Value | None, term: float) -> ir.Value | None:
    """v if value is v + term."""
    return _with_constant(value, "Add", term)


def _with_constant(value: ir.Value | None, op_type: str, wanted: float) -> ir.Value | None:
    pair = operands(producer(value, op_type), op_type)
    if pair is None:
        return None
    for other, number in (pair, pair[::-1]):
        found = scalar(number)
        if found is not None and math.isclose(found, wanted, rel_tol=1e-6):
            return other
    return None
