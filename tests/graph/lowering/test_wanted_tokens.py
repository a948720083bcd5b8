from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.edit import producer
from accel.graph.lowering.wanted_tokens import choose_tokens_early
from tests.graph.small import apply, count, make, normal, ops

# The last layer behind its attention, whose result ``attended`` is; ``before`` is what layers keep adding to.
LAYER = """main (float[1,T,8] before, float[1,T,8] attended, float[1,T,1] factor, int64[R] logits_positions,
    float[8,8] wo, float[8] bo, float[12,8] wg, float[12,8] wu, float[%d,12] wd, float[8] scale, float[8] shift,
    float[11,8] head, int64[2] halves, int64[1] one, float[5,8] rows) => (float[1,R,11] logits%s)
    <float[1,T,8] out, float[1,T,12] gate, float[1,T,12] up, float[1,T,%d] down> {
  out = accel.Linear <transposed = 1> (attended, wo, bo)
  middle = Add (before, out)
  normed = LayerNormalization <axis = -1> (middle, scale, shift)
  gate = accel.Linear <transposed = 1> (normed, wg)
  opened = Sigmoid (gate)
  silu = Mul (gate, opened)
  up = accel.Linear <transposed = 1> (normed, wu)
  both = Mul (silu, up)
  down = accel.Linear <transposed = 1> (both, wd)
  %s
  after = Add (middle, last)
  final = LayerNormalization <axis = -1> (after, scale, shift)
  chosen = Gather <axis = 1> (final, logits_positions)
  logits = accel.Linear <transposed = 1> (chosen, head)
}"""
WEIGHTS = {
    "wo": normal(8, 8), "bo": normal(8), "wg": normal(12, 8), "wu": normal(12, 8, seed=1), "wd": normal(8, 12),
    "scale": normal(8), "shift": normal(8, seed=1), "head": normal(11, 8), "halves": np.array([4, 4]),
    "one": np.array([1]), "rows": normal(5, 8),
}  # fmt: skip
FEEDS = {
    "before": normal(1, 5, 8), "attended": normal(1, 5, 8, seed=1), "factor": normal(1, 5, 1),
    "logits_positions": np.array([4, 1, 4]),
}  # fmt: skip
PLAIN = "last = Relu (down)"
HALVES = "left, right = Split <axis = -1> (down, halves)\n"


def layer(step: str = PLAIN, outputs: str = "", down: int = 8) -> ir.Model:
    return make(LAYER % (down, outputs, down, step), **WEIGHTS | {"wd": normal(down, 12)})


def say(model: ir.Model, *names: str) -> ir.Model:
    """Declares values to be [1, T, 8], where inference does not know their operator, or knows T."""
    for node in model.graph:
        for value in node.outputs:
            if value.name in names:
                value.shape, value.type = ir.Shape([1, "T", 8]), ir.TensorType(ir.DataType.FLOAT)
            elif value.name == "chosen" and names:
                value.shape = ir.Shape([1, "R", 8])
    return model


def chosen(model: ir.Model) -> set[str]:
    """What the choice is made of."""
    return {node.inputs[0].name or "" for node in model.graph if node.op_type == "Gather" and node.inputs[0]}


def tokens_of(model: ir.Model) -> dict[str, str]:
    """Value -> its token axis, of all that nodes leave; each has a type and a shape, which later passes ask for."""
    made = [value for node in model.graph for value in node.outputs]
    assert all(value.type is not None and value.shape is not None for value in made)
    return {value.name or "": str(value.shape[1]) for value in made}  # type: ignore[index]


def test_the_last_layer_computes_the_chosen_tokens_alone() -> None:
    model = layer()
    assert apply(choose_tokens_early, model, **FEEDS) == 12
    assert chosen(model) == {"before", "attended"} and count(model, "Gather") == 2
    assert set(tokens_of(model).values()) == {"R"}
    assert producer(model.graph.outputs[0], "Linear").inputs[0].name == "final"  # type: ignore[union-attr]


def test_it_applies_once() -> None:
    model = layer()
    assert choose_tokens_early(model) and not choose_tokens_early(model)


@pytest.mark.parametrize(
    ("step", "found", "moved"),
    [
        ("last = Mul (down, factor)", {"before", "attended", "factor"}, 12),
        (f"{HALVES}last = Concat <axis = -1> (left, right)", {"middle", "last"}, 2),
        ("last = CumSum (down, one)", {"middle", "last"}, 2),
        ("last = LayerNormalization <axis = 1> (down, rows)", {"middle", "last"}, 2),
        ("total = ReduceMean (down, one)\nlast = Sub (down, total)", {"middle", "last"}, 2),
    ],
    ids=["a factor per token", "joined", "sums along tokens", "a norm of all", "a mean of tokens"],
)  # fmt: skip
def test_what_looks_at_other_tokens_stays(step: str, found: set[str], moved: int) -> None:
    model = layer(step)
    assert apply(choose_tokens_early, model, **FEEDS) == moved
    assert chosen(model) == found


