"""Pieces of decode attention. Halves of a head are kept apart: rotation mixes them element by element."""

from __future__ import annotations

import triton
import triton.language as tl

from accel_kernels.narrow_cache import in_cache, operand_beside
from accel_kernels.tiles import cap_scores, operand, rotate


@triton.jit
def range_of(split, past, window, least, SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first position of a row's range and the one behind its last, and how many ranges there are."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(past + 1 - window, 0)
    span = tl.maximum(tl.cdiv(past - first, SPLITS), least)
    used = tl.maximum(tl.cdiv(past - first, span), 1)
    start = first + split * span
    return start, tl.minimum(start + span, past), used


@triton.jit
def places_of(qkv, row, head, g, d, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF_DIM: tl.constexpr):
    """A row's line in qkv, its group's queries in it, which of them are real, and a part's size."""
    DIM: tl.constexpr = 2 * HALF_DIM
    REAL: tl.constexpr = HEADS // KV_HEADS
    real = (g < REAL)[:, None] & (d < HALF_DIM)[None]
    line = qkv + row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    q = line + (head * REAL + g)[:, None] * DIM + d[None]
    size = tl.num_programs(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    return line, q, real, size


@triton.jit
def head_scales(key_scales, value_scales, head, d, HALF_DIM: tl.constexpr, NARROW: tl.constexpr):
    """Of one head, by halves: keys' scales by the largest of them, keys' and values' scales, and the largest.

    Behind the heads' ends they are 1. Without NARROW they are ones.
    """
    if NARROW:
        keys, values = key_scales + head * (2 * HALF_DIM) + d, value_scales + head * (2 * HALF_DIM) + d
        ks1 = tl.load(keys, mask=d < HALF_DIM, other=1.0)
        ks2 = tl.load(keys + HALF_DIM, mask=d < HALF_DIM, other=1.0)
        vs1 = tl.load(values, mask=d < HALF_DIM, other=1.0)
        vs2 = tl.load(values + HALF_DIM, mask=d < HALF_DIM, other=1.0)
        largest = tl.max(tl.where(d < HALF_DIM, tl.maximum(ks1, ks2), 0.0), 0)
        return ks1 / largest, ks2 / largest, ks1, ks2, vs1, vs2, largest
    else:
        return 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0


@triton.jit
def scaled(acc1, acc2, vs1, vs2, NARROW: tl.constexpr):
    """Sums of a cache's values as what they stand for."""
    if NARROW:
        acc1 *= vs1[None]
        acc2 *= vs2[None]
    return acc1, acc2


@triton.jit
def added(place, mask, size, PARTS: tl.constexpr):
    """What stands at a place in PARTS parts, added up in their order; float32."""
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(place + part * size, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def cached(key_cache, value_cache, base, slots, stop, d, HALF_DIM: tl.constexpr):
    """Both halves of the keys and of the values in the slots before ``stop``."""
    cell = base + slots.to(tl.int64)[:, None] * (2 * HALF_DIM) + d[None]
    mask = (slots < stop)[:, None] & (d < HALF_DIM)[None]
    k1 = tl.load(key_cache + cell, mask=mask, other=0.0)
    k2 = tl.load(key_cache + cell + HALF_DIM, mask=mask, other=0.0)
    v1 = tl.load(value_cache + cell, mask=mask, other=0.0)
    v2 = tl.load(value_cache + cell + HALF_DIM, mask=mask, other=0.0)
    return k1, k2, v1, v2


@triton.jit
def leave_range(cells, d, acc1, acc2, peak, weight, real, HALF_DIM: tl.constexpr):
    """Writes one range's sums, then peaks and weights, where the last program finds them."""
    tl.store(cells[:, None] + d[None], acc1, mask=real)
    tl.store(cells[:, None] + HALF_DIM + d[None], acc2, mask=real)
    tl.store(cells + 2 * HALF_DIM, peak)
    tl.store(cells + 2 * HALF_DIM + 1, weight)
    tl.debug_barrier()  # all of it stands there before this program says that it arrived


@triton.jit
def store_heads(target, acc1, acc2, weight, real, HALF_DIM: tl.constexpr):
    """Sums over weights, into both halves of the group's heads."""
    element = target.dtype.element_ty
    tl.store(target, (acc1 / weight[:, None]).to(element), mask=real)
    tl.store(target + HALF_DIM, (acc2 / weight[:, None]).to(element), mask=real)


@triton.jit
def join_ranges(
    partial, counter, target, first, used, g, d, real, GROUP: tl.constexpr, HALF: tl.constexpr, HALF_DIM: tl.constexpr
):
    """Puts all ranges of a head together, past the L1 cache, which does not see other programs' writes.

    Leaves the counter at zero for the next launch.
    """
    tl.store(counter, 0)
    tl.debug_barrier()
    DIM: tl.constexpr = 2 * HALF_DIM
    peak = tl.full((GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    acc1 = tl.zeros((GROUP, HALF), tl.float32)
    acc2 = tl.zeros((GROUP, HALF), tl.float32)
    for other in range(used):
        cells = partial + ((first + other) * GROUP + g) * (DIM + 2)
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
    store_heads(target, acc1, acc2, weight, real, HALF_DIM)


@triton.jit
def queries(
    q, past, like, cos_table, sin_table, real, d, size, factor1, factor2,
    HALF_DIM: tl.constexpr, PARTS: tl.constexpr, ROTARY: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Both halves of the group's queries, turned, in the type of ``like``; and what turned them.

    NARROW: times a factor per channel, at most 1.
    """
    q1 = added(q, real, size, PARTS)
    q2 = added(q + HALF_DIM, real, size, PARTS)
    cos = 1.0
    sin = 0.0
    if ROTARY:
        cos = tl.load(cos_table + past.to(tl.int64) * HALF_DIM + d, mask=d < HALF_DIM, other=0.0).to(tl.float32)
        sin = tl.load(sin_table + past.to(tl.int64) * HALF_DIM + d, mask=d < HALF_DIM, other=0.0).to(tl.float32)
        q1, q2 = rotate(q1, q2, cos[None], sin[None])
    if NARROW:
        q1 *= factor1[None]
        q2 *= factor2[None]
    element = like.dtype.element_ty
    return q1.to(element), q2.to(element), cos, sin


@triton.jit
def attend_older(
    key_cache, value_cache, base, start, stop, k1, k2, v1, v2, low1, low2, d, scale, softcap,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Softmax as it goes over the cached positions of the range, the first BLOCK of which are loaded already."""
    element = low1.dtype
    peak = tl.full((GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    acc1 = tl.zeros((GROUP, HALF), tl.float32)
    acc2 = tl.zeros((GROUP, HALF), tl.float32)
    for at in range(start, stop, BLOCK):
        slots = at + tl.arange(0, BLOCK)
        scores = tl.dot(operand(low1), operand_beside(tl.trans(k1), low1))
        scores += tl.dot(operand(low2), operand_beside(tl.trans(k2), low2))
        scores = cap_scores(scores * scale, softcap, HAS_SOFTCAP)
        scores = tl.where((slots < stop)[None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        share = tl.exp(scores - higher[:, None])
        fade = tl.exp(peak - higher)
        weight = weight * fade + tl.sum(share, 1)
        acc1 = acc1 * fade[:, None] + tl.dot(operand(share.to(element)), operand_beside(v1, low1))
        acc2 = acc2 * fade[:, None] + tl.dot(operand(share.to(element)), operand_beside(v2, low2))
        peak = higher
        k1, k2, v1, v2 = cached(key_cache, value_cache, base, slots + BLOCK, stop, d, HALF_DIM)
    return acc1, acc2, peak, weight


@triton.jit
def attend_new(
    key_cache, value_cache, line, base, past, head, low1, low2, cos, sin, acc1, acc2, peak, weight, d, size,
    scale, softcap, ks1, ks2, vs1, vs2, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF_DIM: tl.constexpr,
    PARTS: tl.constexpr, ROTARY: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Adds the new token from registers, as it stands in the cache from here on."""
    inside = d < HALF_DIM
    k = line + (HEADS + head) * (2 * HALF_DIM) + d
    new1 = added(k, inside, size, PARTS)
    new2 = added(k + HALF_DIM, inside, size, PARTS)
    if ROTARY:
        new1, new2 = rotate(new1, new2, cos, sin)
    v = line + (HEADS + KV_HEADS + head) * (2 * HALF_DIM) + d
    value1 = in_cache(added(v, inside, size, PARTS), vs1, value_cache, NARROW)
    value2 = in_cache(added(v + HALF_DIM, inside, size, PARTS), vs2, value_cache, NARROW)
    cell = base + past.to(tl.int64) * (2 * HALF_DIM) + d
    new1 = in_cache(new1, ks1, key_cache, NARROW)
    tl.store(key_cache + cell, new1, mask=inside)
    new2 = in_cache(new2, ks2, key_cache, NARROW)
    tl.store(key_cache + cell + HALF_DIM, new2, mask=inside)
    tl.store(value_cache + cell, value1, mask=inside)
    tl.store(value_cache + cell + HALF_DIM, value2, mask=inside)
    new1 = new1.to(tl.float32)
    new2 = new2.to(tl.float32)
    own = tl.sum(low1.to(tl.float32) * new1[None], 1) + tl.sum(low2.to(tl.float32) * new2[None], 1)
    own = cap_scores(own * scale, softcap, HAS_SOFTCAP)
    higher = tl.maximum(peak, own)
    share = tl.exp(own - higher)
    fade = tl.exp(peak - higher)
    weight = weight * fade + share
    acc1 = acc1 * fade[:, None] + share[:, None] * value1.to(tl.float32)[None]
    acc2 = acc2 * fade[:, None] + share[:, None] * value2.to(tl.float32)[None]
    return acc1, acc2, higher, weight
