from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.edit import producer
from accel.graph.lowering.wanted_rows import choose_tokens_early
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
PLAIN = "last = Identity (down)"
HALVES = "left, right = Split <axis = -1> (down, halves)\n"


def layer(step: str = PLAIN, outputs: str = "", down: int = 8) -> ir.Model:
    return make(LAYER % (down, outputs, down, step), **WEIGHTS | {"wd": normal(down, 12)})


def chosen(model: ir.Model) -> set[str]:
    """What the choice is made of."""
    return {node.inputs[0].name or "" for node in model.graph if node.op_type == "Gather" and node.inputs[0]}


def tokens_of(model: ir.Model) -> dict[str, str]:
    """Value -> its token axis, of all that nodes leave."""
    return {value.name or "": str(value.shape[1]) for node in model.graph for value in node.outputs if value.shape}


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


def test_halves_of_a_row_are_of_one_token() -> None:
    model = layer("left, right = Split <axis = 2, num_outputs = 2> (down)\nlast = Mul (left, right)", down=16)
    assert apply(choose_tokens_early, model, **FEEDS) == 13
    assert chosen(model) == {"before", "attended"}


def test_tokens_split_apart_stay() -> None:
    model = layer("left, right = Split <axis = 1> (down, halves)\nlast = Add (left, right)")
    assert choose_tokens_early(model) == 1 and chosen(model) == {"after"}


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
    ],
    ids=["no choice", "places that something else reads", "the head looks at other tokens", "not of tokens"],
)
def test_graphs_that_stay_as_they_are(old: str, new: str) -> None:
    text = LAYER % (8, "", 8, PLAIN)
    assert old in text
    model = make(text.replace(old, new), **WEIGHTS)
    before = ops(model)
    assert choose_tokens_early(model) == 0 and ops(model) == before
