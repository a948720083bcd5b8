from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.lowering.packed import merge_linears
from accel.graph.lowering.unit_batch import drop_unit_batch
from accel.spec import PARTS
from tests.graph.small import apply, assert_close, count, make, normal, ops, run

THREE = """main (float[B,S,8] x, float[B,S,8] z, float[4,8] wq, float[2,8] wk, float[2,8] wv, float[4] bq, float[2] bk,
    float[2] bv) => (float[B,S,4] q, float[B,S,2] k, float[B,S,2] v) {
  q = accel.Linear <transposed = 1> (%s)
  k = accel.Linear <transposed = %d> (%s)
  v = accel.Linear <transposed = 1> (%s)
}"""
PLAIN = ("x, wq", 1, "x, wk", "x, wv")
BIASED = ("x, wq, bq", 1, "x, wk, bk", "x, wv, bv")


def three(variant: tuple[str, int, str, str]) -> ir.Model:
    weights = {"wq": normal(4, 8), "wk": normal(2, 8), "wv": normal(2, 8, seed=1)}
    biases = {"bq": normal(4), "bk": normal(2), "bv": normal(2, seed=1)}
    return make(THREE % variant, **weights, **biases)


def merge(model: ir.Model) -> ir.Value | None:
    nodes = list(model.graph)
    return merge_linears(model.graph, nodes[0], [node.outputs[0] for node in nodes], "layers.0.qkv")


@pytest.mark.parametrize("variant", [PLAIN, BIASED], ids=["plain", "biased"])
def test_merged_projection(variant: tuple[str, int, str, str]) -> None:
    model, x = three(variant), normal(2, 3, 8)
    before = run(model, x=x, z=x)
    merged = merge(model)
    assert merged is not None and list(merged.shape)[1:] == [ir.SymbolicDim("S"), 8]  # type: ignore[arg-type, index]
    weight = model.graph.initializers["layers.0.qkv.weight"]
    assert weight.metadata_props[PARTS] == "wq\nwk\nwv", "the weight writer lays these side by side"
    merged.name = "qkv"
    model.graph.outputs.append(merged)
    assert_close([run(model, x=x, z=x)[-1]], [np.concatenate(before, axis=-1)])


@pytest.mark.parametrize(
    "variant",
    [
        ("x, wq", 1, "z, wk", "x, wv"),
        ("x, wq, bq", 1, "x, wk", "x, wv"),
        ("x, wq", 1, "x, wk, bk", "x, wv"),
        ("x, wq", 0, "x, wk", "x, wv"),
    ],
    ids=["another input", "one bias", "a bias more", "stored the other way"],
)
def test_other_projections_stay_apart(variant: tuple[str, int, str, str]) -> None:
    model = three(variant)
    assert merge(model) is None and len(model.graph) == 3


def test_value_that_is_no_projection() -> None:
    model = three(PLAIN)
    assert (
        merge_linears(model.graph, model.graph[0], [*model.graph.inputs[:1], *model.graph.outputs[1:]], "qkv") is None
    )


DECODER = """main (int64[T] ids, int64[R] rows, float[11,8] table, float[8] scale, float[8] shift, float[8,11] head,
    float[%s] factor, int64[1] zero) => (float[R,11] logits) {
  batched = Unsqueeze (ids, zero)
  h = Gather (table, batched)
  scaled = Mul (h, factor)
  normed = %s
  sum = Add (normed, h)
  wanted = Gather <axis = 1> (sum, rows)
  all = MatMul (wanted, head)
  logits = Squeeze (all, zero)
}"""
NORM = "LayerNormalization <axis = %d, epsilon = 0.001> (scaled, scale, shift)"


def decoder(factor: str = "8", norm: str = NORM % -1) -> ir.Model:
    shape = tuple(int(size) for size in factor.split(","))
    weights = {"table": normal(11, 8), "scale": normal(8), "shift": normal(8, seed=1), "head": normal(8, 11)}
    return make(DECODER % (factor, norm), **weights, factor=normal(*shape), zero=np.array([0]))


FEEDS = {"ids": np.array([3, 0, 10, 3]), "rows": np.array([0, 3])}


def test_unit_batch_goes() -> None:
    model = decoder()
    assert apply(drop_unit_batch, model, **FEEDS) == 1
    assert ops(model) == ["Gather", "Mul", "LayerNormalization", "Add", "Gather", "MatMul"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert model.graph[4].attributes["axis"].as_int() == 0


@pytest.mark.parametrize(
    "factor,norm",
    [("8", "Softmax <axis = 1> (scaled)"), ("8", NORM % 2), ("1,1,8", NORM % -1), ("1,8", "CumSum (scaled, axis)")],
    ids=["an op that mixes rows", "an axis from the front", "a factor with a batch", "an op nobody knows"],
)
def test_a_graph_that_is_not_understood_stays(factor: str, norm: str) -> None:
    model = decoder(factor, norm.replace("axis)", "zero)"))
    assert apply(drop_unit_batch, model, **FEEDS) == 0
    assert count(model, "Squeeze") == 1
