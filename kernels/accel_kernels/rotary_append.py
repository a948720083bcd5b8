"""Rotation of packed queries and keys, and the keys' and values' way into the cache: prefill."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import FLOATS, Expect
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.narrow_cache import in_cache, rounded
from accel_kernels.plain import rotated
from accel_kernels.tiles import let_successor_start, rotate, wait_for_predecessor

# Tokens of negative rows are padding: dropped from the cache's updates, and left as they are.
BODY = (
    HEADER
    + """
RotaryAppend <heads, rounding: int = 0> (qkv, key_cache, value_cache, rows, slots, cos, sin, key_scales, value_scales)
    => (new_qkv, new_keys, new_values)
{
    axis1 = Constant <value_ints = [1]> ()
    pair = Constant <value_ints = [1, 2]> ()
    zero = Constant <value_int = 0> ()
    old_queries, old_keys, values = accel.kernels.Heads <heads: int = @heads> (qkv, key_cache)
    row = Cast <to = 7> (rows)
    slot = Cast <to = 7> (slots)
    is_padding = Less (row, zero)
    position = Where (is_padding, zero, slot)
    cos_lines = Gather <axis = 0> (cos, position)
    sin_lines = Gather <axis = 0> (sin, position)
    turned_queries = accel.kernels.Rotate (old_queries, cos_lines, sin_lines)
    keys = accel.kernels.Rotate (old_keys, cos_lines, sin_lines)
    typed_queries = CastLike (turned_queries, qkv)
    everywhere = Unsqueeze (is_padding, pair)
    queries = Where (everywhere, old_queries, typed_queries)
    joined = Concat <axis = 1> (queries, old_keys, values)
    shape = Shape (qkv)
    new_qkv = Reshape (joined, shape)
    is_real = Not (is_padding)
    kept_rows = Compress <axis = 0> (row, is_real)
    kept_slots = Compress <axis = 0> (slot, is_real)
    kept_keys = Compress <axis = 0> (keys, is_real)
    kept_values = Compress <axis = 0> (values, is_real)
    row_column = Unsqueeze (kept_rows, axis1)
    slot_column = Unsqueeze (kept_slots, axis1)
    cells = Concat <axis = 1> (row_column, slot_column)
    stored_keys = accel.kernels.Stored <rounding: int = @rounding> (kept_keys, key_scales)
    stored_values = accel.kernels.Stored <rounding: int = @rounding> (kept_values, value_scales)
    typed_keys = CastLike (stored_keys, key_cache)
    typed_values = CastLike (stored_values, value_cache)
    keys_by_slot = Transpose <perm = [0, 2, 1, 3]> (key_cache)
    values_by_slot = Transpose <perm = [0, 2, 1, 3]> (value_cache)
    keys_written = ScatterND (keys_by_slot, cells, typed_keys)
    values_written = ScatterND (values_by_slot, cells, typed_values)
    new_keys = Transpose <perm = [0, 2, 1, 3]> (keys_written)
    new_values = Transpose <perm = [0, 2, 1, 3]> (values_written)
}
"""
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    *,
    heads: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``rotary_append`` leaves in qkv and in the caches: float64."""
    tokens, (_, kv_heads, _, dim) = len(qkv), key_cache.shape
    keys, values = key_cache.double(), value_cache.double()
    result = qkv.double().reshape(tokens, -1, dim)
    real = rows >= 0
    row, slot = rows[real].long(), slots[real].long()
    lines = (None, None) if cos is None or sin is None else (cos[slot], sin[slot])
    turned = rotated(result[real, : heads + kv_heads], *lines)
    keys[row, :, slot] = rounded(turned[:, heads:], key_scales, key_cache.dtype)
    values[row, :, slot] = rounded(result[real, heads + kv_heads :], value_scales, value_cache.dtype)
    result[real, :heads] = turned[:, :heads]
    return result.reshape(tokens, -1), keys, values


