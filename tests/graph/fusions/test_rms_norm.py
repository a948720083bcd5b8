from __future__ import annotations

import numpy as np
import pytest

from accel.graph.fusions.rms_norm import fuse_rms_norm
from tests.graph.small import apply, body, make, normal, ops

X, SCALE = normal(2, 3, 8), normal(8)
NUMBERS = {"two": np.float32(2), "eps": np.float32(1e-2), "axis": np.array([-1])}
STEPS = {
    "square": "Pow (x, two)",
    "mean": "ReduceMean <keepdims = 1> (square, axis)",
    "added": "Add (mean, eps)",
    "root": "Sqrt (added)",
    "inverse": "Reciprocal (root)",
    "normed": "Mul (x, inverse)",
    "y": "Mul (scale, normed)",
}


def norm(inputs: str = "float[8] scale", **changes: str) -> str:
    head = f"main (float[B,S,8] x, {inputs}, float two, float eps, int64[1] axis) => (float[B,S,8] y) "
    return head + body({**STEPS, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"square": "Mul (x, x)"},
        {"added": "Add (eps, mean)"},
        {"normed": "Mul (inverse, x)", "y": "Mul (normed, scale)"},
    ],
)
def test_fused(changes: dict[str, str]) -> None:
    model = make(norm(**changes), scale=SCALE, **NUMBERS)
    assert apply(fuse_rms_norm, model, x=X) == 1
    (node,) = model.graph
    assert node.op_type == "RMSNormalization" and node.attributes["axis"].as_int() == -1
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-2)


def test_gemma_scale_of_one_plus_weight() -> None:
    model = make(norm("float[8] w, float one", scale="Add (one, w)"), w=SCALE, one=np.float32(1), **NUMBERS)
    assert apply(fuse_rms_norm, model, x=X) == 1
    assert ops(model) == ["Add", "RMSNormalization"]


def test_last_axis_counted_from_the_front() -> None:
    model = make(norm(), scale=SCALE, **{**NUMBERS, "axis": np.array([2])})
    assert apply(fuse_rms_norm, model, x=X) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"root": "Sqrt (mean)", "added": "Add (root, eps)", "inverse": "Reciprocal (added)"},
        {"added": "Add (mean, eps)", "inverse": "Reciprocal (added)"},
        {"added": "Sub (mean, eps)", "root": "Abs (added)"},
        {"normed": "Mul (square, inverse)"},
        {"square": "Mul (x, scale)", "positive": "Abs (square)", "mean": "ReduceMean (positive, axis)"},
        {"mean": "ReduceSum (square, axis)"},
    ],
    ids=["epsilon outside the root", "no root", "epsilon subtracted", "of another value", "no square", "sum for mean"],
)
def test_other_formulas_are_refused(changes: dict[str, str]) -> None:
    model = make(norm(**changes), scale=SCALE, **NUMBERS)
    assert apply(fuse_rms_norm, model, x=X) == 0


def test_other_axis_is_refused() -> None:
    assert apply(fuse_rms_norm, make(norm(), scale=SCALE, **{**NUMBERS, "axis": np.array([1])}), x=X) == 0


def test_mean_over_two_axes_is_refused() -> None:
    text = norm().replace("int64[1] axis", "int64[2] axis")
    assert apply(fuse_rms_norm, make(text, scale=SCALE, **{**NUMBERS, "axis": np.array([1, 2])}), x=X) == 0


def test_mean_without_its_axis_is_refused() -> None:
    text = norm(mean="ReduceMean <keepdims = 0> (square, axis)").replace("[B,S,8]", "[8,8]")
    assert apply(fuse_rms_norm, make(text, scale=SCALE, **NUMBERS), x=normal(8, 8)) == 0


def test_cube_is_refused() -> None:
    text = norm(mean="ReduceMean <keepdims = 1> (positive, axis)", positive="Abs (square)")
    assert apply(fuse_rms_norm, make(text, scale=SCALE, **{**NUMBERS, "two": np.float32(3)}), x=X) == 0


def test_scale_that_is_no_parameter_is_refused() -> None:
    assert apply(fuse_rms_norm, make(norm(), **NUMBERS), x=X, scale=SCALE) == 0


def test_scale_of_another_rank_is_refused() -> None:
    assert apply(fuse_rms_norm, make(norm("float[3,8] scale"), scale=normal(3, 8), **NUMBERS), x=X) == 0


TRANSPOSED = """main (float[B,S,4,8] x, %s scale) => (float[B,4,S,8] y) {
  t = Transpose <perm = %s> (x)
  n = RMSNormalization <axis = %d, epsilon = 0.01> (t, scale)
  y = Relu (n)
}"""


def test_norm_moves_above_a_transpose_of_the_other_axes() -> None:
    model = make(TRANSPOSED % ("float[8]", "[0, 2, 1, 3]", -1), scale=SCALE)
    apply(fuse_rms_norm, model, x=normal(2, 3, 4, 8))
    assert ops(model) == ["RMSNormalization", "Transpose", "Relu"]


def test_norm_stays_below_a_transpose_that_moves_its_axis() -> None:
    text = (TRANSPOSED % ("float[4]", "[0, 1, 3, 2]", -1)).replace("float[B,4,S,8] y", "float[B,S,8,4] y")
    model = make(text, scale=normal(4))
    apply(fuse_rms_norm, model, x=normal(2, 3, 4, 8))
    assert ops(model) == ["Transpose", "RMSNormalization", "Relu"]


def test_norm_over_two_axes_stays_below_its_transpose() -> None:
    text = (TRANSPOSED % ("float[8]", "[0, 2, 1, 3]", -2)).replace("[B,S,4,8] x", "[2,3,4,8] x")
    model = make(text.replace("[B,4,S,8] y", "[2,4,3,8] y"), scale=SCALE)
    apply(fuse_rms_norm, model, x=normal(2, 3, 4, 8))
    assert ops(model) == ["Transpose", "RMSNormalization", "Relu"]
