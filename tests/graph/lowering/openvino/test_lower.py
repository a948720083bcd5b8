from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from accel.errors import FusionError
from accel.graph.external import INLINE_BYTES
from accel.graph.lowering.openvino import lower
from accel.spec import AttentionSpec
from tests.graph.lowering.ort_cpu.test_encoder_attention import ARCH, LAYER, MASKS, model_of
from tests.graph.small import assert_close, count, make, normal, ops, run


def check(model: ir.Model, layer: AttentionSpec = LAYER) -> ir.Model:
    """Lowers, and compares on every mask; what padding gives is left out."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lowered, _ = lower(model, dataclasses.replace(ARCH, layers=(layer,)), ARCH.max_positions)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before, "the canonical graph stays as it is"
    for mask in MASKS.values():
        length = mask.shape[1]
        feeds = {
            "x": normal(2, length, 16),
            "attention_mask": mask,
            "table": normal(1, layer.heads, length, length),
            "target": np.array([2, layer.heads, length, length]),
        }
        (expected,), (found,) = run(model, **feeds), run(lowered, **feeds)
        assert_close([found[mask == 1]], [expected[mask == 1]])
    assert {node.domain for node in lowered.graph} == {""}
    return lowered


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("window", [None, 2, 100])
def test_plain_heads(window: int | None, biased: bool) -> None:
    layer = dataclasses.replace(LAYER, window=window)
    lowered = check(model_of(layer, biased), layer)
    assert [count(lowered, kind) for kind in ("MatMul", "Softmax", "Split")] == [3, 1, 1], "one product for all three"
    assert "layers.0.attention" in {node.name for node in lowered.graph}


def test_softcap_and_score_bias() -> None:
    capped = dataclasses.replace(LAYER, softcap=0.7)
    assert count(check(model_of(capped), capped), "Tanh") == 1
    check(model_of(LAYER, scores="1"))
    windowed = dataclasses.replace(LAYER, window=2)
    check(model_of(windowed, scores="1"), windowed)


GROUPED = AttentionSpec(heads=4, kv_heads=2, head_dim=4, scale=0.4)


def grouped(extra: str = "", scores: str = "") -> ir.Model:
    """Four heads of queries over two of keys and values."""
    text = f"""main (float[B,S,16] x, int64[B,S] attention_mask, float[1,4,S,S] table, int64[4] target,
      float[16,16] wq, float[8,16] wk, float[8,16] wv, float[16] bq, float[8] bk, float[8] bv) => (float[B,S,16] y)
      <float[B,S,16] q, float[B,S,8] k, float[B,S,8] v, float[B,S,16] a> {{
      q = accel.Linear <transposed = 1> (x, wq, bq)
      k = accel.Linear <transposed = 1> (x, wk, bk)
      v = accel.Linear <transposed = 1> (x, wv, bv)
      {"scores = Expand (table, target)" if scores else ""}
      a = accel.Attention <num_heads = 4, kv_num_heads = 2, scale = 0.4{extra}> (q, k, v, attention_mask{scores})
      y = Relu (a)
    }}"""
    weights = {"wq": normal(16, 16), "wk": normal(8, 16, seed=1), "wv": normal(8, 16, seed=2)}
    return make(text, **weights, bq=normal(16), bk=normal(8, seed=1), bv=normal(8, seed=2))


@pytest.mark.parametrize("window", [None, 2])
def test_grouped_heads(window: int | None) -> None:
    layer = dataclasses.replace(GROUPED, window=window)
    assert count(check(grouped(f", window = {window}" if window else ""), layer), "Split") == 1
    check(grouped(f", window = {window}" if window else "", ", scores"), layer)


def test_projections_of_two_inputs_stay_apart() -> None:
    text = """main (float[B,S,16] x, int64[B,S] attention_mask, float[16,16] w) => (float[B,S,16] y)
      <float[B,S,16] q, float[B,S,16] z, float[B,S,16] k, float[B,S,16] a> {
      q = accel.Linear <transposed = 1> (x, w)
      z = Relu (x)
      k = accel.Linear <transposed = 1> (z, w)
      a = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4> (q, k, k, attention_mask)
      y = Relu (a)
    }"""
    assert "Split" not in ops(check(make(text, w=normal(16, 16))))


@pytest.mark.parametrize("change", ["one bias missing", "another layout"])
def test_projections_that_differ_stay_apart(change: str) -> None:
    model = model_of(LAYER)
    if change == "one bias missing":
        model.graph[1].resize_inputs(2)
    else:
        model.graph[1].attributes["transposed"] = ir.AttrInt64("transposed", 0)
    assert "Split" not in ops(check(model))


def test_weights_are_joined_in_the_graph_and_stored_once() -> None:
    """Whatever is large enough for a weight file is the canonical graph's own."""
    model = model_of(LAYER)
    lowered, _ = lower(model, ARCH, 32)
    assert count(lowered, "Concat") == 2, "weights and biases"
    stored = {name for name, value in lowered.graph.initializers.items() if value.const_value.nbytes >= INLINE_BYTES}  # type: ignore[union-attr]
    assert stored <= set(model.graph.initializers)


def test_a_row_of_padding_stays_finite_and_changes_nobody() -> None:
    for window in (None, 2):
        layer = dataclasses.replace(LAYER, window=window)
        lowered, _ = lower(model_of(layer), dataclasses.replace(ARCH, layers=(layer,)), 32)
        x, mask = normal(3, 5, 16), np.array([[1] * 5, [0] * 5, [1, 1, 1, 0, 0]])
        unread = {"table": normal(1, 2, 5, 5), "target": np.array([3, 2, 5, 5])}
        (whole,) = run(lowered, x=x, attention_mask=mask, **unread)
        (alone,) = run(lowered, x=x[2:, :3], attention_mask=mask[2:, :3], **unread)
        assert np.isfinite(whole).all()
        np.testing.assert_allclose(whole[2, :3], alone[0], atol=1e-6)


def test_what_has_no_lowering() -> None:
    with pytest.raises(FusionError, match=r"only encoders .*openvino"):
        lower(model_of(LAYER), dataclasses.replace(ARCH, kind="decoder"), 32)
    text = "main (float[B,S,16] x, int64[B,S] attention_mask) => (float[B,S,16] y) { y = accel.Unheard (x) }"
    with pytest.raises(FusionError, match=r"nodes without a lowering: accel::Unheard \(at openvino\)"):
        lower(make(text), dataclasses.replace(ARCH, layers=()), 32)


def test_the_same_graph_twice() -> None:
    first, second = (ir.to_proto(lower(model_of(LAYER), ARCH, 32)[0]) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
