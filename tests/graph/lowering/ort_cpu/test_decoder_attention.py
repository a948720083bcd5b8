from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.errors import FusionError
from accel.graph.lowering.ort_cpu import lower
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import assert_close, count, make, normal, run

HEADS, KV, CAPACITY = 4, 2, 16
LAYER = AttentionSpec(heads=HEADS, kv_heads=KV, head_dim=16, scale=0.4, causal=True)
ARCH = ArchSpec("llama", "LlamaForCausalLM", "decoder", "text-generation", 24, 11, 32, 100, False, (LAYER,))
STEPS = [(5, 2), (1, 3), (0, 1), (4, 1)]

ROTATED = """
  p = Cast <to = 1> (position_ids)
  row = Unsqueeze (p, zero)
  column = Unsqueeze (row, minus)
  angles = Mul (column, frequencies)
  cos = Cos (angles)
  sin = Sin (angles)
  q3 = Reshape (q, batched_q)
  k3 = Reshape (k, batched_k)
  qr = RotaryEmbedding <num_heads = %d, rotary_embedding_dim = %d> (q3, cos, sin)
  kr = RotaryEmbedding <num_heads = %d, rotary_embedding_dim = %d> (k3, cos, %s)
  qt = Reshape (qr, flat_q)
  kt = Reshape (kr, flat_k)
"""