@triton.jit
def _rotate_queries(line, cos, sin, d, HEADS: tl.constexpr, PADDED: tl.constexpr, HALF_DIM: tl.constexpr):
    """One token's queries, in place."""
    g = tl.arange(0, PADDED)
    real = (g < HEADS)[:, None] & (d < HALF_DIM)[None]
    q = line + g[:, None] * (2 * HALF_DIM) + d[None]
    q1 = tl.load(q, mask=real, other=0.0).to(tl.float32)
    q2 = tl.load(q + HALF_DIM, mask=real, other=0.0).to(tl.float32)
    element = line.dtype.element_ty
    q1, q2 = rotate(q1, q2, cos, sin)
    tl.store(q, q1.to(element), mask=real)
    tl.store(q + HALF_DIM, q2.to(element), mask=real)


@triton.jit
def _stored(x, scales, h, d, mask, cache, HALF_DIM: tl.constexpr):
    """One half of all heads as the cache holds it."""
    scale = tl.load(scales + h[:, None] * (2 * HALF_DIM) + d[None], mask=mask, other=1.0)
    return in_cache(x.to(tl.float32), scale, cache, True)


@triton.jit
def rotary_append_kernel(
    qkv, key_cache, value_cache, rows, slots, cos_table, sin_table, key_scales, value_scales, CAPACITY,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PADDED: tl.constexpr, KV_PADDED: tl.constexpr,
    HALF: tl.constexpr, HALF_DIM: tl.constexpr, ROTARY: tl.constexpr, NARROW: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
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
        _rotate_queries(line, cos, sin, d, HEADS, PADDED, HALF_DIM)
        f1, f2 = rotate(k1.to(tl.float32), k2.to(tl.float32), cos, sin)
        if NARROW:  # rounded once
            k1 = f1
            k2 = f2
        else:
            k1 = f1.to(qkv.dtype.element_ty)
            k2 = f2.to(qkv.dtype.element_ty)
    if NARROW:
        k1 = _stored(k1, key_scales, h, d, mask, key_cache, HALF_DIM)
        k2 = _stored(k2, key_scales + HALF_DIM, h, d, mask, key_cache, HALF_DIM)
        v1 = _stored(v1, value_scales, h, d, mask, value_cache, HALF_DIM)
        v2 = _stored(v2, value_scales + HALF_DIM, h, d, mask, value_cache, HALF_DIM)
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
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    warps: int = 4,
    dependent: bool | None = None,
) -> None:
    """Writes packed tokens' keys and values into the cache; with tables, rotates queries (in place) and keys first.

    Every tensor on one device, contiguous.

    Args:
        qkv: [T, (H + 2 KV) * D], in the caches' type where that is a float's; its queries are rotated in place.
        key_cache, value_cache: [B, KV, C, D], floats, int8 or float8_e4m3fn; the tokens' slots are written.
        rows: int32 [T], the cache row of each token; negative: padding.
        slots: int32 [T], its position there, below C and the tables' length; nothing checks that on the device.
        cos, sin: [positions, D / 2] of half-rotation; None: queries and keys are as they should be.
        key_scales, value_scales: float32 [KV, D] of caches in 8 bits, whose numbers are multiples of these: keys after
            their rotation and values, to the nearest (halves to the even one), cut off at the type's ends.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    expect = Expect("rotary_append", qkv.device)
    narrow = expect.cache(key_cache, value_cache, key_scales, value_scales)
    _, kv_heads, capacity, dim = key_cache.shape
    expect.tensor("qkv", qkv, -1, (heads + 2 * kv_heads) * dim, dtypes=FLOATS if narrow else (key_cache.dtype,))
    expect.tensor("rows", rows, len(qkv), dtypes=(torch.int32,))
    expect.tensor("slots", slots, len(qkv), dtypes=(torch.int32,))
    expect.tables(cos, sin, dim)
    rotary_append_kernel[(len(qkv),)](
        qkv, key_cache, value_cache, rows, slots, cos, sin, key_scales, value_scales, capacity,
        HEADS=heads, KV_HEADS=kv_heads, PADDED=next_power_of_2(heads), KV_PADDED=next_power_of_2(kv_heads),
        HALF=next_power_of_2(dim // 2), HALF_DIM=dim // 2, ROTARY=cos is not None,
        NARROW=narrow, **launch_options(qkv.device, dependent, warps),
    )  # fmt: skip


__all__ = ["BODY", "TOLERANCES", "reference", "rotary_append"]
