"""Attention of many queries per row: prefill over the cache, and encoders over packed tokens.

A program serves one query head and one block of one row's queries, and goes once over the keys that these can see.
The keys of a row stand BLOCK by BLOCK behind one pointer with a stride per token: a cache row, or packed tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import Expect
from accel_kernels.device import fitting_stages, launch_options, next_power_of_2
from accel_kernels.narrow_cache import EIGHT_BITS, meaning
from accel_kernels.plain import attended
from accel_kernels.tiles import from_the_end, let_successor_start, wait_for_predecessor
from accel_kernels.varlen_tiles import attend, visible

# query [T, H * D]; keys and values [B, KV, C, D], or, packed, [1, KV, T, D]. Tokens of no row get zeros.
BODY = (
    HEADER
    + """
VarlenAttention <heads, scale, softcap: float = 0.0, window: int = 0, causal: int = 0, packed: int = 0>
    (query, keys, values, starts, stops, past_lengths, bias, key_scales, value_scales) => (out)
{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    last = Constant <value_ints = [-1]> ()
    keep = Constant <value_ints = [0]> ()
    is_packed_number = Constant <value_int: int = @packed> ()
    is_packed = Greater (is_packed_number, zero)
    start = Cast <to = 7> (starts)
    stop = Cast <to = 7> (stops)
    past = Cast <to = 7> (past_lengths)
    token_axis = Shape <start = 0, end = 1> (query)
    tokens = Squeeze (token_axis, axis0)
    token = Range (zero, tokens, one)
    token_column = Unsqueeze (token, axis1)
    begun = LessOrEqual (start, token_column)
    not_ended = Less (token_column, stop)
    inside = And (begun, not_ended)
    inside_number = Cast <to = 7> (inside)
    row = ArgMax <axis = 1, keepdims = 0> (inside_number)
    is_token = ReduceMax (inside_number, axis1)
    is_real = Greater (is_token, zero)
    first_flat = Gather (start, row)
    end_flat = Gather (stop, row)
    past_flat = Gather (past, row)
    first = Unsqueeze (first_flat, axis1)
    end = Unsqueeze (end_flat, axis1)
    before = Unsqueeze (past_flat, axis1)
    index = Sub (token_column, first)
    own = Add (before, index)
    length = Sub (end, first)
    total = Add (before, length)
    key_row = Where (is_packed, zero, row)
    origin = Where (is_packed, first, zero)
    size_axis = Shape <start = 2, end = 3> (keys)
    size = Squeeze (size_axis, axis0)
    place = Range (zero, size, one)
    slot = Sub (place, origin)
    is_key = GreaterOrEqual (slot, zero)
    before_end = Less (slot, total)
    distance = Sub (own, slot)
    is_past = GreaterOrEqual (distance, zero)
    is_causal_number = Constant <value_int: int = @causal> ()
    is_causal = Greater (is_causal_number, zero)
    is_free = Not (is_causal)
    may_look = Or (is_free, is_past)
    width = Constant <value_int: int = @window> ()
    no_window = Equal (width, zero)
    distance_abs = Abs (distance)
    close = LessOrEqual (distance_abs, width)
    within = Less (distance, width)
    near_past = And (is_causal, within)
    near_both = And (is_free, close)
    near = Or (near_past, near_both)
    is_near = Or (no_window, near)
    seen0 = And (is_key, before_end)
    seen1 = And (seen0, may_look)
    seen2 = And (seen1, is_near)
    seen3 = And (seen2, is_real)
    heads_axes = Constant <value_ints = [1, 2]> ()
    seen = Unsqueeze (seen3, heads_axes)
    kv_heads = Shape <start = 1, end = 2> (keys)
    dim = Shape <start = 3, end = 4> (keys)
    by_group = Concat <axis = 0> (keep, kv_heads, last, dim)
    queries = Reshape (query, by_group)
    meant_keys = accel.kernels.Meaning (keys, key_scales)
    meant_values = accel.kernels.Meaning (values, value_scales)
    own_keys = Gather (meant_keys, key_row)
    own_values = Gather (meant_values, key_row)
    own_bias = accel.kernels.Bias (bias, index, slot)
    bias_shape = Concat <axis = 0> (keep, kv_heads, last, size_axis)
    grouped_bias = Reshape (own_bias, bias_shape)
    result = accel.kernels.Attend <scale: float = @scale, softcap: float = @softcap>
        (queries, own_keys, own_values, seen, grouped_bias)
    flat = Constant <value_ints = [0, -1]> ()
    out = Reshape (result, flat)
}
"""
)
# Scores and shares are products of the tensor cores: float32 is rounded to TF32 there.
TOLERANCES = {torch.float32: 4e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor,
    *, heads: int, kv_heads: int, dim: int, scale: float, past_lengths: torch.Tensor | None = None,
    causal: bool = False, softcap: float | None = None, window: int | None = None, bias: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None, value_scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What ``varlen_attention`` computes of the same arguments; zeros for tokens of no row: float64 [T, H * D]."""
    out = torch.zeros(len(query), heads * dim, dtype=torch.float64, device=query.device)
    pasts = [0] * len(starts) if past_lengths is None else past_lengths.tolist()
    for row, (start, stop, past) in enumerate(zip(starts.tolist(), stops.tolist(), pasts)):
        length, total = stop - start, past + stop - start
        if past_lengths is None:
            k, v = (tensor[start:stop, : kv_heads * dim].reshape(length, kv_heads, dim) for tensor in (keys, values))
        else:
            pairs = (keys, key_scales), (values, value_scales)
            k, v = (meaning(cache[row, :, :total], scales).transpose(0, 1) for cache, scales in pairs)
        distance = torch.arange(past, total)[:, None] - torch.arange(total)
        seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen &= distance < window if causal else distance.abs() <= window
        added = None if bias is None else bias[:, :length, :length]
        queries = query[start:stop, : heads * dim].reshape(length, heads, dim)
        result = attended(queries, k, v, scale, softcap, seen.to(query.device), added)
        out[start:stop] = result.reshape(length, heads * dim)
    return out


