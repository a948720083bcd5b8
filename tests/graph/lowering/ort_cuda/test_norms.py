from __future__ import annotations

import pytest

from accel.graph.lowering.ort_cuda.norms import fuse_skip_norms
from tests.graph.small import apply, make, normal, ops

X, Y = normal(2, 3, 8), normal(2, 3, 8, seed=1)
WEIGHTS = {"g": normal(8) + 2, "c": normal(8, seed=2), "b": normal(8, seed=3)}
NORMS = {
    "LayerNormalization": "LayerNormalization <axis = -1, epsilon = 0.001> (s, g, c)",
    "RMSNormalization": "RMSNormalization <axis = -1, epsilon = 0.001> (s, g)",
}
FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}
INPUTS = "float[B,S,8] x, float[B,S,8] y, float[8] g, float[8] c, float[8] b"


def graph(norm: str, total: str = "s = Add (x, y)", after: str = "", outputs: str = "float[B,S,8] n") -> str:
    return f"main ({INPUTS}) => ({outputs}) {{\n {total}\n n = {norm}\n {after}\n}}"


@pytest.mark.parametrize("norm", NORMS)
def test_sum_and_norm(norm: str) -> None:
    model = make(graph(NORMS[norm]), **WEIGHTS)
    assert apply(fuse_skip_norms, model, x=X, y=Y) == 1
    assert ops(model) == [FUSED[norm]] and len(model.graph[0].outputs) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_sum_is_read_elsewhere(norm: str) -> None:
    text = graph(NORMS[norm], after="r = Relu (s)", outputs="float[B,S,8] n, float[B,S,8] r")
    model = make(text, **WEIGHTS)
    assert apply(fuse_skip_norms, model, x=X, y=Y) == 1
    assert sorted(ops(model)) == ["Relu", FUSED[norm]]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ["Add (y, b)", "Add (b, y)"])
@pytest.mark.parametrize("total", ["Add (x, t)", "Add (t, x)"])
def test_a_bias_goes_in(norm: str, order: str, total: str) -> None:
    model = make(graph(NORMS[norm], total=f"t = {order}\n s = {total}"), **WEIGHTS)
    assert apply(fuse_skip_norms, model, x=X, y=Y) == 1
    assert ops(model) == [FUSED[norm]]


def test_a_biased_value_that_others_read_keeps_its_bias() -> None:
    text = graph(
        NORMS["RMSNormalization"],
        total="t = Add (y, b)\n s = Add (x, t)",
        after="r = Relu (t)",
        outputs="float[B,S,8] n, float[B,S,8] r",
    )
    model = make(text, **WEIGHTS)
    assert apply(fuse_skip_norms, model, x=X, y=Y) == 1
    assert sorted(ops(model)) == ["Add", "Relu", "SkipSimplifiedLayerNormalization"]


REFUSED = {
    "a broadcast": ("s = Add (x, c)", NORMS["LayerNormalization"]),
    "another axis": ("s = Add (x, y)", "LayerNormalization <axis = 1> (s, w, w)"),
    "no sum": ("s = Mul (x, y)", NORMS["RMSNormalization"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    total, norm = REFUSED[case]
    text = graph(norm, total=total).replace("float[8] b", "float[8] b, float[3,8] w")
    model = make(text, **WEIGHTS, w=normal(3, 8))
    before = ops(model)
    assert apply(fuse_skip_norms, model, x=X, y=Y) == 0 and ops(model) == before


def test_a_sum_that_is_an_output_stays() -> None:
    model = make(graph(NORMS["RMSNormalization"], outputs="float[B,S,8] n, float[B,S,8] s"), **WEIGHTS)
    assert apply(fuse_skip_norms, model, x=X, y=Y) == 0
