from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.errors import FusionError, InputError
from accel.graph.lowering.ort_cpu import lower
from accel.kv_quantization import KvQuantization
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import assert_close, count, make, normal, run

HEADS, KV, CAPACITY = 4, 2, 16
LAYER = AttentionSpec(heads=HEADS, kv_heads=KV, head_dim=16, scale=0.4, causal=True)
ARCH = ArchSpec("llama", "LlamaForCausalLM", "decoder", "text-generation", 24, 11, 32, 100, False, (LAYER,))
LIMITS = {8: (-128, 127), 4: (-8, 7)}
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


# What the kernel does to the keys and values that it appends.
ROUNDED = """
  k_scaled = Div (%s, key_scales)
  k_near = Round (k_scaled)
  k_cut = Clip (k_near, lowest, highest)
  kd = Mul (k_cut, key_scales)
  v_scaled = Div (v, value_scales)
  v_near = Round (v_scaled)
  v_cut = Clip (v_near, lowest, highest)
  vd = Mul (v_cut, value_scales)
"""


def decoder(
    layer: AttentionSpec,
    rotary: int = 0,
    other_sine: bool = False,
    biased: bool = True,
    rounded: KvQuantization | None = None,
) -> ir.Model:
    """One layer: projections of x [T, 24], their rotation by position, cached attention.

    ``rounded``: keys and values are replaced by what their integers stand for.
    """
    dim = layer.head_dim
    widths = {"q": HEADS * dim, "k": KV * dim, "v": KV * dim}
    weights: dict[str, Any] = {f"w{part}": normal(width, 24) * 0.3 for part, width in widths.items()}
    weights |= {f"b{part}": normal(width) for part, width in widths.items()}
    weights |= {"zero": np.array([0]), "minus": np.array([-1])}
    weights |= {"flat_q": np.array([-1, widths["q"]]), "flat_k": np.array([-1, widths["k"]])}
    weights |= {"batched_q": np.array([1, -1, widths["q"]]), "batched_k": np.array([1, -1, widths["k"]])}
    weights["frequencies"] = (3.0 ** -np.arange((rotary or dim) // 2)).astype(np.float32)
    attended = ["qt" if rotary else "q", "kt" if rotary else "k", "v"]
    rounding = ""
    if rounded is not None:
        rounding, attended[1:] = ROUNDED % attended[1], ["kd", "vd"]
        weights["lowest"], weights["highest"] = (np.float32(limit) for limit in LIMITS[rounded.bits])
        for part, scales in (("key", rounded.keys[0]), ("value", rounded.values[0])):
            weights[f"{part}_scales"] = np.broadcast_to(scales.reshape(-1), KV * dim)
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
      {rounding}
      a, key, value = accel.CachedAttention <num_heads = {HEADS}, kv_num_heads = {KV}, scale = 0.4{extra}>
        ({", ".join(attended)}, past_key, past_value, past_lengths, query_lengths)
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


def unpacked(cache: NDArray, kv: KvQuantization, part: int) -> NDArray[np.float32]:
    """The numbers that an integer cache [B, KV, C, W] stands for; int4 pairs: the even channel in the lower half."""
    if kv.bits == 4:
        assert cache.dtype == np.uint8
        cache = np.stack([cache & 15, cache >> 4], -1).reshape(*cache.shape[:-1], -1).astype(np.int8) - 8
    assert cache.dtype == np.int8
    scales = (kv.keys, kv.values)[part][0]
    return cache * (scales[:, None] if kv.per_channel else scales)


def check(
    layer: AttentionSpec, kv: KvQuantization | None = None, **options: Any
) -> tuple[ir.Model, dict[str, int]]:
    """Lowers, and compares outputs and caches over ragged steps; returns the model and what was fused."""
    arch = dataclasses.replace(ARCH, layers=(layer,))
    lowered, reports = lower(decoder(layer, **options), arch, 32, kv=kv)
    model = decoder(layer, **options, rounded=kv)
    shape = (2, KV, CAPACITY, layer.head_dim)
    caches = [[np.zeros(shape, np.float32)] * 2 for _ in range(2)]
    if kv is not None:
        packed = (*shape[:-1], layer.head_dim * kv.bits // 8)
        caches[1] = [np.zeros(packed, np.int8 if kv.bits == 8 else np.uint8)] * 2
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
        found = caches[1] if kv is None else [unpacked(cache, kv, part) for part, cache in enumerate(caches[1])]
        for row, stop in enumerate(past):
            assert_close([cache[row, :, :stop] for cache in found], [cache[row, :, :stop] for cache in caches[0]])
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


def draw_scales(layer: AttentionSpec, bits: int, per_channel: bool = True) -> KvQuantization:
    """Scales of 4 standard deviations of what the test's projections give: some values are cut off."""
    shape = (KV, layer.head_dim) if per_channel else (1,)
    spread = np.random.default_rng(bits).uniform(0.8, 1.2, (2, *shape)) * 7 / LIMITS[bits][1]
    return KvQuantization(bits, (spread[0].astype(np.float32),), (spread[1].astype(np.float32),))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("window,softcap,per_channel", [(None, None, False), (3, 1.5, True), (None, 1.5, True)])
def test_integer_caches(bits: int, window: int | None, softcap: float | None, per_channel: bool) -> None:
    layer = dataclasses.replace(LAYER, window=window, softcap=softcap)
    lowered, fused = check(layer, draw_scales(layer, bits, per_channel))
    assert fused == {
        "GroupQueryAttention": 1, "packed_qkv": 1, "rotary_in_attention": 0, f"int{bits}_cache": 1,
    }  # fmt: skip
    dtype, width = (ir.DataType.INT8, 16) if bits == 8 else (ir.DataType.UINT8, 8)
    caches = [value for value in (*lowered.graph.inputs, *lowered.graph.outputs) if "key" in value.name]  # type: ignore[operator]
    assert [value.dtype for value in caches] == [dtype] * 2 and [value.shape[3] for value in caches] == [width] * 2  # type: ignore[index]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim,rotary", [(16, 16), (32, 16), (24, 24), (8, 0), (40, 0)])
def test_integer_caches_hold_rotated_keys(bits: int, dim: int, rotary: int) -> None:
    layer = dataclasses.replace(LAYER, head_dim=dim)
    check(layer, draw_scales(layer, bits), rotary=rotary)


def test_scales_that_do_not_fit() -> None:
    good = draw_scales(LAYER, 8)

    def refuses(match: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=match):
            arch = dataclasses.replace(ARCH, layers=(LAYER,))
            lower(decoder(LAYER), arch, 32, kv=dataclasses.replace(good, **changes))

    refuses("8 or 4 bits, not 6", bits=6)
    refuses("scales of 2 layers for a model of 1", keys=good.keys * 2)
    refuses(r"\[2, 8\], not float32 \[2, 16\].*kv.values, layer 0", values=(good.values[0][:, :8],))
    refuses(r"\[1\], not float32 \[2, 16\]", values=(good.values[0][0, :1],))
    refuses("not a positive number", keys=(np.zeros((KV, 16), np.float32),))
    refuses("not a positive number", values=(np.full((KV, 16), np.nan, np.float32),))