@triton.jit
def _wait_and_span(starts, stops, row, CACHED: tl.constexpr, DEPENDENT: tl.constexpr):
    """Waits for the predecessor; a row's first token, and how many it has. An encoder's come with its inputs, so they
    are asked for before.
    """
    if CACHED:
        wait_for_predecessor(DEPENDENT)
    first = tl.load(starts + row)
    length = tl.load(stops + row) - first
    if not CACHED:
        wait_for_predecessor(DEPENDENT)
    return first, length


@triton.jit
def varlen_attention_kernel(
    query, keys, values, out, starts, stops, past_lengths, bias, key_scales, value_scales,
    query_stride, key_stride, key_head, key_row, out_stride, scale, softcap, window, room, bias_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, CACHED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr, NARROW: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Row b's queries are tokens starts[b] .. stops[b]; with CACHED its keys lie at keys + b * key_row.

    NARROW: queries take the keys' scales over, sums the values', so that tiles of the cache are converted and no more.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    row = from_the_end(2)
    let_successor_start(DEPENDENT)
    first, length = _wait_and_span(starts, stops, row, CACHED, DEPENDENT)
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
    if NARROW:
        factors = tl.load(key_scales + head // GROUP * DIM + d, mask=d < DIM, other=0.0)
        largest = tl.max(factors, 0)
        q = (q.to(tl.float32) * (factors / largest)[None]).to(q.dtype)  # no larger than before: float16 holds it
        scale *= largest
    base = (head // GROUP).to(tl.int64) * key_head
    if CACHED:
        base += row.to(tl.int64) * key_row
    else:
        base += first.to(tl.int64) * key_stride
    own = past + m  # positions
    low, free, high = visible(block, past, length, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW)
    bias_rows = m
    if HAS_BIAS:
        bias_rows = bias + head.to(tl.int64) * bias_stride * bias_stride + m * bias_stride
    result = attend(
        q, keys + base, values + base, key_stride, bias_rows, m, own, length, total, low, free, high, d, scale,
        softcap, window, DIM, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, HAS_SOFTCAP, HAS_WINDOW, HAS_BIAS,
    )  # fmt: skip
    if NARROW:
        result *= tl.load(value_scales + head // GROUP * DIM + d, mask=d < DIM, other=0.0)[None]
    result = tl.where((m < length)[:, None], result, 0.0)
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
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    room: int = 0,
    block_m: int = 64,
    block_n: int = 64,
    warps: int = 4,
    stages: int = 3,
    dependent: bool | None = None,
) -> torch.Tensor:
    """Packed queries against their rows' keys. Every tensor on one device.

    Args:
        query: [T, >= H * D], the queries first in each row; the row stride is the tensor's.
        keys, values: [B, KV, C, D] caches with ``past_lengths``; else packed [T, >= KV * D] views of one row stride.
            In the queries' type; caches also in int8 or float8_e4m3fn, with scales.
        out: [T, H * D], written where a row has tokens.
        starts, stops: int32 [B], each row's first token and the one behind its last. Without a cache they are read
            before the predecessor ends: no kernel of ours in the same run may write them.
        longest: At least the most tokens of a row.
        past_lengths: int32 [B], positions before the row's first query; its keys are in the cache already.
        causal: A query sees no later position than its own.
        softcap: Scores are softcap * tanh(score / softcap).
        window: causal: how many keys a query sees, itself included; else the largest distance.
        bias: [H, L, L], added to the scores; L >= longest; without a cache only.
        key_scales, value_scales: float32 [KV, D] of caches in 8 bits, see ``rotary_append``.
        room: Tokens that each row has room for: what stands behind its last one becomes zero.
        stages: Fewer where shared memory is short.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; a size is out of range.
    """
    cached = past_lengths is not None
    Expect("varlen_attention", query.device).positive(scale=scale)  # the largest score is found before it is scaled
    narrow = _check(
        query, keys, values, out, starts, stops, heads, kv_heads, dim, longest, past_lengths, softcap, window, bias,
        key_scales, value_scales,
    )  # fmt: skip
    wide = max(16, next_power_of_2(dim))
    ahead = block_m * wide * 4 + (2 * block_n * wide * query.element_size() if narrow else 0)  # one turn, converted
    stages = fitting_stages(query.device, stages, 2 * block_n * wide * keys.element_size(), ahead)
    varlen_attention_kernel[(triton.cdiv(longest, block_m), heads, len(starts))](
        query, keys, values, out, starts, stops, past_lengths, bias, key_scales, value_scales,
        query.stride(0), dim if cached else keys.stride(0),
        keys.stride(1) if cached else dim, keys.stride(0) if cached else 0, out.stride(0), scale,
        softcap or 0.0, window or 0, room, 0 if bias is None else bias.shape[-1],
        GROUP=heads // kv_heads, DIM=dim, WIDTH=wide, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, CACHED=cached,
        HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None, HAS_BIAS=bias is not None,
        NARROW=narrow, **launch_options(query.device, dependent, warps, stages),
    )  # fmt: skip
    return out


def _check(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor, starts: torch.Tensor,
    stops: torch.Tensor, heads: int, kv_heads: int, dim: int, longest: int, past_lengths: torch.Tensor | None,
    softcap: float | None, window: int | None, bias: torch.Tensor | None, key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Whether keys and values are a cache in 8 bits."""
    narrow = False
    expect = Expect("varlen_attention", query.device)
    expect.heads(heads, kv_heads)
    expect.tensor("query", query, -1, -1, strided=True)
    expect.that(query.shape[1] >= heads * dim, f"query has {query.shape[1]} columns for {heads} heads of {dim}")
    if past_lengths is None:
        expect.tensor("keys", keys, len(query), -1, dtypes=(query.dtype,), strided=True)
        expect.tensor("values", values, len(query), -1, dtypes=(query.dtype,), strided=True)
        columns = min(keys.shape[1], values.shape[1])
        expect.that(columns >= kv_heads * dim, f"keys have {columns} columns for {kv_heads} heads of {dim}")
        expect.that(keys.stride(0) == values.stride(0), "keys and values have two row strides")
        expect.that(key_scales is None and value_scales is None, "packed keys and values have no scales")
    else:
        narrow = expect.cache(keys, values, key_scales, value_scales)
        expect.tensor("keys", keys, -1, kv_heads, -1, dim, dtypes=EIGHT_BITS if narrow else (query.dtype,))
        expect.that(len(keys) >= len(starts) and bias is None, "a cache has a row for each, and there is no bias")
    expect.tensor("out", out, len(query), heads * dim, strided=True)
    for name, tensor in (("starts", starts), ("stops", stops), ("past_lengths", past_lengths)):
        expect.tensor(name, tensor, len(starts), dtypes=(torch.int32,))
    expect.tensor("bias", bias, heads, -1, -1)
    expect.that(bias is None or bias.shape[1] == bias.shape[2] >= longest, "the bias is smaller than the longest row")
    expect.positive(softcap=softcap, window=window, longest=longest, dim=dim)
    return narrow


__all__ = ["BODY", "TOLERANCES", "reference", "varlen_attention"]
