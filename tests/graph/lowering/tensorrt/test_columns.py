from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.lowering.tensorrt.columns import split_columns
from tests.graph.small import count, make, run

TEXT = """main (float[B,T,12] x, int64[1] s0, int64[1] e0, int64[1] s1, int64[1] e1, int64[1] axis, int64[1] step)
    => (float[B,T,M] y, float[B,T,N] z) {
  h = Tanh (x)
  y = Slice (h, s0, e0, axis, step)
  z = Slice (h, s1, e1, axis, step)
}"""


def model(first: tuple[int, int], second: tuple[int, int], axis: int = 2, step: int = 1) -> ir.Model:
    values = {"s0": first[0], "e0": first[1], "s1": second[0], "e1": second[1], "axis": axis, "step": step}
    return make(TEXT, **{name: np.array([value]) for name, value in values.items()})


X = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)


@pytest.mark.parametrize("bounds", [((0, 4), (4, 12)), ((8, 12), (0, 8)), ((0, 5), (5, 1 << 62)), ((0, -3), (-3, 99))])
@pytest.mark.parametrize("axis", [2, -1])
def test_columns_that_cover_all(bounds: tuple[tuple[int, int], tuple[int, int]], axis: int) -> None:
    made = model(*bounds, axis=axis)
    before = run(made, x=X)
    assert split_columns(made) == 1
    assert count(made, "Slice") == 0 and count(made, "Split") == 1
    for left, right in zip(before, run(made, x=X), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "made",
    [model((0, 4), (5, 12)), model((0, 5), (4, 12)), model((0, 4), (4, 11)), model((0, 1), (1, 3), axis=1),
     model((0, 6), (6, 12), step=2), model((0, 0), (0, 12))],
    ids=["a gap", "an overlap", "not to the end", "another axis", "every second", "nothing"],
)  # fmt: skip
def test_what_is_not_understood_stays(made: ir.Model) -> None:
    assert split_columns(made) == 0 and count(made, "Slice") == 2
