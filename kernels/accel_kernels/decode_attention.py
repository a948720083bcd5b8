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
    join_ranges,
    leave_range,
    queries,
    ranges_of,
    store_heads,
)
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.plain import attended, rotated
from accel_kernels.tiles import let_successor_start, wait_for_predecessor

# qkv comes in parts [P, B, (H + 2 KV) * D]. Rows that sit out keep their cache and get zeros.
BODY = (
    HEADER
    + """
DecodeAttention <heads, scale, softcap: float = 0.0, window: int = 0>
    (qkv, key_cache, value_cache, past_lengths, cos, sin) => (out, new_keys, new_values)
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
    key_line = Unsqueeze (key, axis)
    value_line = Unsqueeze (value, axis)
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
    result = accel.kernels.Attend <scale: float = @scale, softcap: float = @softcap>
        (grouped, keys, values, seen, no_bias)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``decode_attention`` computes of the same arguments.

    Returns:
        out [B, H * D], zeros for rows that sit out, and the caches with the new tokens: float64.
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
        keys[row, :, past], values[row, :, past] = turned[0, heads:], packed[row, heads + kv_heads :]
        seen = slice(0 if window is None else max(0, past + 1 - window), past + 1)
        ours = keys[row, :, seen].transpose(0, 1), values[row, :, seen].transpose(0, 1)
        out[row] = attended(turned[:, :heads], *ours, scale, softcap).reshape(-1)
    return out, keys, values


@triton.jit
def decode_attention_kernel(
    qkv, key_cache, value_cache, past_lengths, cos_table, sin_table, partial, counters, out,
    CAPACITY, scale, softcap, window, least,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HALF_DIM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROTARY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Halves of a head are kept apart: rotation mixes them element by element, the products add up."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    DIM: tl.constexpr = 2 * HALF_DIM
    REAL: tl.constexpr = HEADS // KV_HEADS
    past = tl.load(past_lengths + row)  # set before the step; nothing in it changes it
    if past < 0:  # the row sits this step out
        return
    first, span, used = ranges_of(past, window, least, SPLITS, HAS_WINDOW)
    if split >= used:
        return
    start = first + split * span
    stop = tl.minimum(start + span, past)
    base = (row.to(tl.int64) * KV_HEADS + head) * CAPACITY * DIM
    d = tl.arange(0, HALF)
    # The first of the older positions: the kernel before does not touch them.
    k1, k2, v1, v2 = cached(key_cache, value_cache, base, start + tl.arange(0, BLOCK), stop, d, HALF_DIM)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    g = tl.arange(0, GROUP)
    real = (g < REAL)[:, None] & (d < HALF_DIM)[None]
    line = qkv + row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    q = line + (head * REAL + g)[:, None] * DIM + d[None]
    size = tl.num_programs(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    low1, low2, cos, sin = queries(q, past, key_cache, cos_table, sin_table, real, d, size, HALF_DIM, PARTS, ROTARY)
    acc1, acc2, peak, weight = attend_older(
        key_cache, value_cache, base, start, stop, k1, k2, v1, v2, low1, low2, d, scale, softcap,
        GROUP, HALF, HALF_DIM, BLOCK, HAS_SOFTCAP,
    )  # fmt: skip
    if split == 0:
        acc1, acc2, peak, weight = attend_new(
            key_cache, value_cache, line, base, past, head, low1, low2, cos, sin, acc1, acc2, peak, weight, d, size,
            scale, softcap, HEADS, KV_HEADS, HALF_DIM, PARTS, ROTARY, HAS_SOFTCAP,
        )  # fmt: skip
    target = out + row.to(tl.int64) * HEADS * DIM + (head * REAL + g)[:, None] * DIM + d[None]
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
    block: int = 64,
    least: int = 64,
    warps: int = 4,
    dependent: bool | None = None,
) -> torch.Tensor:
    """One new token of each row attends to its row's cache and to itself, and joins the cache.

    Every tensor on one device, contiguous.

    Args:
        qkv: [B, (H + 2 KV) * D], the new tokens' queries, keys and values; or [P, B, ...]: parts to be added.
        key_cache, value_cache: [B, KV, C, D]; slot ``past_lengths[b]`` is written.
        past_lengths: int32 [B], tokens in the cache, below C and the tables' length (nothing checks that on the
            device); negative: the row sits out, its cache and its output stay as they are.
        out: [B, H * D], written.
        space: From ``workspace`` with the same sizes.
        splits: Most ranges that a row's positions are cut into.
        cos, sin: [positions, D / 2] of half-rotation; None: queries and keys are as they should be.
        softcap: Scores are softcap * tanh(score / softcap).
        window: Sliding window, the own position included.
        block: Positions per turn, a power of two from 16.
        least: Fewest positions of a range.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; a size is out of range.
    """
    _check(qkv, key_cache, value_cache, past_lengths, out, space, heads, splits, cos, sin, softcap, window, least)
    rows, kv_heads, capacity, dim = key_cache.shape
    decode_attention_kernel[(rows, kv_heads, splits)](
        qkv, key_cache, value_cache, past_lengths, cos, sin, *space, out,
        capacity, scale, softcap or 0.0, window or 0, least,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=max(16, next_power_of_2(heads // kv_heads)),
        HALF=max(16, next_power_of_2(dim // 2)), HALF_DIM=dim // 2, SPLITS=splits, BLOCK=block,
        PARTS=qkv.numel() // (rows * (heads + 2 * kv_heads) * dim), ROTARY=cos is not None,
        HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None,
        **launch_options(qkv.device, dependent, warps),
    )  # fmt: skip
    return out


def _check(
    qkv: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, past_lengths: torch.Tensor,
    out: torch.Tensor, space: tuple[torch.Tensor, torch.Tensor], heads: int, splits: int, cos: torch.Tensor | None,
    sin: torch.Tensor | None, softcap: float | None, window: int | None, least: int,
) -> None:  # fmt: skip
    expect = Expect("decode_attention", qkv.device)
    expect.cache(key_cache, value_cache)
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


__all__ = ["BODY", "TOLERANCES", "decode_attention", "reference", "workspace"]
