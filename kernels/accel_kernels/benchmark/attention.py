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
from accel_kernels.narrow_cache import EIGHT_BITS, FLOAT8_SM

_SCALES = ("key_scales", "value_scales")
_NAMES = {DTYPE: "fp16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
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
    make = {torch.int8: operands.int8, torch.float8_e4m3fn: operands.float8}.get(dtype, operands.normal)
    return operands.copies(lambda _: (make(*shape), make(*shape)), touched)


def _scales(operands: Operands, sizes: Decoder, cache: torch.dtype) -> dict[str, torch.Tensor]:
    """Of caches in 8 bits: with which the type's largest number is about 3."""
    if cache.itemsize > 1:
        return {}
    shape, least = (sizes.kv_heads, sizes.dim), 0.02 if cache == torch.int8 else 0.006
    return {name: least * (1 + operands.normal(*shape, dtype=torch.float32).abs() / 4) for name in _SCALES}


def _prepare_rotary(sizes: Decoder, sequences: int, tokens: int, cache: torch.dtype, operands: Operands) -> Problem:
    """Whole prompts of one length that find the cache empty. Queries are turned in place, again in each call.

    PyTorch turns keys in float32 where they are rounded to 8 bits: from fp16 some would become the next number.
    """
    count, heads, kv_heads, dim = sequences * tokens, sizes.heads, sizes.kv_heads, sizes.dim
    qkv = operands.normal(count, sizes.qkv.outputs)
    keys, values = _caches(operands, sizes, sequences, tokens, cache)(0)
    places = torch.arange(count, dtype=torch.int32, device=operands.device)
    rows, slots = places // tokens, places % tokens
    cos, sin = _tables(tokens, dim, operands.device)
    scales = _scales(operands, sizes, cache)
    options: dict[str, Any] = {"heads": heads, "cos": cos, "sin": sin, **scales}
    wide_cos, wide_sin = (table[:, None] for table in peers.whole_tables(cos, sin))
    exact_cos, exact_sin = (torch.cat([table, table], -1)[:, None] for table in (cos, sin))
    query, key, value = (
        part.view(sequences, tokens, -1, dim) for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )

    def run(_: int) -> tuple[torch.Tensor, ...]:
        rotary.rotary_append(qkv, keys, values, rows, slots, **options)
        return qkv, keys, values

    def peer(_: int) -> tuple[torch.Tensor, ...]:
        peers.turned(query, wide_cos, wide_sin, out=query)
        if scales:
            new = [peers.turned(key.float(), exact_cos, exact_sin), value]
            new = [peers.narrowed(part, scales[name], cache) for part, name in zip(new, _SCALES)]
        else:
            new = [peers.turned(key, wide_cos, wide_sin), value]
        for held, part in zip((keys, values), new):
            held[:, :, :tokens] = part.transpose(1, 2)
        return qkv, keys, values

    # Queries are read and written, keys and values read here and written there.
    moved = size_of(qkv, rows, slots, cos, sin, *scales.values())
    moved += count * dim * (heads * DTYPE.itemsize + 2 * kv_heads * cache.itemsize)
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
        _ways((query, keys, values, out, *limits), options | launch, launches.ENCODER_ATTENTION_TILES),
        peer,
        lambda: varlen.reference(query, keys, values, *limits, **options),
        size_of(qkv, out),
        4 * count * tokens * sizes.hidden,
    )


