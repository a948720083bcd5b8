"""Attention of one new token per row over the cache: rotary, cache append and split-K in one kernel.

A program serves one row, one key head with its group of query heads, and one range of the cached positions. The
program that finishes a head last puts the ranges together, so there is no second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import let_successor_start, wait_for_predecessor


@triton.jit
def _rotated(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _added(place, mask, size, PARTS: tl.constexpr):
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(place + part * size, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _cached(key_cache, value_cache, base, slots, stop, d, HALF_DIM: tl.constexpr):
    cell = base + slots.to(tl.int64)[:, None] * (2 * HALF_DIM) + d[None]
    mask = (slots < stop)[:, None] & (d < HALF_DIM)[None]
    k1 = tl.load(key_cache + cell, mask=mask, other=0.0)
    k2 = tl.load(key_cache + cell + HALF_DIM, mask=mask, other=0.0)
    v1 = tl.load(value_cache + cell, mask=mask, other=0.0)
    v2 = tl.load(value_cache + cell + HALF_DIM, mask=mask, other=0.0)
    return k1, k2, v1, v2


@triton.jit
def _capped(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    scores = scores * scale
    if HAS_SOFTCAP:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    return scores


@triton.jit
def decode_attention_kernel(
    qkv,
    key_cache,
    value_cache,
    past_lengths,
    cos_table,
    sin_table,
    partial,
    counters,
    out,
    CAPACITY,
    scale,
    softcap,
    window,
    least,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Halves of a head are kept apart: rotation mixes them element by element, the products add up."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    DIM: tl.constexpr = 2 * HALF_DIM
    REAL: tl.constexpr = HEADS // KV_HEADS
    past = tl.load(past_lengths + row)  # set before the step; nothing in it changes it
    if past < 0:  # the row sits this step out
        return
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(past + 1 - window, 0)
    span = tl.maximum(tl.cdiv(past - first, SPLITS), least)
    used = tl.maximum(tl.cdiv(past - first, span), 1)
    if split >= used:
        return
    start = first + split * span
    stop = tl.minimum(start + span, past)
    base = (row.to(tl.int64) * KV_HEADS + head) * CAPACITY * DIM
    d = tl.arange(0, HALF)
    # The first of the older positions: the kernel before does not touch them.
    slots = start + tl.arange(0, BLOCK)
    k1, k2, v1, v2 = _cached(key_cache, value_cache, base, slots, stop, d, HALF_DIM)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    g = tl.arange(0, GROUP)
    real = (g < REAL)[:, None] & (d < HALF_DIM)[None]
    line = qkv + row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    q = line + (head * REAL + g)[:, None] * DIM + d[None]
    size = tl.num_programs(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    q1 = _added(q, real, size, PARTS)
    q2 = _added(q + HALF_DIM, real, size, PARTS)
    if ROTARY:
        cos = tl.load(cos_table + past.to(tl.int64) * HALF_DIM + d, mask=d < HALF_DIM, other=0.0).to(tl.float32)
        sin = tl.load(sin_table + past.to(tl.int64) * HALF_DIM + d, mask=d < HALF_DIM, other=0.0).to(tl.float32)
        q1, q2 = _rotated(q1, q2, cos[None], sin[None])
    peak = tl.full((GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    acc1 = tl.zeros((GROUP, HALF), tl.float32)
    acc2 = tl.zeros((GROUP, HALF), tl.float32)
    element = key_cache.dtype.element_ty
    low1 = q1.to(element)
    low2 = q2.to(element)
    for at in range(start, stop, BLOCK):
        slots = at + tl.arange(0, BLOCK)
        scores = tl.dot(low1, tl.trans(k1)) + tl.dot(low2, tl.trans(k2))
        scores = _capped(scores, scale, softcap, HAS_SOFTCAP)
        scores = tl.where((slots < stop)[None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        share = tl.exp(scores - higher[:, None])
        fade = tl.exp(peak - higher)
        weight = weight * fade + tl.sum(share, 1)
        acc1 = acc1 * fade[:, None] + tl.dot(share.to(element), v1)
        acc2 = acc2 * fade[:, None] + tl.dot(share.to(element), v2)
        peak = higher
        k1, k2, v1, v2 = _cached(key_cache, value_cache, base, slots + BLOCK, stop, d, HALF_DIM)
    if split == 0:  # the new token itself, from registers, and into the cache
        k = line + (HEADS + head) * DIM + d
        new1 = _added(k, d < HALF_DIM, size, PARTS)
        new2 = _added(k + HALF_DIM, d < HALF_DIM, size, PARTS)
        if ROTARY:
            new1, new2 = _rotated(new1, new2, cos, sin)
        v = line + (HEADS + KV_HEADS + head) * DIM + d
        value1 = _added(v, d < HALF_DIM, size, PARTS).to(element)
        value2 = _added(v + HALF_DIM, d < HALF_DIM, size, PARTS).to(element)
        cell = base + past.to(tl.int64) * DIM + d
        tl.store(key_cache + cell, new1.to(element), mask=d < HALF_DIM)
        tl.store(key_cache + cell + HALF_DIM, new2.to(element), mask=d < HALF_DIM)
        tl.store(value_cache + cell, value1, mask=d < HALF_DIM)
        tl.store(value_cache + cell + HALF_DIM, value2, mask=d < HALF_DIM)
        new1 = new1.to(element).to(tl.float32)
        new2 = new2.to(element).to(tl.float32)
        own = tl.sum(low1.to(tl.float32) * new1[None], 1) + tl.sum(low2.to(tl.float32) * new2[None], 1)
        own = _capped(own, scale, softcap, HAS_SOFTCAP)
        higher = tl.maximum(peak, own)
        share = tl.exp(own - higher)
        fade = tl.exp(peak - higher)
        weight = weight * fade + share
        acc1 = acc1 * fade[:, None] + share[:, None] * value1.to(tl.float32)[None]
        acc2 = acc2 * fade[:, None] + share[:, None] * value2.to(tl.float32)[None]
        peak = higher
    target = out + row.to(tl.int64) * HEADS * DIM + (head * REAL + g)[:, None] * DIM + d[None]
    if used == 1:
        tl.store(target, (acc1 / weight[:, None]).to(out.dtype.element_ty), mask=real)
        tl.store(target + HALF_DIM, (acc2 / weight[:, None]).to(out.dtype.element_ty), mask=real)
        return
    # [rows, kv heads, SPLITS, GROUP, DIM + 2]: sums, then peak and weight
    WIDTH: tl.constexpr = DIM + 2
    cells = partial + (((row * KV_HEADS + head) * SPLITS + split) * GROUP + g) * WIDTH
    tl.store(cells[:, None] + d[None], acc1, mask=real)
    tl.store(cells[:, None] + HALF_DIM + d[None], acc2, mask=real)
    tl.store(cells + DIM, peak)
    tl.store(cells + DIM + 1, weight)
    tl.debug_barrier()
    counter = counters + row * KV_HEADS + head
    if tl.atomic_add(counter, 1) < used - 1:
        return
    tl.store(counter, 0)
    tl.debug_barrier()
    peak = tl.full((GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    acc1 = tl.zeros((GROUP, HALF), tl.float32)
    acc2 = tl.zeros((GROUP, HALF), tl.float32)
    for other in range(0, used):
        cells = partial + (((row * KV_HEADS + head) * SPLITS + other) * GROUP + g) * WIDTH
        theirs = tl.load(cells + DIM, cache_modifier=".cg")
        higher = tl.maximum(peak, theirs)
        fade = tl.exp(peak - higher)
        share = tl.exp(theirs - higher)
        weight = weight * fade + tl.load(cells + DIM + 1, cache_modifier=".cg") * share
        part1 = tl.load(cells[:, None] + d[None], mask=real, other=0.0, cache_modifier=".cg")
        part2 = tl.load(cells[:, None] + HALF_DIM + d[None], mask=real, other=0.0, cache_modifier=".cg")
        acc1 = acc1 * fade[:, None] + part1 * share[:, None]
        acc2 = acc2 * fade[:, None] + part2 * share[:, None]
        peak = higher
    tl.store(target, (acc1 / weight[:, None]).to(out.dtype.element_ty), mask=real)
    tl.store(target + HALF_DIM, (acc2 / weight[:, None]).to(out.dtype.element_ty), mask=real)


def workspace(
    rows: int, kv_heads: int, group: int, dim: int, splits: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results float32 and arrival counters int32 (zero between calls) for ``decode_attention``."""
    padded = max(16, next_power_of_2(group))
    partial = torch.empty(rows * kv_heads * splits * padded * (dim + 2), dtype=torch.float32, device=device)
    return partial, torch.zeros(rows * kv_heads, dtype=torch.int32, device=device)


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

    Args:
        qkv: [B, (H + 2 KV) * D], the new tokens' queries, keys and values; or float32 [P, B, ...]: parts to be added.
        key_cache, value_cache: [B, KV, C, D]; slot ``past_lengths[b]`` is written.
        past_lengths: int32 [B], tokens in the cache; negative: the row sits out.
        out: [B, H * D], written.
        space: From ``workspace`` with the same sizes.
        splits: Most ranges that a row's positions are cut into.
        cos, sin: [positions, D / 2] of half-rotation; None: queries and keys are as they should be.
        window: Sliding window, the own position included.
        least: Fewest positions of a range.
    """
    rows, kv_heads, capacity, dim = key_cache.shape
    dependent = has_dependent_launch(qkv.device) if dependent is None else dependent
    decode_attention_kernel[(rows, kv_heads, splits)](
        qkv,
        key_cache,
        value_cache,
        past_lengths,
        cos,
        sin,
        *space,
        out,
        capacity,
        scale,
        softcap or 0.0,
        window or 0,
        least,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=max(16, next_power_of_2(heads // kv_heads)),
        HALF=max(16, next_power_of_2(dim // 2)),
        HALF_DIM=dim // 2,
        SPLITS=splits,
        BLOCK=block,
        PARTS=qkv.numel() // (rows * (heads + 2 * kv_heads) * dim),
        ROTARY=cos is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        DEPENDENT=dependent,
        num_warps=warps,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
