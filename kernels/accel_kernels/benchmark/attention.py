"""Rows of attention and of what stands before it: rotary_append, decode_attention, varlen_attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from accel_kernels import decode_attention as decode
from accel_kernels import launches
from accel_kernels import rotary_append as rotary
from accel_kernels import varlen_attention as varlen
from accel_kernels.benchmark import peers
from accel_kernels.benchmark.problem import DTYPE, Copies, Operands, Problem, Row, size_of
from accel_kernels.benchmark.shapes import Decoder, Encoder, Shapes

_SCALES = ("key_scales", "value_scales")
_ROOM = 16  # a cache has room for a multiple of so many positions
_Caches = tuple[torch.Tensor, torch.Tensor]


def _tables(positions: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of half-rotation, float32 [positions, D / 2]."""
    rates = 500000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(positions, device=device)[:, None] * rates
    return angles.cos(), angles.sin()


def _caches(
    operands: Operands, sizes: Decoder, sequences: int, positions: int, dtype: torch.dtype = DTYPE
) -> Copies[_Caches]:
    """Keys and values [B, KV, C, D] of random numbers, C at least ``positions``; a copy per layer, so to speak."""
    shape = sequences, sizes.kv_heads, -(-positions // _ROOM) * _ROOM, sizes.dim
    touched = 2 * dtype.itemsize * sequences * sizes.kv_heads * positions * sizes.dim
    make = operands.normal if dtype == DTYPE else operands.int8
    return operands.copies(lambda _: (make(*shape), make(*shape)), touched)


def _scales(operands: Operands, sizes: Decoder, cache: torch.dtype) -> dict[str, torch.Tensor]:
    """Of caches in 8 bits: with which int8's largest number is about 3."""
    if cache.itemsize > 1:
        return {}
    shape = sizes.kv_heads, sizes.dim
    return {name: 0.02 + operands.normal(*shape, dtype=torch.float32).abs() / 200 for name in _SCALES}


def _prepare_rotary(sizes: Decoder, sequences: int, tokens: int, operands: Operands) -> Problem:
    """Whole prompts of one length that find the cache empty. Queries are turned in place, again in each call."""
    count, heads, kv_heads, dim = sequences * tokens, sizes.heads, sizes.kv_heads, sizes.dim
    qkv = operands.normal(count, sizes.qkv.outputs)
    keys, values = _caches(operands, sizes, sequences, tokens)(0)
    places = torch.arange(count, dtype=torch.int32, device=operands.device)
    rows, slots = places // tokens, places % tokens
    cos, sin = _tables(tokens, dim, operands.device)
    options: dict[str, Any] = {"heads": heads, "cos": cos, "sin": sin}
    wide_cos, wide_sin = (table[:, None] for table in peers.whole_tables(cos, sin))
    query, key, value = (
        part.view(sequences, tokens, -1, dim) for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )

    def run(_: int) -> tuple[torch.Tensor, ...]:
        rotary.rotary_append(qkv, keys, values, rows, slots, **options)
        return qkv, keys, values

    def peer(_: int) -> tuple[torch.Tensor, ...]:
        peers.turned(query, wide_cos, wide_sin, out=query)
        keys[:, :, :tokens] = peers.turned(key, wide_cos, wide_sin).transpose(1, 2)
        values[:, :, :tokens] = value.transpose(1, 2)
        return qkv, keys, values

    # Queries are read and written, keys and values read here and written there.
    moved = 2 * size_of(qkv) + size_of(rows, slots, cos, sin)
    return Problem({"warps 4": run}, peer, lambda: rotary.reference(qkv, keys, values, rows, slots, **options), moved)


def _qkv_of_step(operands: Operands, sizes: Decoder, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the product before leaves it: of several rows perhaps in parts. And the sum, fp16 [B, (H + 2 KV) * D]."""
    splits = 1 if rows == 1 else launches.narrow_split_tile(sizes.qkv, rows).splits
    if splits == 1:
        qkv = operands.normal(rows, sizes.qkv.outputs)
        return qkv, qkv
    parts = operands.normal(splits, rows, sizes.qkv.outputs, scale=splits**-0.5, dtype=torch.float32)
    return parts, parts.sum(0).to(DTYPE)


def _prepare_decode(sizes: Decoder, rows: int, past: int, cache: torch.dtype, operands: Operands) -> Problem:
    """Caches in 8 bits are dequantised by PyTorch before it attends."""
    heads, kv_heads, dim, device = sizes.heads, sizes.kv_heads, sizes.dim, operands.device
    qkv, whole = _qkv_of_step(operands, sizes, rows)
    caches = _caches(operands, sizes, rows, past + 1, cache)
    pasts = torch.full((rows,), past, dtype=torch.int32, device=device)
    cos, sin = _tables(past + 1, dim, device)
    scales = _scales(operands, sizes, cache)
    options: dict[str, Any] = {"heads": heads, "scale": dim**-0.5, "cos": cos, "sin": sin, **scales}
    launch = launches.decode_launch(rows, kv_heads, dim, past >= launches.SHORT_PAST, cache)
    space = decode.workspace(rows, kv_heads, heads // kv_heads, dim, launch["splits"], device)
    out = operands.unwritten(rows, heads * dim)
    last_cos, last_sin = (table[past] for table in peers.whole_tables(cos, sin))

    def run(index: int) -> tuple[torch.Tensor, ...]:
        keys, values = caches(index)
        decode.decode_attention(qkv, keys, values, pasts, out, space, **options, **launch)
        return out, keys, values

    def peer(index: int) -> tuple[torch.Tensor, ...]:
        both = caches(index)
        query, key, value = whole.view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
        seen = []
        for held, new, name in zip(both, (peers.turned(key, last_cos, last_sin), value), _SCALES):
            seen.append(peers.appended(held, new, past, scales.get(name)))
        query = peers.turned(query, last_cos, last_sin)[:, :, None]
        result = functional.scaled_dot_product_attention(query, seen[0], seen[1], enable_gqa=True)
        return result.reshape(rows, -1), *both

    cells = 2 * rows * kv_heads * dim * cache.itemsize  # bytes of one position
    moved = size_of(whole, out, pasts) + cells * (past + 1)
    reference = partial(decode.reference, qkv, *caches(0), pasts, **options)
    return Problem({launches.label(launch): run}, peer, reference, moved, 4 * rows * heads * dim * (past + 1))


def _limits(sequences: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rows of one length start and stop, int32 [B] each."""
    starts = torch.arange(sequences, dtype=torch.int32, device=device) * tokens
    return starts, starts + tokens


def _ways(
    attended: tuple[torch.Tensor, ...], options: Mapping[str, Any], candidates: tuple[dict[str, int], ...]
) -> dict[str, partial[torch.Tensor]]:
    """Calls of ``varlen_attention`` that take and ignore a copy's index."""
    query, keys, values, out, starts, stops = attended

    def run(launch: Mapping[str, Any], _: int) -> torch.Tensor:
        return varlen.varlen_attention(query, keys, values, out, starts, stops, **options, **launch)

    return {launches.label(launch): partial(run, launch) for launch in candidates}


def _prepare_encoder(sizes: Encoder, sequences: int, tokens: int, operands: Operands) -> Problem:
    """Full rows, packed."""
    heads, dim, count = sizes.heads, sizes.dim, sequences * tokens
    qkv = operands.normal(count, 3 * sizes.hidden)
    query, keys, values = qkv.split(sizes.hidden, 1)
    out = operands.unwritten(count, sizes.hidden)
    limits = _limits(sequences, tokens, operands.device)
    options: dict[str, Any] = {"heads": heads, "kv_heads": heads, "dim": dim, "scale": dim**-0.5}

    def peer(_: int) -> torch.Tensor:
        by_head = (part.view(sequences, tokens, heads, dim).transpose(1, 2) for part in (query, keys, values))
        return functional.scaled_dot_product_attention(*by_head).transpose(1, 2).reshape(count, -1)

    launch = {"longest": tokens, "room": tokens}
    return Problem(
        _ways((query, keys, values, out, *limits), options | launch, launches.ENCODER_ATTENTION),
        peer,
        lambda: varlen.reference(query, keys, values, *limits, **options),
        size_of(qkv, out),
        4 * count * tokens * sizes.hidden,
    )


def _prepare_prompts(sizes: Decoder, sequences: int, tokens: int, operands: Operands) -> Problem:
    """Whole prompts of one length, causal; their keys have just been written to the cache."""
    heads, kv_heads, dim, count = sizes.heads, sizes.kv_heads, sizes.dim, sequences * tokens
    qkv = operands.normal(count, sizes.qkv.outputs)
    keys, values = _caches(operands, sizes, sequences, tokens)(0)
    out = operands.unwritten(count, heads * dim)
    limits = _limits(sequences, tokens, operands.device)
    options: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": dim**-0.5, "causal": True}
    options["past_lengths"] = operands.numbers(*[0] * sequences)

    def peer(_: int) -> torch.Tensor:
        query = qkv[:, : heads * dim].view(sequences, tokens, heads, dim).transpose(1, 2)
        seen = keys[:, :, :tokens], values[:, :, :tokens]
        result = functional.scaled_dot_product_attention(query, *seen, is_causal=True, enable_gqa=True)
        return result.transpose(1, 2).reshape(count, -1)

    pairs = sequences * tokens * (tokens + 1) // 2  # of queries and the keys that they see
    queries = qkv[:, : heads * dim]
    moved = 2 * queries.numel() + size_of(out) + 2 * 2 * count * kv_heads * dim
    launch = {"block_n": 64 if dim <= 128 else 32}
    return Problem(
        _ways((qkv, keys, values, out, *limits), options | {"longest": tokens}, (launch,)),
        peer,
        lambda: varlen.reference(qkv, keys, values, *limits, **options),
        moved,
        4 * pairs * heads * dim,
    )


def _decode_row(sizes: Decoder, rows: int, past: int, cache: torch.dtype) -> Row:
    shape = f"{rows} x 1 token, {past} in the cache, {sizes.heads} heads on {sizes.kv_heads} of {sizes.dim}"
    dtype, ops = ("fp16", "") if cache == DTYPE else ("int8", "mul, ")
    prepare = partial(_prepare_decode, sizes, rows, past, cache)
    return Row("decode_attention", shape, dtype, "cache", f"rotation, copies, {ops}SDPA", prepare)


def rows_of(shapes: Shapes) -> list[Row]:
    """All of them."""
    decoder, encoder = shapes.decoder, shapes.encoder
    heads = f"{decoder.heads} heads on {decoder.kv_heads} of {decoder.dim}"
    prompts = ((1, shapes.prompt), (shapes.prompts, shapes.prompt), (1, shapes.long_prompt))
    found: list[Row] = []
    for sequences, tokens in prompts[:2]:
        prepare = partial(_prepare_rotary, decoder, sequences, tokens)
        shape = f"{sequences} x {tokens} tokens, {heads}"
        found.append(Row("rotary_append", shape, "fp16", "", "mul, neg, cat, mul, add; copies", prepare))
    for rows, past in shapes.pasts:
        found.append(_decode_row(decoder, rows, past, DTYPE))
    found.append(_decode_row(decoder, *shapes.pasts[-1], torch.int8))
    for sequences, tokens in shapes.batches:
        prepare = partial(_prepare_encoder, encoder, sequences, tokens)
        shape = f"{sequences} x {tokens} tokens, {encoder.heads} heads of {encoder.dim}"
        found.append(Row("varlen_attention", shape, "fp16", "", "SDPA", prepare))
    for sequences, tokens in prompts:
        prepare = partial(_prepare_prompts, decoder, sequences, tokens)
        shape = f"{sequences} x {tokens} tokens, causal, {heads}"
        found.append(Row("varlen_attention", shape, "fp16", "", "SDPA", prepare))
    return found


__all__ = ["rows_of"]
