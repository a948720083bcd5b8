"""Attention of one new token per row over the cache: rotary, cache append and split-K in one kernel.

A program serves one row, one key head with its group of query heads, and one range of the cached positions. The
program that finishes a head last puts the ranges together, so there is no second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import Expect
from accel_kernels.decode_tiles import (
    attend_new,
    attend_older,
    cached,
    head_scales,
    join_ranges,
    leave_range,
    places_of,
    queries,
    range_of,
    scaled,
    store_heads,
)
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.narrow_cache import meaning, rounded
from accel_kernels.plain import attended, rotated
from accel_kernels.tiles import let_successor_start, wait_for_predecessor

# qkv comes in parts [P, B, (H + 2 KV) * D]. Rows that sit out keep their cache and get zeros.
BODY = (
    HEADER
    + """
DecodeAttention <heads, scale, softcap: float = 0.0, window: int = 0, rounding: int = 0>
    (qkv, key_cache, value_cache, past_lengths, cos, sin, key_scales, value_scales) => (out, new_keys, new_values)
{
    first = Constant <value_ints = [0]> ()
    axis = Constant <value_ints = [2]> ()
    behind = Constant <value_ints = [1, 2, 3]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    parts = Cast <to = 1> (qkv)
    packed = ReduceSum <keepdims = 0> (parts, first)
    past = Cast <to = 7> (past_lengths)
    sits_out = Less (past, zero)
    position = Max (past, zero)
    cos_lines = Gather <axis = 0> (cos, position)
    sin_lines = Gather <axis = 0> (sin, position)
    unturned_query, unturned_key, value = accel.kernels.Heads <heads: int = @heads> (packed, key_cache)
    query = accel.kernels.Rotate (unturned_query, cos_lines, sin_lines)
    key = accel.kernels.Rotate (unturned_key, cos_lines, sin_lines)
    stored_key = accel.kernels.Stored <rounding: int = @rounding> (key, key_scales)
    stored_value = accel.kernels.Stored <rounding: int = @rounding> (value, value_scales)
    key_line = Unsqueeze (stored_key, axis)
    value_line = Unsqueeze (stored_value, axis)
    typed_key = CastLike (key_line, key_cache)
    typed_value = CastLike (value_line, value_cache)
    keys = TensorScatter <axis = -2, mode = "linear"> (key_cache, typed_key, position)
    values = TensorScatter <axis = -2, mode = "linear"> (value_cache, typed_value, position)
    idle = Unsqueeze (sits_out, behind)
    new_keys = Where (idle, key_cache, keys)
    new_values = Where (idle, value_cache, values)
    kv_heads = Shape <start = 1, end = 2> (key_cache)
    dim = Shape <start = 3, end = 4> (key_cache)
    length = Shape <start = 2, end = 3> (key_cache)
    capacity = Squeeze (length, first)
    slots = Range (zero, capacity, one)
    newest = Unsqueeze (past, behind)
    size = Constant <value_int: int = @window> ()
    has_window = Greater (size, zero)
    behind_window = Sub (newest, size)
    before_all = Constant <value_int = -1> ()
    lowest = Where (has_window, behind_window, before_all)
    cached = LessOrEqual (slots, newest)
    near = Greater (slots, lowest)
    seen = And (cached, near)
    rest = Constant <value_ints = [-1]> ()
    groups = Concat <axis = 0> (first, kv_heads, rest, dim)
    grouped = Reshape (query, groups)
    no_bias = Constant <value_float = 0.0> ()
    meant_keys = accel.kernels.Meaning (keys, key_scales)
    meant_values = accel.kernels.Meaning (values, value_scales)
    result = accel.kernels.Attend <scale: float = @scale, softcap: float = @softcap>
        (grouped, meant_keys, meant_values, seen, no_bias)
    flat = Constant <value_ints = [0, -1]> ()
    out = Reshape (result, flat)
}
"""
)
# Scores and shares are products of the tensor cores: float32 is rounded to TF32 there.
TOLERANCES = {torch.float32: 4e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def reference(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    past_lengths: torch.Tensor,
    *,
    heads: int,
    scale: float,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``decode_attention`` computes of the same arguments.

    Returns:
        out [B, H * D], zeros for rows that sit out, and the caches with the new tokens, as they store them: float64.
    """
    rows, kv_heads, _, dim = key_cache.shape
    out = torch.zeros(rows, heads * dim, dtype=torch.float64, device=qkv.device)
    keys, values = key_cache.double(), value_cache.double()
    packed = qkv.double().reshape(-1, rows, heads + 2 * kv_heads, dim).sum(0)
    for row, past in enumerate(past_lengths.tolist()):
        if past < 0:
            continue
        lines = (None, None) if cos is None or sin is None else (cos[past : past + 1], sin[past : past + 1])
        turned = rotated(packed[row : row + 1, : heads + kv_heads], *lines)
        keys[row, :, past] = rounded(turned[0, heads:], key_scales, key_cache.dtype)
        values[row, :, past] = rounded(packed[row, heads + kv_heads :], value_scales, value_cache.dtype)
        seen = slice(0 if window is None else max(0, past + 1 - window), past + 1)
        meant = meaning(keys[row, :, seen], key_scales), meaning(values[row, :, seen], value_scales)
        ours = meant[0].transpose(0, 1), meant[1].transpose(0, 1)
        out[row] = attended(turned[:, :heads], *ours, scale, softcap).reshape(-1)
    return out, keys, values


