"""Attention of many queries per row: prefill over the cache, and encoders over packed tokens.

A program serves one query head and one block of one row's queries, and goes once over the keys that these can see.
The keys of a row stand BLOCK by BLOCK behind one pointer with a stride per token: a cache row, or packed tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import let_successor_start, wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def varlen_attention_kernel(
    query,
    keys,
    values,
    out,
    starts,
    stops,
    past_lengths,
    bias,
    query_stride,
    key_stride,
    key_head,
    key_row,
    out_stride,
    scale,
    softcap,
    window,
    room,
    bias_stride,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    CACHED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Row b's queries are tokens starts[b] .. stops[b]; with CACHED its keys lie at keys + b * key_row."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    first = tl.load(starts + row)
    length = tl.load(stops + row) - first
    if block * BLOCK_M >= tl.maximum(length, room):
        return
    past = 0
    if CACHED:
        past = tl.load(past_lengths + row)
    total = past + length
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDTH)
    token = (first + m).to(tl.int64)
    real = (m < length)[:, None] & (d < DIM)[None]
    q = tl.load(query + token[:, None] * query_stride + head * DIM + d[None], mask=real, other=0.0)
    base = (head // GROUP).to(tl.int64) * key_head
    if CACHED:
        base += row.to(tl.int64) * key_row
    else:
        base += first.to(tl.int64) * key_stride
    own = past + m  # positions
    low = 0
    high = total
    if CAUSAL:
        high = tl.minimum(total, past + (block + 1) * BLOCK_M)
    if HAS_WINDOW:
        low = tl.maximum(past + block * BLOCK_M - window, 0) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            high = tl.minimum(total, (block + 1) * BLOCK_M + window)
    if block * BLOCK_M >= length:  # padding alone
        high = 0
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    n = tl.arange(0, BLOCK_N)
    for at in range(low, high, BLOCK_N):
        slot = at + n
        inside = slot < total
        cell = base + slot.to(tl.int64)[:, None] * key_stride + d[None]
        mask = inside[:, None] & (d < DIM)[None]
        k = tl.load(keys + cell, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        if HAS_BIAS:
            place = bias + head.to(tl.int64) * bias_stride * bias_stride + m[:, None] * bias_stride + slot[None]
            scores += tl.load(place, mask=(m < length)[:, None] & inside[None], other=0.0).to(tl.float32)
        seen = inside[None]
        if CAUSAL:
            seen = seen & (slot[None] <= own[:, None])
            if HAS_WINDOW:
                seen = seen & (slot[None] > own[:, None] - window)
        elif HAS_WINDOW:
            seen = seen & (slot[None] - own[:, None] <= window) & (own[:, None] - slot[None] <= window)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(peak - safe)
        weight = weight * fade + tl.sum(share, 1)
        v = tl.load(values + cell, mask=mask, other=0.0)
        acc = acc * fade[:, None] + tl.dot(share.to(v.dtype), v)
        peak = higher
    result = tl.where((m < length)[:, None], acc / tl.where(weight == 0.0, 1.0, weight)[:, None], 0.0)
    kept = (m < tl.maximum(length, room))[:, None] & (d < DIM)[None]
    tl.store(out + token[:, None] * out_stride + head * DIM + d[None], result.to(out.dtype.element_ty), mask=kept)


def varlen_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    stops: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    longest: int,
    scale: float,
    past_lengths: torch.Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    bias: torch.Tensor | None = None,
    room: int = 0,
    block_m: int = 64,
    block_n: int = 64,
    warps: int = 4,
    stages: int = 3,
    dependent: bool | None = None,
) -> torch.Tensor:
    """Packed queries against their rows' keys.

    Args:
        query: [T, >= H * D], the queries first in each row; the row stride is the tensor's.
        keys, values: [B, KV, C, D] caches with ``past_lengths``; else packed [T, KV * D] views of one row stride.
        out: [T, H * D], written.
        starts, stops: int32 [B], each row's first token and the one behind its last.
        longest: At least the most tokens of a row.
        past_lengths: int32 [B], positions before the row's first query; its keys are in the cache already.
        window: causal: how many keys a query sees, itself included; else the largest distance.
        bias: [H, L, L], added to the scores; L >= longest.
        room: Tokens that each row has room for; those behind its last become zero.
    """
    cached = past_lengths is not None
    dependent = has_dependent_launch(query.device) if dependent is None else dependent
    rows = starts.numel()
    varlen_attention_kernel[(triton.cdiv(longest, block_m), heads, rows)](
        query,
        keys,
        values,
        out,
        starts,
        stops,
        past_lengths,
        bias,
        query.stride(0),
        dim if cached else keys.stride(0),
        keys.stride(1) if cached else dim,
        keys.stride(0) if cached else 0,
        out.stride(0),
        scale,
        softcap or 0.0,
        window or 0,
        room,
        0 if bias is None else bias.shape[-1],
        GROUP=heads // kv_heads,
        DIM=dim,
        WIDTH=max(16, next_power_of_2(dim)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        CAUSAL=causal,
        CACHED=cached,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=warps,
        num_stages=stages,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