@pytest.mark.parametrize("axis", ["<axis = 2, num_outputs = 2>", "<axis = -1, num_outputs = 2>"])
def test_halves_of_a_row_are_of_one_token(axis: str) -> None:
    model = layer(f"left, right = Split {axis} (down)\nlast = Mul (left, right)", down=16)
    assert apply(choose_tokens_early, model, **FEEDS) == 13
    assert chosen(model) == {"before", "attended"}


@pytest.mark.parametrize(
    ("step", "output"), [("", "right"), ("sums = CumSum (right, one)\n", "sums")], ids=["an output", "read"]
)
def test_a_half_that_goes_elsewhere_keeps_the_other(step: str, output: str) -> None:
    steps = f"left, right = Split <axis = -1, num_outputs = 2> (down)\n{step}last = Relu (left)"
    model = layer(steps, f", float[1,T,8] {output}", down=16)
    assert apply(choose_tokens_early, model, **FEEDS) == 3
    assert chosen(model) == {"middle", "left"}


@pytest.mark.parametrize("axis", ["<axis = 1, num_outputs = 1>", "<num_outputs = 1>"], ids=["of tokens", "of rows"])
def test_tokens_split_apart_stay(axis: str) -> None:
    model = say(layer(f"last = Split {axis} (down)"), "last", "after", "final")
    assert apply(choose_tokens_early, model, **FEEDS) == 2 and chosen(model) == {"middle", "last"}


@pytest.mark.parametrize("kind", ["Add", "Cast", "Div", "Gelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"])
def test_operators_of_elements(kind: str) -> None:
    step = {"Cast": "last = Cast <to = 1> (down)"}.get(kind)
    pair = kind in ("Add", "Div", "Mul", "Sub")
    model = layer(step or f"last = {kind} ({'down, shift' if pair else 'down'})")
    assert apply(choose_tokens_early, model, **FEEDS) == 12 and chosen(model) == {"before", "attended"}


@pytest.mark.parametrize(
    ("operand", "moves"),
    [("number", True), ("shift", True), ("thin", True), ("half", True), ("flat", False), ("whole", False),
     ("line", False)],
)
def test_what_all_tokens_get(operand: str, moves: bool) -> None:
    """A number, a row, and one that is computed; not what only looks alike for all: a row per token."""
    made = {
        "half": "half = Mul (shift, shift)\n", "flat": "flat = Squeeze (before, zero)\n",
        "line": "line = Squeeze (factor, two)\n",
    }.get(operand, "")  # fmt: skip
    more = "float number, float[1,1,8] thin, float[5,8] whole, int64[1] zero, int64[1] two, int64[2] halves"
    text = (LAYER % (8, "", 8, f"{made}last = Mul (down, {operand})")).replace("int64[2] halves", more)
    extra = {"number": np.float32(3), "thin": normal(1, 1, 8), "whole": normal(5, 8)}
    extra |= {"zero": np.array([0]), "two": np.array([2])}
    model = make(text, **WEIGHTS, **extra)
    say(model, "last", "after", "final")
    assert choose_tokens_early(model) == (12 if moves else 2)
    assert chosen(model) == ({"before", "attended"} if moves else {"middle", "last"})


@pytest.mark.parametrize(
    ("step", "moved"),
    [
        ("last = RMSNormalization <axis = 2> (down, scale)", 12),
        ("last = RMSNormalization (down, scale)", 12),
        ("last = LayerNormalization <axis = 2> (down, scale)", 12),
        ("last = LayerNormalization (down, before)", 2),
        ("flat = Squeeze (before, zero)\nlast = RMSNormalization (down, flat)", 2),
        ("last = RMSNormalization (down, whole)", 2),
        ("last = com.microsoft.Gelu (down)", 2),
        ("last = accel.Other (down, wo)", 2),
        ("last = accel.Linear <transposed = 1> (down, wo, before)", 2),
    ],
)
def test_norms_and_what_is_no_linear_layer(step: str, moved: int) -> None:
    text = (LAYER % (8, "", 8, step)).replace("int64[2] halves", "float[1,5,8] whole, int64[1] zero, int64[2] halves")
    model = make(text, **WEIGHTS, whole=normal(1, 5, 8), zero=np.array([0]))
    say(model, "last", "after", "final")
    assert choose_tokens_early(model) == moved


