from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.functions import attach
from tests.graph.attention_reference import CachedReference, bidirectional
from tests.graph.small import assert_close, make, normal, run

MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [0, 1])
def test_linear(transposed: int, bias: bool) -> None:
    shape = (4, 8) if transposed else (8, 4)
    text = f"""main (float[B,S,8] x, float[{shape[0]},{shape[1]}] w, float[4] b) => (float[B,S,4] y) {{
      y = accel.Linear <transposed = {transposed}> ({"x, w, b" if bias else "x, w"})
    }}"""
    x, w, b = normal(2, 3, 8), normal(*shape), normal(4)
    expected = x @ (w.T if transposed else w) + (b if bias else 0)
    assert_close(run(make(text, w=w, b=b), x=x), [expected])


def attention(heads: int, kv_heads: int, extra: str = "", bias: str = "") -> ir.Model:
    width = kv_heads * 8
    return make(f"""main (float[B,S,{heads * 8}] q, float[B,S,{width}] k, float[B,S,{width}] v, int64[B,S] mask {bias})
      => (float[B,S,{heads * 8}] y) {{
      y = accel.Attention <num_heads = {heads}, kv_num_heads = {kv_heads}, scale = 0.4 {extra}>
        (q, k, v, mask {", bias" if bias else ""})
    }}""")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 0, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention(kv_heads: int, window: int | None, softcap: float | None) -> None:
    extra = ("" if window is None else f", window = {window}") + ("" if softcap is None else f", softcap = {softcap}")
    q, k, v = normal(2, 6, 32), normal(2, 6, kv_heads * 8, seed=1), normal(2, 6, kv_heads * 8, seed=2)
    (found,) = run(attention(4, kv_heads, extra), q=q, k=k, v=v, mask=MASK)
    expected = bidirectional(q, k, v, MASK, 4, kv_heads, 0.4, window, softcap).astype(np.float32)
    assert_close([found[MASK == 1]], [expected[MASK == 1]])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_with_score_bias(rows: int) -> None:
    q, k, v, bias = normal(2, 6, 32), normal(2, 6, 16, seed=1), normal(2, 6, 16, seed=2), normal(rows, 4, 6, 6)
    model = attention(4, 2, bias=f", float[{'B' if rows > 1 else 1},4,S,S] bias")
    (found,) = run(model, q=q, k=k, v=v, mask=MASK, bias=bias)
    expected = bidirectional(q, k, v, MASK, 4, 2, 0.4, bias=bias).astype(np.float32)
    assert_close([found[MASK == 1]], [expected[MASK == 1]])


CACHED = """main (float[T,32] q, float[T,%d] k, float[T,%d] v, float[B,%d,C,8] past_key, float[B,%d,C,8] past_value,
    int32[B] past, int32[B] fresh) => (float[T,32] y, float[B,%d,C,8] key, float[B,%d,C,8] value) {
  y, key, value = accel.CachedAttention <num_heads = 4, kv_num_heads = %d, scale = 0.4 %s>
    (q, k, v, past_key, past_value, past, fresh)
}"""


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("window,softcap", [(None, None), (3, None), (None, 1.5), (1, 1.5)])
def test_cached_attention(kv_heads: int, window: int | None, softcap: float | None) -> None:
    extra = ("" if window is None else f", window = {window}") + ("" if softcap is None else f", softcap = {softcap}")
    model = make(CACHED % (*[kv_heads * 8] * 2, *[kv_heads] * 5, extra))
    reference = CachedReference(3, 4, kv_heads, 0.4, window, softcap)
    cache = [np.full((3, kv_heads, 12, 8), 9.0, np.float32)] * 2  # what an earlier request left must not be seen
    past = np.zeros(3, np.int32)
    for index, lengths in enumerate([(5, 2, 0), (1, 1, 4), (0, 3, 1), (2, 0, 0)]):
        tokens = sum(lengths)
        q, k, v = (normal(tokens, width, seed=index) for width in (32, kv_heads * 8, kv_heads * 8))
        feeds = {"q": q, "k": k, "v": v, "past_key": cache[0], "past_value": cache[1], "past": past}
        found, *cache = run(model, **feeds, fresh=np.array(lengths, np.int32))
        assert_close([found], [reference.step(q, k, v, lengths).astype(np.float32)])
        past = past + np.array(lengths, np.int32)
    for row, length in enumerate(past):
        assert np.all(cache[0][row, :, length:] == 9.0), "positions behind a row's end stay untouched"
        stored = cache[0][row, :, :length].transpose(1, 0, 2).reshape(length, -1)
        assert np.array_equal(stored, np.array(reference.keys[row], np.float32))


def test_one_function_per_signature() -> None:
    text = """main (float[B,S,16] x, int64[B,S] mask, float[16,16] w) => (float[B,S,16] y)
      <float[B,S,16] a, float[B,S,16] b, float[B,S,16] c> {
      a = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4> (x, x, x, mask)
      b = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4> (a, a, a, mask)
      c = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4, window = 2> (b, b, b, mask)
      y = accel.Linear <transposed = 1> (c, w)
    }"""
    model = make(text, w=normal(16, 16))
    assert attach(model) == 3
    first, second, third, _ = (node.overload for node in model.graph)
    assert first == second != third
    again = make(text, w=normal(16, 16))
    attach(again)
    assert set(again.functions) == set(model.functions), "names depend on the signature alone"
