from __future__ import annotations

import numpy as np
import pytest

from accel.graph.fusions.linear import fuse_linear
from tests.graph.small import apply, count, make, normal, ops

X = normal(2, 3, 8)
MATMUL = """main (float[B,S,8] x, float[4,8] w, float[4] b) => (float[B,S,4] y) {
  t = Transpose <perm = [1, 0]> (w)
  m = MatMul (x, t)
  y = %s
}"""
GEMM = """main (float[B,S,8] x, float[8,4] w, float[4] b, int64[2] flat, int64[3] back) => (float[B,S,4] y) {
  rows = Reshape (x, flat)
  g = Gemm %s (rows, w, b)
  y = Reshape (g, back)
}"""


@pytest.mark.parametrize("tail", ["Add (m, b)", "Add (b, m)"])
def test_matmul_with_bias(tail: str) -> None:
    model = make(MATMUL % tail, w=normal(4, 8), b=normal(4))
    assert apply(fuse_linear, model, x=X) == 1
    (node,) = model.graph
    assert (node.domain, node.op_type, node.attributes["transposed"].as_int()) == ("accel", "Linear", 1)
    assert [value.name for value in node.inputs] == ["x", "w", "b"]  # the stored weight itself, not its transpose


def test_matmul_without_bias() -> None:
    model = make(MATMUL % "Relu (m)", w=normal(4, 8), b=normal(4))
    assert apply(fuse_linear, model, x=X) == 1
    assert ops(model) == ["Linear", "Relu"]


@pytest.mark.parametrize("b", [normal(3, 4), normal(1)], ids=["matrix", "one number"])
def test_added_value_that_is_no_bias(b: np.ndarray) -> None:
    text = (MATMUL % "Add (m, b)").replace("float[4] b", f"float[{','.join(map(str, b.shape))}] b")
    model = make(text, w=normal(4, 8), b=b)
    assert apply(fuse_linear, model, x=X) == 1
    assert ops(model) == ["Linear", "Add"]


def test_product_read_elsewhere_keeps_its_bias_apart() -> None:
    text = """main (float[B,S,8] x, float[4,8] w, float[4] b) => (float[B,S,4] y) {
      t = Transpose <perm = [1, 0]> (w)
      m = MatMul (x, t)
      a = Add (m, b)
      y = Mul (a, m)
    }"""
    model = make(text, w=normal(4, 8), b=normal(4))
    assert apply(fuse_linear, model, x=X) == 1
    assert ops(model) == ["Linear", "Add", "Mul"] and len(model.graph[0].inputs) == 2


def test_activations_are_no_weight() -> None:
    text = """main (float[B,S,8] x, float[4,8] w) => (float[B,S,4] y) {
      t = Transpose <perm = [1, 0]> (w)
      y = MatMul (x, t)
    }"""
    assert apply(fuse_linear, make(text), x=X, w=normal(4, 8)) == 0


def test_transpose_that_leaves_the_axes_alone() -> None:
    text = """main (float[B,S,8] x, float[8,8] w) => (float[B,S,8] y) {
      t = Transpose <perm = [0, 1]> (w)
      y = MatMul (x, t)
    }"""
    assert apply(fuse_linear, make(text, w=normal(8, 8)), x=X) == 0


def gemm(options: str, **weights: np.ndarray):  # type: ignore[no-untyped-def]
    shapes = {"flat": np.array([-1, 8]), "back": np.array([2, 3, 4])}
    model = make((GEMM % options).replace("[B,S,", "[2,3,"), **{"w": normal(8, 4), "b": normal(4), **shapes, **weights})
    return model


def test_conv1d() -> None:
    model = gemm("")
    assert apply(fuse_linear, model, x=X) == 1
    assert ops(model) == ["Linear"] and model.graph[0].attributes["transposed"].as_int() == 0


@pytest.mark.parametrize("options", ["<alpha = 2.0>", "<beta = 0.5>"])
def test_scaled_gemm_is_refused(options: str) -> None:
    model = gemm(options)
    assert apply(fuse_linear, model, x=X) == 0
    assert count(model, "Gemm") == 1


def test_gemm_with_a_matrix_for_bias_is_refused() -> None:
    text = (GEMM % "").replace("[B,S,", "[2,3,").replace("float[4] b", "float[6,4] b")
    model = make(text, w=normal(8, 4), b=normal(6, 4), flat=np.array([-1, 8]), back=np.array([2, 3, 4]))
    assert apply(fuse_linear, model, x=X) == 0


def test_reshapes_that_regroup_stay() -> None:
    text = (GEMM % "").replace("float[B,S,8]", "float[2,3,8]").replace("float[B,S,4]", "float[3,2,4]")
    model = make(text, w=normal(8, 4), b=normal(4), flat=np.array([-1, 8]), back=np.array([3, 2, 4]))
    assert apply(fuse_linear, model, x=X) == 1
    assert ops(model) == ["Reshape", "Linear", "Reshape"]
