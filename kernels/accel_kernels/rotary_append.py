"""Rotation of packed queries and keys, and the keys' and values' way into the cache: prefill."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import let_successor_start, wait_for_predecessor


@triton.jit
def rotary_append_kernel(
    qkv,
    key_cache,
    value_cache,
    rows,
    slots,
    cos_table,
    sin_table,
    CAPACITY,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program per token: its queries in place, its keys and values to (row, head, slot)."""
    token = tl.program_id(0)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    DIM: tl.constexpr = 2 * HALF_DIM
    row = tl.load(rows + token).to(tl.int64)
    if row < 0:  # padding
        return
    slot = tl.load(slots + token).to(tl.int64)
    d = tl.arange(0, HALF)
    line = qkv + token.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    h = tl.arange(0, KV_PADDED)
    mask = (h < KV_HEADS)[:, None] & (d < HALF_DIM)[None]
    k = line + (HEADS + h)[:, None] * DIM + d[None]
    k1 = tl.load(k, mask=mask, other=0.0)
    k2 = tl.load(k + HALF_DIM, mask=mask, other=0.0)
    v1 = tl.load(k + KV_HEADS * DIM, mask=mask, other=0.0)
    v2 = tl.load(k + KV_HEADS * DIM + HALF_DIM, mask=mask, other=0.0)
    if ROTARY:
        cos = tl.load(cos_table + slot * HALF_DIM + d, mask=d < HALF_DIM, other=0.0).to(tl.float32)[None]
        sin = tl.load(sin_table + slot * HALF_DIM + d, mask=d < HALF_DIM, other=0.0).to(tl.float32)[None]
        g = tl.arange(0, PADDED)
        real = (g < HEADS)[:, None] & (d < HALF_DIM)[None]
        q = line + g[:, None] * DIM + d[None]
        q1 = tl.load(q, mask=real, other=0.0).to(tl.float32)
        q2 = tl.load(q + HALF_DIM, mask=real, other=0.0).to(tl.float32)
        element = qkv.dtype.element_ty
        tl.store(q, (q1 * cos - q2 * sin).to(element), mask=real)
        tl.store(q + HALF_DIM, (q2 * cos + q1 * sin).to(element), mask=real)
        f1 = k1.to(tl.float32)
        f2 = k2.to(tl.float32)
        k1 = (f1 * cos - f2 * sin).to(element)
        k2 = (f2 * cos + f1 * sin).to(element)
    cell = ((row * KV_HEADS + h)[:, None] * CAPACITY + slot) * DIM + d[None]
    tl.store(key_cache + cell, k1, mask=mask)
    tl.store(key_cache + cell + HALF_DIM, k2, mask=mask)
    tl.store(value_cache + cell, v1, mask=mask)
    tl.store(value_cache + cell + HALF_DIM, v2, mask=mask)


def rotary_append(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    *,
    heads: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    warps: int = 4,
    dependent: bool | None = None,
) -> None:
    """Writes packed tokens' keys and values into the cache; with tables, rotates queries (in place) and keys first.

    Args:
        qkv: [T, (H + 2 KV) * D]; its queries are rotated in place.
        key_cache, value_cache: [B, KV, C, D].
        rows: int32 [T], the cache row of each token; negative: padding.
        slots: int32 [T], its position there.
        cos, sin: [positions, D / 2] of half-rotation.
    """
    _, kv_heads, capacity, dim = key_cache.shape
    dependent = has_dependent_launch(qkv.device) if dependent is None else dependent
    rotary_append_kernel[(qkv.shape[0],)](
        qkv,
        key_cache,
        value_cache,
        rows,
        slots,
        cos,
        sin,
        capacity,
        HEADS=heads,
        KV_HEADS=kv_heads,
        PADDED=next_power_of_2(heads),
        KV_PADDED=next_power_of_2(kv_heads),
        HALF=next_power_of_2(dim // 2),
        HALF_DIM=dim // 2,
        ROTARY=cos is not None,
        DEPENDENT=dependent,
        num_warps=warps,
        **({"launch_pdl": True} if dependent else {}),
    )
