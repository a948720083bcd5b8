from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.graph.fusions.rotary import column_range, fuse_rotary
from tests.graph.small import apply, body, count, make, normal

HEADS, DIM = 3, 8
FREQUENCIES = (10.0 ** -np.arange(DIM // 2)).astype(np.float32)
STEPS = {
    "p": "Cast <to = 1> (positions)",
    "column": "Unsqueeze (p, minus)",
    "angles": "Mul (column, frequencies)",
    "both": "Concat <axis = -1> (angles, angles)",
    "cos_flat": "Cos (both)",
    "sin_flat": "Sin (both)",
    "cos": "Unsqueeze (cos_flat, heads_axis)",
    "sin": "Unsqueeze (sin_flat, heads_axis)",
    "h": "Transpose <perm = [0, 2, 1, 3]> (x)",
    "low": "Slice (h, zero, mid, minus)",
    "high": "Slice (h, mid, far, minus)",
    "negated": "Neg (high)",
    "turned": "Concat <axis = -1> (negated, low)",
    "straight": "Mul (h, cos)",
    "around": "Mul (turned, sin)",
    "y": "Add (straight, around)",
}
NUMBERS: dict[str, NDArray] = {
    "minus": np.array([-1]),
    "heads_axis": np.array([1]),
    "zero": np.array([0]),
    "mid": np.array([DIM // 2]),
    "far": np.array([np.iinfo(np.int64).max]),
    "two": np.array([2]),
    "one": np.array([1]),
    "frequencies": FREQUENCIES,
    "factor": np.float32(1.25),
}


def rotary(batch: int | str = "B", numbers: dict[str, NDArray] | None = None, **changes: str) -> ir.Model:
    data = {**NUMBERS, **(numbers or {})}
    kinds = {np.dtype(np.int64): "int64", np.dtype(np.float32): "float"}
    inputs = [
        f"{kinds[value.dtype]}{list(value.shape) if value.ndim else ''} {name}".replace("'", "")
        for name, value in data.items()
    ]
    head = f"main (float[{batch},S,{HEADS},{DIM}] x, int64[{batch},S] positions, {', '.join(inputs)})"
    return make(f"{head} => (float[{batch},{HEADS},S,{DIM}] y) " + body({**STEPS, **changes}), **data)


def feeds(batch: int) -> dict[str, NDArray]:
    return {"x": normal(batch, 5, HEADS, DIM), "positions": np.arange(5 * batch).reshape(batch, 5)}


@pytest.mark.parametrize("batch", ["B", 1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"straight": "Mul (cos, h)", "around": "Mul (sin, turned)", "y": "Add (around, straight)"},
        {"cos_flat": "Mul (c, factor)", "c": "Cos (both)", "sin_flat": "Mul (s, factor)", "s": "Sin (both)"},
    ],
    ids=["plain", "commuted", "scaled"],
)
def test_fused(batch: int | str, changes: dict[str, str]) -> None:
    model = rotary(batch, **changes)
    assert apply(fuse_rotary, model, **feeds(1 if batch == 1 else 2)) == 1
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert node.attributes["num_heads"].as_int() == HEADS and "rotary_embedding_dim" not in node.attributes
    assert count(model, "Neg") == 0


def test_copied_half() -> None:
    model = rotary(low="Identity (half)", half="Slice (h, zero, mid, minus)")
    assert apply(fuse_rotary, model, **feeds(2)) == 0  # a copy of the half is not the half: no match, no harm


PARTIAL = {
    "r": "Slice (h, zero, width, minus)",
    "rest": "Slice (h, width, far, minus)",
    "low": "Slice (r, zero, mid, minus)",
    "high": "Slice (r, mid, far, minus)",
    "straight": "Mul (r, cos)",
    "rotated": "Add (straight, around)",
    "y": "Concat <axis = -1> (rotated, rest)",
}
HALF = {"mid": np.array([2]), "width": np.array([4]), "frequencies": FREQUENCIES[:2]}


def test_part_of_the_head() -> None:
    model = rotary(1, HALF, **PARTIAL)
    assert apply(fuse_rotary, model, **feeds(1)) == 1
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert node.attributes["rotary_embedding_dim"].as_int() == 4
    assert count(model, "Slice") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"y": "Concat <axis = -1> (rest, rotated)"},
        {"rest": "Slice (h, start, end, minus)"},
        {"doubled": "Add (rest, rest)", "y": "Concat <axis = -1> (rotated, doubled)"},
    ],
    ids=["rest in front", "another rest", "rest changed"],
)
def test_part_of_the_head_put_back_otherwise_is_refused(change: dict[str, str]) -> None:
    extra = {"start": np.array([3]), "end": np.array([7])}
    assert apply(fuse_rotary, rotary(1, {**HALF, **extra}, **{**PARTIAL, **change}), **feeds(1)) == 0


