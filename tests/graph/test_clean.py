from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.clean import cancel_transposes, clean, merge_reshapes, normalize_reshapes, same_shape
from accel.graph.edit import ints
from tests.graph.small import apply, count, make, normal, ops

X = normal(2, 6, 8)


def test_constants_fold_and_weights_do_not() -> None:
    text = """main (float[B,S,8] x, float[8] a, float[8] b, float[8,8] w) => (float[B,S,8] y) {
      sum = Add (a, b)
      scaled = Mul (x, sum)
      t = Transpose <perm = [1, 0]> (w)
      y = MatMul (scaled, t)
    }"""
    model = make(text, a=normal(8), b=normal(8, seed=1), w=normal(8, 8))
    assert apply(clean, model, x=X) == 1
    assert ops(model) == ["Mul", "Transpose", "MatMul"]
    assert "w" in model.graph.initializers and "a" not in model.graph.initializers


def test_equal_expressions_merge_and_dead_ones_go() -> None:
    text = """main (float[B,S,8] x) => (float[B,S,8] y) {
      a = Sigmoid (x)
      b = Sigmoid (x)
      unread = Tanh (x)
      same = Identity (b)
      y = Mul (a, same)
    }"""
    model = make(text)
    assert apply(clean, model, x=X) == 3
    assert ops(model) == ["Sigmoid", "Mul"]


def test_different_expressions_stay_apart() -> None:
    text = """main (float[B,S,8] x) => (float[B,S,8] y) {
      a = Gelu <approximate = "none"> (x)
      b = Gelu <approximate = "tanh"> (x)
      y = Mul (a, b)
    }"""
    model = make(text)
    apply(clean, model, x=X)
    assert count(model, "Gelu") == 2


TRANSPOSES = """main (float[B,S,8] x) => (float[%s] y) {
  a = Transpose <perm = %s> (x)
  b = Transpose <perm = %s> (a)
  y = Relu (b)
}"""


def test_transposes_that_undo_each_other_go() -> None:
    model = make(TRANSPOSES % ("B,S,8", "[1, 2, 0]", "[2, 0, 1]"))
    apply(lambda m: cancel_transposes(m) or 0, model, x=X)
    assert ops(model) == ["Relu"]


def test_transposes_that_do_not_stay() -> None:
    model = make(TRANSPOSES % ("8,B,S", "[1, 2, 0]", "[1, 2, 0]"))
    apply(lambda m: cancel_transposes(m) or 0, model, x=X)
    assert ops(model) == ["Transpose", "Transpose", "Relu"]


def test_pair_that_makes_an_output_stays() -> None:
    text = """main (float[B,S,8] x) => (float[B,S,8] y) {
      a = Transpose <perm = [1, 2, 0]> (x)
      y = Transpose <perm = [2, 0, 1]> (a)
    }"""
    model = make(text)
    apply(lambda m: cancel_transposes(m) or 0, model, x=X)
    assert model.graph.outputs[0].name == "y"


def test_shape_arithmetic_goes() -> None:
    """view(B, S, 2, 4) as torch traces it: the target is put together from the input's own sizes."""
    text = """main (float[B,S,8] x, int64[1] heads, int64[1] dim) => (float[B,S,2,4] y) {
      b = Shape <start = 0, end = 1> (x)
      s = Shape <start = 1, end = 2> (x)
      target = Concat <axis = 0> (b, s, heads, dim)
      v = Reshape (x, target)
      y = Relu (v)
    }"""
    model = make(text, heads=np.array([2]), dim=np.array([4]))
    model.graph[3].outputs[0].shape = ir.Shape(["B", "S", 2, 4])
    apply(clean, model, x=X)
    assert ops(model) == ["Reshape", "Relu"] and ints(model.graph[0].inputs[1]) == [0, 0, 2, 4]


def reshapes(first: list[int], second: list[int], shapes: tuple[list[str | int], list[str | int]]) -> ir.Model:
    """x [B, S, 8] through two reshapes, with the shapes between them as the tracer would note them."""
    text = f"""main (float[B,S,8] x, int64[{len(first)}] one, int64[{len(second)}] two) => (float y) {{
      a = Reshape (x, one)
      b = Reshape (a, two)
      y = Relu (b)
    }}"""
    model = make(text, one=np.array(first), two=np.array(second))
    model.graph[0].outputs[0].shape, model.graph[1].outputs[0].shape = (ir.Shape(shape) for shape in shapes)
    for value in (model.graph[2].outputs[0], model.graph.outputs[0]):
        value.shape = model.graph[1].outputs[0].shape
    return model


def test_reshapes_merge() -> None:
    model = reshapes([0, 0, 2, 4], [0, 0, 2, 2, 2], (["B", "S", 2, 4], ["B", "S", 2, 2, 2]))
    apply(lambda m: merge_reshapes(m) or 0, model, x=X)
    assert ops(model) == ["Reshape", "Relu"]


def test_reshape_back_goes() -> None:
    model = reshapes([0, 0, 2, 4], [0, 0, 8], (["B", "S", 2, 4], ["B", "S", 8]))
    apply(lambda m: merge_reshapes(m) or 0, model, x=X)
    assert ops(model) == ["Relu"]


def test_copied_size_that_the_inner_reshape_moved_stays() -> None:
    """[B, S, 8] -> [S * B, 8] -> copy of that first size: not B."""
    model = reshapes([-1, 8], [0, 2, 4], ([None, 8], [None, 2, 4]))  # type: ignore[list-item]
    apply(lambda m: merge_reshapes(m) or 0, model, x=X)
    assert ops(model) == ["Reshape", "Reshape", "Relu"]


def test_copied_size_of_unknown_name_stays() -> None:
    """Two sizes without a name are not known to be equal."""
    model = reshapes([3, -1, 8], [0, 0, 2, 4], ([3, None, 8], [3, None, 2, 4]))  # type: ignore[list-item]
    model.graph.inputs[0].shape = ir.Shape([None, None, 8])
    apply(lambda m: merge_reshapes(m) or 0, model, x=X)
    assert ops(model) == ["Reshape", "Reshape", "Relu"]


def test_normalised_targets_copy_only_what_stays_in_place() -> None:
    model = reshapes([2, 3, 2, 8], [2, 6, 8], (["B", "T", "U", 8], ["B", "S", 8]))
    before = [ints(node.inputs[1]) for node in list(model.graph)[:2]]
    apply(lambda m: normalize_reshapes(m) or 0, model, x=X)
    assert [ints(node.inputs[1]) for node in list(model.graph)[:2]] == before


@pytest.mark.parametrize(
    "a,b,same",
    [
        (["B", 4], ["B", 4], True),
        (["B", 4], ["S", 4], True),  # one size is left over: element counts are equal
        (["B", "S"], ["S", "B"], False),
        ([2, 3], [3, 2], False),
        ([None, 4], [None, 4], True),
        ([None, None], [None, None], False),
        (["B", 4], ["B", 4, 1], False),
    ],
)
def test_same_shape(a: list, b: list, same: bool) -> None:  # type: ignore[type-arg]
    assert same_shape(*(ir.Value(name="v", shape=ir.Shape(shape)) for shape in (a, b))) is same