def test_a_value_that_is_read_twice() -> None:
    model = layer("twice = Mul (before, before)\nlast = Add (down, twice)")
    assert apply(choose_tokens_early, model, **FEEDS) == 13
    assert chosen(model) == {"before", "attended"} and count(model, "Gather") == 2


def test_the_choice_stands_behind_others_that_read_the_value() -> None:
    """The cuda engine's norm adds up what it reads; a choice in front of it would have to."""
    steps = "entry = Add (before, before)\n  keys = LayerNormalization <axis = -1> (entry, scale)\n  out = accel"
    text = (LAYER % (8, ", float[1,T,8] keys", 8, PLAIN)).replace("out = accel", steps)
    model = make(text.replace("Add (before, out)", "Add (entry, out)"), **WEIGHTS)
    assert apply(choose_tokens_early, model, **FEEDS) == 12
    names = [node.outputs[0].name for node in model.graph]
    (place,) = (n for n, node in enumerate(model.graph) if node.op_type == "Gather" and node.inputs[0].name == "entry")  # type: ignore[union-attr]
    assert names.index("keys") < place == names.index("middle") - 1


@pytest.mark.parametrize("shape", [[1, None, 8], None], ids=["a size", "all sizes"])
def test_what_nobody_knows_stays(shape: list[int | None] | None) -> None:
    model = layer()
    for node in model.graph:
        if node.outputs[0].name in ("last", "middle", "after", "final"):
            node.outputs[0].shape = None if shape is None else ir.Shape(shape)
    assert choose_tokens_early(model) == 0
    model = layer()
    next(node for node in model.graph if node.op_type == "Gather").outputs[0].shape = None
    assert choose_tokens_early(model) == 0
    model = layer()
    next(node.outputs[0] for node in model.graph if node.outputs[0].name == "last").shape = None
    assert choose_tokens_early(model) == 1


def test_what_something_else_reads_stays_whole() -> None:
    model = layer(outputs=", float[1,T,12] both")
    assert apply(choose_tokens_early, model, **FEEDS) == 4
    assert chosen(model) == {"middle", "both"} and tokens_of(model)["both"] == "T"


def test_branches_side_by_side() -> None:
    """Attention reads the norm that the other branch reads: it stays, and its chosen tokens go on."""
    model = make(
        """main (float[1,T,8] before, int64[R] logits_positions, float[8,8] wo, float[12,8] wu, float[8,12] wd,
            float[8] scale, float[11,8] head, int64 one) => (float[1,R,11] logits)
            <float[1,T,12] up, float[1,T,8] down, float[1,T,8] out> {
          normed = RMSNormalization (before, scale)
          up = accel.Linear <transposed = 1> (normed, wu)
          bent = Gelu (up)
          down = accel.Linear <transposed = 1> (bent, wd)
          attended = CumSum (normed, one)
          out = accel.Linear <transposed = 1> (attended, wo)
          both = Add (out, down)
          after = Add (before, both)
          chosen = Gather <axis = 1> (after, logits_positions)
          logits = accel.Linear <transposed = 1> (chosen, head)
        }""",
        wo=normal(8, 8), wu=normal(12, 8), wd=normal(8, 12), scale=normal(8), head=normal(11, 8), one=np.array(1),
    )  # fmt: skip
    assert apply(choose_tokens_early, model, **FEEDS) == 6
    assert chosen(model) == {"before", "normed", "attended"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(final, logits_positions)", "(final, one)"),
        ("chosen =", "twice = Add (logits_positions, logits_positions)\n  chosen ="),
        ("chosen = Gather <axis = 1> (final", "sums = CumSum (final, one)\n  chosen = Gather <axis = 1> (sums"),
        ("Gather <axis = 1> (final", "Gather <axis = 0> (final"),
        ("Gather <axis = 1> (final, logits_positions)", "GatherElements <axis = 1> (final, logits_positions)"),
        ("  logits =", "  other = Gather <axis = 1> (after, logits_positions)\n  logits ="),
    ],
    ids=["no choice", "places that are added", "the head looks at others", "not of tokens", "no Gather", "two choices"],
)
def test_graphs_that_stay_as_they_are(old: str, new: str) -> None:
    text = LAYER % (8, "", 8, PLAIN)
    assert old in text
    model = make(text.replace(old, new), **WEIGHTS)
    before = ops(model)
    assert choose_tokens_early(model) == 0 and ops(model) == before