def decoder(layer: AttentionSpec, rotary: int = 0, other_sine: bool = False, biased: bool = True) -> ir.Model:
    """One layer: projections of x [T, 24], their rotation by position, cached attention."""
    dim = layer.head_dim
    widths = {"q": HEADS * dim, "k": KV * dim, "v": KV * dim}
    weights: dict[str, Any] = {f"w{part}": normal(width, 24) * 0.3 for part, width in widths.items()}
    weights |= {f"b{part}": normal(width) for part, width in widths.items()}
    weights |= {"zero": np.array([0]), "minus": np.array([-1])}
    weights |= {"flat_q": np.array([-1, widths["q"]]), "flat_k": np.array([-1, widths["k"]])}
    weights |= {"batched_q": np.array([1, -1, widths["q"]]), "batched_k": np.array([1, -1, widths["k"]])}
    weights["frequencies"] = (3.0 ** -np.arange((rotary or dim) // 2)).astype(np.float32)
    kinds = {np.dtype(np.int64): "int64", np.dtype(np.float32): "float"}
    inputs = ", ".join(
        f"{kinds[value.dtype]}[{','.join(map(str, value.shape))}] {name}" for name, value in weights.items()
    )
    sizes = (HEADS, 0 if rotary == dim else rotary, KV, 0 if rotary == dim else rotary)
    turned = ROTATED % (*sizes, "cos" if other_sine else "sin") if rotary else ""
    extra = f", window = {layer.window}" if layer.window is not None else ""
    extra += f", softcap = {layer.softcap}" if layer.softcap is not None else ""
    projections = "\n".join(
        f"{part} = accel.Linear <transposed = 1> (x, w{part}{f', b{part}' if biased else ''})" for part in "qkv"
    )
    cache = f"float[B,{KV},C,{dim}]"
    text = f"""main (float[T,24] x, int64[T] position_ids, int32[B] past_lengths, int32[B] query_lengths,
      {cache} past_key, {cache} past_value, {inputs})
      => (float[T,{widths["q"]}] y, {cache} key, {cache} value)
      <float[T,{widths["q"]}] q, float[T,{widths["k"]}] k, float[T,{widths["v"]}] v, float[T,{widths["q"]}] a> {{
      {projections}
      {turned}
      a, key, value = accel.CachedAttention <num_heads = {HEADS}, kv_num_heads = {KV}, scale = 0.4{extra}>
        ({"qt, kt" if rotary else "q, k"}, v, past_key, past_value, past_lengths, query_lengths)
      y = Relu (a)
    }}"""
    return make(text, **weights)


def lowered_feeds(lengths: tuple[int, ...], past: NDArray[np.int32]) -> dict[str, NDArray]:
    """What the engine binds in place of past_lengths and query_lengths."""
    slots, ends = np.arange(max(lengths)), np.cumsum(lengths)
    real = slots < np.array(lengths)[:, None]
    starts = (ends - lengths)[:, None]
    totals = past + np.array(lengths, np.int32)
    return {
        "pad_index": np.where(real, starts + slots, 0),
        "unpad_index": np.flatnonzero(real),
        "seqlens_k": (totals - 1).astype(np.int32),
        "total_length": np.array(totals.max(), np.int32),
        "query_seqlens": np.array(lengths, np.int32),
    }


def check(layer: AttentionSpec, **options: Any) -> tuple[ir.Model, dict[str, int]]:
    """Lowers, and compares outputs and caches over ragged steps; returns the model and what was fused."""
    model = decoder(layer, **options)
    lowered, reports = lower(model, dataclasses.replace(ARCH, layers=(layer,)), 32)
    shape = (2, KV, CAPACITY, layer.head_dim)
    caches = [[np.zeros(shape, np.float32)] * 2 for _ in range(2)]
    past = np.zeros(2, np.int32)
    for seed, lengths in enumerate(STEPS):
        x = normal(sum(lengths), 24, seed=seed)
        positions = np.concatenate([np.arange(start, start + count) for start, count in zip(past, lengths)])
        common = {"x": x, "position_ids": positions}
        before, *caches[0] = run(
            model, **common, past_lengths=past, query_lengths=np.array(lengths, np.int32),
            past_key=caches[0][0], past_value=caches[0][1],
        )  # fmt: skip
        after, *caches[1] = run(
            lowered, **common, **lowered_feeds(lengths, past), past_key=caches[1][0], past_value=caches[1][1]
        )
        assert_close([after], [before])
        past = past + np.array(lengths, np.int32)
    return lowered, reports[0].fused


@pytest.mark.parametrize("window,softcap", [(None, None), (3, None), (1, None), (None, 1.5), (3, 1.5)])
def test_options(window: int | None, softcap: float | None) -> None:
    lowered, fused = check(dataclasses.replace(LAYER, window=window, softcap=softcap))
    assert fused == {"GroupQueryAttention": 1, "packed_qkv": 1, "rotary_in_attention": 0}
    (node,) = (node for node in lowered.graph if node.op_type == "GroupQueryAttention")
    assert node.name == "layers.0.attention" and len(node.inputs) == 17
    names = [value.name for value in lowered.graph.inputs]
    assert "past_lengths" not in names and "query_lengths" not in names
    assert "position_ids" not in names, "nothing reads them"


@pytest.mark.parametrize("dim,rotary,folded", [(16, 16, 1), (32, 32, 1), (32, 16, 1), (24, 24, 0), (16, 8, 0)])
def test_rotation(dim: int, rotary: int, folded: int) -> None:
    """In the kernel where its sizes allow, before it where they do not."""
    lowered, fused = check(dataclasses.replace(LAYER, head_dim=dim), rotary=rotary)
    assert (fused["rotary_in_attention"], fused["packed_qkv"]) == (folded, folded)
    assert count(lowered, "RotaryEmbedding") == 2 * (1 - folded)
    assert ("position_ids" in [value.name for value in lowered.graph.inputs]) == (not folded)
    if folded:
        assert lowered.graph.initializers["rotary.0.cos"].shape == ir.Shape([32, rotary // 2])


def test_query_and_key_by_other_angles_turn_before_the_kernel() -> None:
    lowered, fused = check(LAYER, rotary=16, other_sine=True)
    assert fused["rotary_in_attention"] == 0 and count(lowered, "RotaryEmbedding") == 2


def test_without_projection_biases() -> None:
    _, fused = check(LAYER, rotary=16, biased=False)
    assert (fused["packed_qkv"], fused["rotary_in_attention"]) == (1, 1)


def test_head_size_that_the_kernel_refuses() -> None:
    layer = dataclasses.replace(LAYER, head_dim=12)
    with pytest.raises(FusionError, match=r"head size 12 is not a multiple of 8.*layer 0"):
        lower(decoder(layer), dataclasses.replace(ARCH, layers=(layer,)), 32)
