from __future__ import annotations

import numpy as np
import pytest

from accel.graph.lowering.ort_cpu.linear import leave_tied_head_unpacked, lower_linear
from tests.graph.small import apply, make, normal, ops, run


@pytest.mark.parametrize("inputs,expected", [("x, w", ["FusedMatMul"]), ("x, w, b", ["FusedMatMul", "Add"])])
def test_transposed(inputs: str, expected: list[str]) -> None:
    text = f"""main (float[B,S,8] x, float[4,8] w, float[4] b) => (float[B,S,4] y) {{
      y = accel.Linear <transposed = 1> ({inputs})
    }}"""
    model = make(text, w=normal(4, 8), b=normal(4))
    assert apply(lower_linear, model, x=normal(2, 3, 8)) == 1
    assert ops(model) == expected and model.graph.outputs[0].name == "y"


def test_square_weight_is_not_turned_by_mistake() -> None:
    text = "main (float[B,8] x, float[8,8] w) => (float[B,8] y) {\ny = accel.Linear <transposed = %d> (x, w)\n}"
    for transposed, op_type in ((0, "MatMul"), (1, "FusedMatMul")):
        model = make(text % transposed, w=normal(8, 8))
        assert apply(lower_linear, model, x=normal(2, 8)) == 1
        assert ops(model) == [op_type]


TIED = """main (int64[T] ids, float[11,8] w, float[11,8] other) => (float[T,11] y) {
  h = Gather (%s, ids)
  y = com.microsoft.FusedMatMul <transB = 1> (h, %s)
}"""


def test_tied_head_becomes_an_input_that_need_not_be_given() -> None:
    model = make(TIED % ("w", "w"), w=normal(11, 8), other=normal(11, 8))
    ids = np.array([3, 0, 10])
    before = run(model, ids=ids)
    assert leave_tied_head_unpacked(model) == 1
    assert [value.name for value in model.graph.inputs] == ["ids", "w"]
    assert np.array_equal(run(model, ids=ids)[0], before[0])
    assert leave_tied_head_unpacked(model) == 0, "once is enough"


def test_untied_head_stays_constant() -> None:
    model = make(TIED % ("w", "other"), w=normal(11, 8), other=normal(11, 8))
    assert leave_tied_head_unpacked(model) == 0
    assert [value.name for value in model.graph.inputs] == ["ids"]