@triton.jit
def decode_attention_kernel(
    qkv, key_cache, value_cache, past_lengths, cos_table, sin_table, key_scales, value_scales, partial, counters, out,
    CAPACITY, scale, softcap, window, least,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HALF_DIM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROTARY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, NARROW: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Halves of a head are kept apart: rotation mixes them element by element, the products add up.

    NARROW: queries take the keys' scales over, sums the values', so that tiles of the cache are converted and no more.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    DIM: tl.constexpr = 2 * HALF_DIM
    past = tl.load(past_lengths + row)  # set before the step; nothing in it changes it
    if past < 0:  # the row sits this step out
        return
    start, stop, used = range_of(split, past, window, least, SPLITS, HAS_WINDOW)
    if split >= used:
        return
    base = (row.to(tl.int64) * KV_HEADS + head) * CAPACITY * DIM
    d = tl.arange(0, HALF)
    # The first of the older positions: the kernel before does not touch them.
    k1, k2, v1, v2 = cached(key_cache, value_cache, base, start + tl.arange(0, BLOCK), stop, d, HALF_DIM)
    factor1, factor2, ks1, ks2, vs1, vs2, largest = head_scales(key_scales, value_scales, head, d, HALF_DIM, NARROW)
    scale *= largest
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    g = tl.arange(0, GROUP)
    line, q, real, size = places_of(qkv, row, head, g, d, HEADS, KV_HEADS, HALF_DIM)
    low1, low2, cos, sin = queries(
        q, past, out if NARROW else key_cache, cos_table, sin_table, real, d, size, factor1, factor2,
        HALF_DIM, PARTS, ROTARY, NARROW,
    )  # fmt: skip
    acc1, acc2, peak, weight = attend_older(
        key_cache, value_cache, base, start, stop, k1, k2, v1, v2, low1, low2, d, scale, softcap,
        GROUP, HALF, HALF_DIM, BLOCK, HAS_SOFTCAP,
    )  # fmt: skip
    if split == 0:
        acc1, acc2, peak, weight = attend_new(
            key_cache, value_cache, line, base, past, head, low1, low2, cos, sin, acc1, acc2, peak, weight, d, size,
            scale, softcap, ks1, ks2, vs1, vs2, HEADS, KV_HEADS, HALF_DIM, PARTS, ROTARY, HAS_SOFTCAP, NARROW,
        )  # fmt: skip
    acc1, acc2 = scaled(acc1, acc2, vs1, vs2, NARROW)
    target = out + row.to(tl.int64) * HEADS * DIM + (head * (HEADS // KV_HEADS) + g)[:, None] * DIM + d[None]
    if used == 1:
        store_heads(target, acc1, acc2, weight, real, HALF_DIM)
        return
    # partial: [rows, kv heads, SPLITS, GROUP, DIM + 2]
    home = (row * KV_HEADS + head) * SPLITS
    leave_range(partial + ((home + split) * GROUP + g) * (DIM + 2), d, acc1, acc2, peak, weight, real, HALF_DIM)
    counter = counters + row * KV_HEADS + head
    if tl.atomic_add(counter, 1) < used - 1:
        return
    join_ranges(partial, counter, target, home, used, g, d, real, GROUP, HALF, HALF_DIM)


def workspace(
    rows: int, kv_heads: int, group: int, dim: int, splits: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results float32 and arrival counters int32 (zero between calls) for ``decode_attention``.

    Args:
        group: Query heads per key head.
    """
    room = rows * kv_heads * splits * max(16, next_power_of_2(group)) * (dim + 2)
    return torch.empty(room, device=device), torch.zeros(rows * kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    past_lengths: torch.Tensor,
    out: torch.Tensor,
    space: tuple[torch.Tensor, torch.Tensor],
    *,
    heads: int,
    splits: int,
    scale: float,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    block: int = 64,
    least: int = 64,
    warps: int = 4,
    dependent: bool | None = None,
) -> torch.Tensor:
    """One new token of each row attends to its row's cache and to itself, and joins the cache.

    Every tensor on one device, contiguous.

    Args:
        qkv: [B, (H + 2 KV) * D], the new tokens' queries, keys and values; or [P, B, ...]: parts to be added.
        key_cache, value_cache: [B, KV, C, D], floats, int8 or float8_e4m3fn; slot ``past_lengths[b]`` is written.
        past_lengths: int32 [B], tokens in the cache, below C and the tables' length (nothing checks that on the
            device); negative: the row sits out, its cache and its output stay as they are.
        out: [B, H * D], written. Caches in 8 bits are multiplied in its type.
        space: From ``workspace`` with the same sizes.
        splits: Most ranges that a row's positions are cut into.
        cos, sin: [positions, D / 2] of half-rotation; None: queries and keys are as they should be.
        softcap: Scores are softcap * tanh(score / softcap).
        window: Sliding window, the own position included.
        key_scales, value_scales: float32 [KV, D] of caches in 8 bits, see ``rotary_append``; the new token attends to
            its own key and value as they are rounded.
        block: Positions per turn, a power of two from 16.
        least: Fewest positions of a range.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; a size is out of range.
    """
    narrow = _check(
        qkv, key_cache, value_cache, past_lengths, out, space, heads, splits, cos, sin, softcap, window, least,
        key_scales, value_scales,
    )  # fmt: skip
    rows, kv_heads, capacity, dim = key_cache.shape
    decode_attention_kernel[(rows, kv_heads, splits)](
        qkv, key_cache, value_cache, past_lengths, cos, sin, key_scales, value_scales, *space, out,
        capacity, scale, softcap or 0.0, window or 0, least,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=max(16, next_power_of_2(heads // kv_heads)),
        HALF=max(16, next_power_of_2(dim // 2)), HALF_DIM=dim // 2, SPLITS=splits, BLOCK=block,
        PARTS=qkv.numel() // (rows * (heads + 2 * kv_heads) * dim), ROTARY=cos is not None,
        HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None, NARROW=narrow,
        **launch_options(qkv.device, dependent, warps),
    )  # fmt: skip
    return out


def _check(
    qkv: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, past_lengths: torch.Tensor,
    out: torch.Tensor, space: tuple[torch.Tensor, torch.Tensor], heads: int, splits: int, cos: torch.Tensor | None,
    sin: torch.Tensor | None, softcap: float | None, window: int | None, least: int,
    key_scales: torch.Tensor | None, value_scales: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Whether the caches are in 8 bits."""
    expect = Expect("decode_attention", qkv.device)
    narrow = expect.cache(key_cache, value_cache, key_scales, value_scales)
    rows, kv_heads, _, dim = key_cache.shape
    expect.heads(heads, kv_heads)
    expect.tensor("qkv", qkv, *(-1,) * (qkv.ndim == 3), rows, (heads + 2 * kv_heads) * dim)
    expect.tensor("past_lengths", past_lengths, rows, dtypes=(torch.int32,))
    expect.tensor("out", out, rows, heads * dim)
    expect.tables(cos, sin, dim)
    expect.positive(softcap=softcap, window=window, splits=splits, least=least)
    partial, counters = space
    expect.tensor("partial results", partial, -1, dtypes=(torch.float32,))
    expect.tensor("counters", counters, -1, dtypes=(torch.int32,))
    room = rows * kv_heads * splits * max(16, next_power_of_2(heads // kv_heads)) * (dim + 2)
    expect.that(partial.numel() >= room and counters.numel() >= rows * kv_heads, "the workspace is too small")
    return narrow


__all__ = ["BODY", "TOLERANCES", "decode_attention", "reference", "workspace"]
