from __future__ import annotations

import math

import numpy as np
import pytest

from accel.graph.fusions.gelu import fuse_gelu_tanh
from tests.graph.small import apply, body, make, normal, ops

X = normal(3, 16) * 2
NUMBERS = {
    "half": np.float32(0.5),
    "one": np.float32(1),
    "three": np.float32(3),
    "cubic": np.float32(0.044715),
    "root": np.float32(math.sqrt(2 / math.pi)),
}
STEPS = {
    "cube": "Pow (x, three)",
    "scaled": "Mul (cube, cubic)",
    "sum": "Add (x, scaled)",
    "inner": "Mul (sum, root)",
    "t": "Tanh (inner)",
    "plus": "Add (t, one)",
    "halved": "Mul (x, half)",
    "y": "Mul (halved, plus)",
}


def gelu(**changes: str) -> str:
    scalars = ", ".join(f"float {name}" for name in NUMBERS)
    return f"main (float[N,16] x, float[N,16] other, {scalars}) => (float[N,16] y) " + body({**STEPS, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scaled": "Mul (cubic, cube)", "sum": "Add (scaled, x)", "inner": "Mul (root, sum)"},
        {"plus": "Add (one, t)", "halved": "Mul (half, x)", "y": "Mul (plus, halved)"},
    ],
)
def test_fused(changes: dict[str, str]) -> None:
    model = make(gelu(**changes), **NUMBERS)
    assert apply(fuse_gelu_tanh, model, x=X, other=X) == 1
    (node,) = model.graph
    assert node.op_type == "Gelu" and node.attributes["approximate"].as_string() == "tanh"


@pytest.mark.parametrize(
    "changes",
    [
        {"t": "Erf (inner)"},
        {"t": "Sigmoid (inner)"},
        {"plus": "Sub (t, one)"},
        {"halved": "Mul (other, half)"},
        {"sum": "Add (other, scaled)"},
        {"cube": "Pow (other, three)"},
        {"sum": "Sub (x, scaled)"},
    ],
    ids=["erf", "sigmoid", "minus one", "half of another", "sum with another", "cube of another", "difference"],
)
def test_other_formulas_are_refused(changes: dict[str, str]) -> None:
    model = make(gelu(**changes), **NUMBERS)
    assert apply(fuse_gelu_tanh, model, x=X, other=normal(3, 16, seed=1)) == 0


@pytest.mark.parametrize(
    "name,value", [("half", 0.51), ("one", 1.01), ("three", 2.0), ("cubic", 0.0447), ("root", 0.8)]
)
def test_other_numbers_are_refused(name: str, value: float) -> None:
    assert apply(fuse_gelu_tanh, make(gelu(), **{**NUMBERS, name: np.float32(value)}), x=X, other=X) == 0


def test_erf_form_stays_what_it_is() -> None:
    model = make("main (float[N,16] x) => (float[N,16] y) { y = Gelu (x) }")
    assert apply(fuse_gelu_tanh, model, x=X) == 0
    assert ops(model) == ["Gelu"] and model.graph[0].attributes.get_string("approximate", "none") == "none"