INTERLEAVED = {
    "low": "Slice (h, zero, far, minus, two)",
    "high": "Slice (h, one, far, minus, two)",
    "n4": "Unsqueeze (negated, minus)",
    "l4": "Unsqueeze (low, minus)",
    "pairs": "Concat <axis = -1> (n4, l4)",
    "shape": "Shape (h)",
    "turned": "Reshape (pairs, shape)",
}


@pytest.mark.parametrize(
    "changes",
    [
        INTERLEAVED,
        {"low": "Slice (h, zero, far, minus, two)", "high": "Slice (h, one, far, minus, two)"},
        {"other": "Mul (angles, factor)", "both": "Concat <axis = -1> (angles, other)"},
        {"turned": "Concat <axis = -1> (high, negated)", "negated": "Neg (low)"},
        {"turned": "Concat <axis = -1> (low, negated)"},
        {"other": "Neg (h)", "high": "Slice (other, mid, far, minus)"},
        {"y": "Sub (straight, around)"},
        {"h": "Transpose <perm = [0, 2, 1, 3]> (relu)", "relu": "Relu (x)", "straight": "Mul (g, cos)", "g": "Abs (h)"},
    ],
    ids=["interleaved", "every second column", "two different halves", "turned back", "halves exchanged",
         "half of another value", "difference", "product with another value"],
)  # fmt: skip
def test_other_formulas_are_refused(changes: dict[str, str]) -> None:
    model = rotary(1, **changes)
    assert apply(fuse_rotary, model, **feeds(1)) == 0


def test_angles_joined_along_another_axis_are_refused() -> None:
    """Twice the same rows under each other is not twice the same half beside itself."""
    model = rotary(
        1,
        {"frequencies": normal(DIM)},
        p="Cast <to = 1> (few)",
        few="Slice (positions, zero, mid, minus)",
        both="Concat <axis = 1> (angles, angles)",
    )
    assert apply(fuse_rotary, model, x=normal(1, DIM, HEADS, DIM), positions=np.arange(DIM)[None]) == 0


def test_heads_last_input_is_required() -> None:
    model = rotary(1, h="Transpose <perm = [0, 3, 1, 2]> (z)", z="Transpose <perm = [0, 1, 3, 2]> (x)")
    assert apply(fuse_rotary, model, **feeds(1)) == 0


RANGES = """main (float[B,12] x, int64[1] a, int64[1] b, int64[1] axis, int64[1] step) => (%s) {
  y = %s
}"""


@pytest.mark.parametrize(
    "bounds,expected",
    [
        ({"a": 2, "b": 5, "axis": -1, "step": 1}, (2, 5)),
        ({"a": -4, "b": 2**62, "axis": 1, "step": 1}, (8, 12)),
        ({"a": 2, "b": 5, "axis": 0, "step": 1}, None),
        ({"a": 2, "b": 8, "axis": -1, "step": 2}, None),
    ],
)
def test_column_range_of_a_slice(bounds: dict[str, int], expected: tuple[int, int] | None) -> None:
    weights = {name: np.array([value]) for name, value in bounds.items()}
    model = make(RANGES % ("float[B,K] y", "Slice (x, a, b, axis, step)"), **weights)
    found = column_range(model.graph.outputs[0])
    assert (found[1:] if found is not None else None) == expected
    if found is not None:
        assert found[0] is model.graph.inputs[0]


def test_column_range_of_a_split() -> None:
    text = """main (float[B,12] x, int64[3] sizes) => (float[B,2] p, float[B,7] q, float[B,3] r) {
      p, q, r = Split <axis = -1> (x, sizes)
    }"""
    model = make(text, sizes=np.array([2, 7, 3]))
    assert [column_range(value)[1:] for value in model.graph.outputs] == [(0, 2), (2, 9), (9, 12)]  # type: ignore[index]
    assert column_range(model.graph.inputs[0]) is None