def _prepare_prompts(sizes: Decoder, sequences: int, tokens: int, cache: torch.dtype, operands: Operands) -> Problem:
    """Whole prompts of one length, causal; their keys have just been written to the cache."""
    heads, kv_heads, dim, count = sizes.heads, sizes.kv_heads, sizes.dim, sequences * tokens
    qkv = operands.normal(count, sizes.qkv.outputs)
    keys, values = _caches(operands, sizes, sequences, tokens, cache)(0)
    out = operands.unwritten(count, heads * dim)
    limits = _limits(sequences, tokens, operands.device)
    scales = _scales(operands, sizes, cache)
    options: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": dim**-0.5, "causal": True}
    options |= {"past_lengths": operands.numbers(*[0] * sequences), **scales}

    def peer(_: int) -> torch.Tensor:
        query = qkv[:, : heads * dim].view(sequences, tokens, heads, dim).transpose(1, 2)
        held = zip((keys, values), _SCALES)
        seen, read = (peers.widened(part[:, :, :tokens], scales.get(name)) for part, name in held)
        result = functional.scaled_dot_product_attention(query, seen, read, is_causal=True, enable_gqa=True)
        return result.transpose(1, 2).reshape(count, -1)

    pairs = sequences * tokens * (tokens + 1) // 2  # of queries and the keys that they see
    queries = qkv[:, : heads * dim]
    moved = 2 * queries.numel() + size_of(out, *scales.values()) + 2 * cache.itemsize * count * kv_heads * dim
    launch = {"block_n": 64 if dim <= 128 else 32}
    return Problem(
        _ways((qkv, keys, values, out, *limits), options | {"longest": tokens}, (launch,)),
        peer,
        lambda: varlen.reference(qkv, keys, values, *limits, **options),
        moved,
        4 * pairs * heads * dim,
    )


def _needs(cache: torch.dtype) -> tuple[int, int]:
    """The first compute capability that has caches of a type."""
    return FLOAT8_SM if cache == torch.float8_e4m3fn else (0, 0)


def _rotary_row(sizes: Decoder, sequences: int, tokens: int, cache: torch.dtype) -> Row:
    shape = f"{sequences} x {tokens} tokens, {sizes.heads} heads on {sizes.kv_heads} of {sizes.dim}"
    ops = "mul, neg, cat, mul, add; " + ("copies" if cache == DTYPE else "div, clamp, copies")
    prepare = partial(_prepare_rotary, sizes, sequences, tokens, cache)
    return Row("rotary_append", shape, _NAMES[cache], "", ops, prepare, _needs(cache))


def _decode_row(sizes: Decoder, rows: int, past: int, cache: torch.dtype) -> Row:
    shape = f"{rows} x 1 token, {past} in the cache, {sizes.heads} heads on {sizes.kv_heads} of {sizes.dim}"
    ops = f"rotation, copies, {'' if cache == DTYPE else 'mul, '}SDPA"
    prepare = partial(_prepare_decode, sizes, rows, past, cache)
    return Row("decode_attention", shape, _NAMES[cache], "cache", ops, prepare, _needs(cache))


def _prompts_row(sizes: Decoder, sequences: int, tokens: int, cache: torch.dtype) -> Row:
    shape = f"{sequences} x {tokens} tokens, causal, {sizes.heads} heads on {sizes.kv_heads} of {sizes.dim}"
    prepare = partial(_prepare_prompts, sizes, sequences, tokens, cache)
    return Row(
        "varlen_attention", shape, _NAMES[cache], "", "SDPA" if cache == DTYPE else "mul, SDPA", prepare, _needs(cache)
    )


def rows_of(shapes: Shapes) -> list[Row]:
    """All of them."""
    decoder, encoder = shapes.decoder, shapes.encoder
    prompts = ((1, shapes.prompt), (shapes.prompts, shapes.prompt), (1, shapes.long_prompt))
    found = [_rotary_row(decoder, *prompt, DTYPE) for prompt in prompts[:2]]
    found += [_rotary_row(decoder, *prompts[1], cache) for cache in EIGHT_BITS]
    found += [_decode_row(decoder, *past, DTYPE) for past in shapes.pasts]
    found += [_decode_row(decoder, *shapes.pasts[-1], cache) for cache in EIGHT_BITS]
    for sequences, tokens in shapes.batches:
        prepare = partial(_prepare_encoder, encoder, sequences, tokens)
        shape = f"{sequences} x {tokens} tokens, {encoder.heads} heads of {encoder.dim}"
        found.append(Row("varlen_attention", shape, "fp16", "", "SDPA", prepare))
    found += [_prompts_row(decoder, *prompt, DTYPE) for prompt in prompts]
    found += [_prompts_row(decoder, *prompts[-1], cache) for cache in EIGHT_BITS]
    return found


__all__ = ["rows_of"]
