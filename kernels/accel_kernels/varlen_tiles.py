"""Pieces of attention of several queries per row: which slots are seen, and a softmax that goes block by block."""

from __future__ import annotations

import triton
import triton.language as tl

from accel_kernels.narrow_cache import operand_beside
from accel_kernels.tiles import cap_scores, operand

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible(
    block, past, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The range of slots that a block of queries sees anything of, and where each sees all, but for a window."""
    total = past + length
    low = 0
    high = total
    if CAUSAL:
        high = tl.minimum(total, past + (block + 1) * BLOCK_M)
    if HAS_WINDOW:
        low = tl.maximum(past + block * BLOCK_M - window, 0) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            high = tl.minimum(total, past + (block + 1) * BLOCK_M + window)
    free = total // BLOCK_N * BLOCK_N
    if CAUSAL:
        free = tl.minimum(free, (past + block * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
    if block * BLOCK_M >= length:  # padding alone
        free = 0
        high = 0
    return low, free, high


@triton.jit
def _is_seen(slot, own, inside, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether a query may look at a slot, [M, N]."""
    seen = inside[None]
    if CAUSAL:
        seen = seen & (slot[None] <= own[:, None])
        if HAS_WINDOW:
            seen = seen & (slot[None] > own[:, None] - window)
    elif HAS_WINDOW:
        seen = seen & (slot[None] - own[:, None] <= window) & (own[:, None] - slot[None] <= window)
    return seen


@triton.jit
def _by_eights(tile):
    """[M, N] as [M, N / 8, 8]: tensor cores leave what stands eight columns apart in one thread, so that a reduction
    along the second axis is a few short chains of its own instructions.
    """
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // 8, 8))


@triton.jit
def _turn(
    at, peak, weight, acc, q, keys, values, key_stride, bias_rows, m, own, length, total, d, scale, softcap,
    window, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes BLOCK_N slots in; without MASKED every query sees each of them, and there is no bias.

    ``weight``, [M, 8], is added up when all turns are over.
    """
    n = tl.arange(0, BLOCK_N)
    slot = at + n
    inside = slot < total
    # One 64-bit product per turn: its own places are near one another.
    first = (tl.full((), 0, tl.int64) + at) * key_stride
    keys += first
    values += first
    cell = n[:, None] * key_stride + d[None]
    if MASKED or DIM != WIDTH:
        mask = inside[:, None] & (d < DIM)[None]
        k = tl.load(keys + cell, mask=mask, other=0.0)
        v = tl.load(values + cell, mask=mask, other=0.0)
    else:
        k = tl.load(keys + cell)
        v = tl.load(values + cell)
    scores = tl.dot(operand(q), operand_beside(tl.trans(k), q))
    factor = scale * _LOG2E
    if HAS_SOFTCAP or HAS_BIAS:
        scores = cap_scores(scores * scale, softcap, HAS_SOFTCAP)
        if HAS_BIAS:
            place = bias_rows[:, None] + slot[None]
            scores += tl.load(place, mask=(m < length)[:, None] & inside[None], other=0.0).to(tl.float32)
        factor = _LOG2E
    if MASKED:
        scores = tl.where(_is_seen(slot, own, inside, window, CAUSAL, HAS_WINDOW), scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(tl.max(_by_eights(scores), 1), 1) * factor)
    safe = higher
    if MASKED:
        safe = tl.where(higher == float("-inf"), 0.0, higher)
    share = tl.exp2(scores * factor - safe[:, None])
    fade = tl.exp2(peak - safe)
    weight = weight * fade[:, None] + tl.sum(_by_eights(share), 1)
    acc = acc * fade[:, None] + tl.dot(operand(share.to(q.dtype)), operand_beside(v, q))
    return higher, weight, acc


@triton.jit
def attend(
    q, keys, values, key_stride, bias_rows, m, own, length, total, low, free, high, d, scale, softcap, window,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Softmax as it goes over the slots from ``low`` to ``high``; a query that sees nothing gets zeros.

    Every query sees what lies before ``free``, a multiple of BLOCK_N.
    """
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M, 8), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    if not HAS_WINDOW and not HAS_BIAS:
        for at in range(0, free, BLOCK_N):
            peak, weight, acc = _turn(
                at, peak, weight, acc, q, keys, values, key_stride, bias_rows, m, own, length, total, d, scale,
                softcap, window, DIM, WIDTH, BLOCK_N, CAUSAL, HAS_SOFTCAP, HAS_WINDOW, HAS_BIAS, False,
            )  # fmt: skip
        low = free
    if not CAUSAL and not HAS_WINDOW and not HAS_BIAS:  # less than a block is left: a loop would cost its start
        if low < high:
            peak, weight, acc = _turn(
                low, peak, weight, acc, q, keys, values, key_stride, bias_rows, m, own, length, total, d, scale,
                softcap, window, DIM, WIDTH, BLOCK_N, CAUSAL, HAS_SOFTCAP, HAS_WINDOW, HAS_BIAS, True,
            )  # fmt: skip
        high = low
    for at in range(low, high, BLOCK_N):
        peak, weight, acc = _turn(
            at, peak, weight, acc, q, keys, values, key_stride, bias_rows, m, own, length, total, d, scale,
            softcap, window, DIM, WIDTH, BLOCK_N, CAUSAL, HAS_SOFTCAP, HAS_WINDOW, HAS_BIAS, True,
        )  # fmt: skip
    sums = tl.sum(weight, 1)
    return acc / tl.where(sums == 0.0, 1.0, sums)[:, None]
