from __future__ import annotations

import numpy as np
import pytest

from accel.graph.fusions.indexing import simplify_indexing
from tests.graph.small import apply, make, normal, ops

ROWS = """main (float[B,T,8] x, int64[R] positions, int64[1] last) => (float[B,R,8] y) {
  turned = Transpose <perm = %s> (x)
  index = Unsqueeze (positions, last)
  picked = GatherND <batch_dims = %d> (turned, index)
  y = Transpose <perm = [1, 0, 2]> (picked)
}"""


def test_gather_of_rows() -> None:
    model = make(ROWS % ("[1, 0, 2]", 0), last=np.array([-1]))
    assert apply(simplify_indexing, model, x=normal(1, 5, 8), positions=np.array([3, 0, 3])) == 1
    (node,) = model.graph
    assert node.op_type == "Gather" and node.attributes["axis"].as_int() == 1


def test_gather_of_other_axes_is_refused() -> None:
    text = (ROWS % ("[2, 1, 0]", 0)).replace("float[B,R,8] y", "float[T,R,B] y")
    assert apply(simplify_indexing, make(text, last=np.array([-1])), x=normal(1, 5, 8), positions=np.array([3, 0])) == 0


def test_gather_read_twice_is_refused() -> None:
    text = (ROWS % ("[1, 0, 2]", 0)).replace("float[B,R,8] y)", "float[B,R,8] y, float[R,B,8] z)")
    text = text.replace("}", "  z = Relu (picked)\n}")
    model = make(text, last=np.array([-1]))
    assert apply(simplify_indexing, model, x=normal(1, 5, 8), positions=np.array([3, 0])) == 0


COLUMNS = """main (float[2,S,48] x, int64[5] view, int64[1] from, int64[1] to, int64[1] axis, int64[1] gone)
    => (float[2,S,%s] y) {
  split = Reshape (x, view)
  part = Slice (split, from, to, axis)
  y = Squeeze (part, gone)
}"""
BOUNDS = {"view": [2, -1, 3, 4, 4], "from": [1], "to": [2], "axis": [-3], "gone": [-3]}


def columns(shape: str = "4,4", **changes: list[int]):  # type: ignore[no-untyped-def]
    return make(COLUMNS % shape, **{name: np.array(value) for name, value in {**BOUNDS, **changes}.items()})


def test_part_of_a_packed_projection() -> None:
    model = columns()
    assert apply(simplify_indexing, model, x=normal(2, 5, 48)) == 1
    assert ops(model) == ["Slice", "Reshape"]


@pytest.mark.parametrize(
    "shape,changes",
    [
        ("3,4", {"axis": [-2], "gone": [-2], "from": [1], "to": [2]}),
        ("4,4", {"view": [2, -1, 3, 4, 4], "axis": [2], "gone": [2]}),
    ],
    ids=["one head of every part", "axis from the front"],
)
def test_other_cuts_are_left(shape: str, changes: dict[str, list[int]]) -> None:
    assert apply(simplify_indexing, columns(shape, **changes), x=normal(2, 5, 48)) == 0


def test_last_part_by_negative_bounds_keeps_its_values() -> None:
    """Bounds from the end, the last of them past it: whether rewritten or not, the columns are the same."""
    apply(simplify_indexing, columns(**{"from": [-1], "to": [np.iinfo(np.int64).max]}), x=normal(2, 5, 48))


FACTOR = """main (float[B,8] x, %s factor) => (float[B,8] y) {
  scaled = Mul (%s)
  y = Relu (scaled)
}"""


@pytest.mark.parametrize("order", ["x, factor", "factor, x"])
def test_factor_of_one_goes(order: str) -> None:
    model = make(FACTOR % ("float", order), factor=np.float32(1))
    assert apply(simplify_indexing, model, x=normal(3, 8)) == 1
    assert ops(model) == ["Relu"]


@pytest.mark.parametrize("factor", [np.float32(1.001), np.ones((1, 1), np.float32)], ids=["not one", "adds no axis"])
def test_other_factors_stay(factor: np.ndarray) -> None:
    kind = f"float[{','.join('1' for _ in factor.shape)}]" if factor.ndim else "float"
    assert apply(simplify_indexing, make(FACTOR % (kind, "x, factor"), factor=factor), x=normal(3, 8)) == 0
