"""Rows of what works element by element: norm, activation, gather, argmax, advance."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from accel_kernels import activation as activations
from accel_kernels import argmax as best_of
from accel_kernels import gather as rows_kernel
from accel_kernels import launches
from accel_kernels import norm as norms
from accel_kernels import sample as sampling
from accel_kernels.advance import advance
from accel_kernels.benchmark import peers
from accel_kernels.benchmark.problem import DTYPE, Operands, Problem, Row, size_of
from accel_kernels.benchmark.shapes import Encoder, Layer, Shapes
from accel_kernels.tiles import LAYER_NORM, RMS_NORM

_EPS = 1e-5


def _prepare_rms(size: int, rows: int, parts: int, operands: Operands) -> Problem:
    """A decoder's: the stream is float32; ``parts`` 0: the product before has added itself to it."""
    x, weight = operands.normal(rows, size, dtype=torch.float32), operands.normal(size, mean=1.0, dtype=torch.float32)
    residual = None
    if parts:
        shape, dtype = ((parts, rows, size), torch.float32) if parts > 1 else ((rows, size), DTYPE)
        residual = operands.normal(*shape, dtype=dtype)
    out, stream = operands.unwritten(rows, size), torch.empty_like(x) if parts else None

    def run(_: int) -> tuple[torch.Tensor, ...]:
        norms.norm(x, weight, out, eps=_EPS, kind=RMS_NORM, residual=residual, stream=stream)
        return (out,) if stream is None else (out, stream)

    def peer(_: int) -> tuple[torch.Tensor, ...]:
        total = x
        if residual is not None:
            total = x + (residual.sum(0) if parts > 1 else residual)
        result = functional.rms_norm(total, (size,), weight, _EPS).to(DTYPE)
        return (result,) if stream is None else (result, total)

    def reference() -> tuple[torch.Tensor, ...]:
        both = norms.reference(x, weight, eps=_EPS, kind=RMS_NORM, residual=residual)
        return both[:1] if stream is None else both

    return Problem({"warps 4": run}, peer, reference, size_of(x, weight, residual, out, stream))


def _prepare_layer_norm(size: int, rows: int, operands: Operands) -> Problem:
    """An encoder's: stream and residual are fp16, and nobody else reads their sum."""
    x, residual, out = operands.normal(rows, size), operands.normal(rows, size), operands.unwritten(rows, size)
    weight, bias = (operands.normal(size, mean=mean, dtype=torch.float32) for mean in (1.0, 0.0))
    low = weight.to(DTYPE), bias.to(DTYPE)
    options: dict[str, Any] = {"eps": _EPS, "kind": LAYER_NORM, "bias": bias, "residual": residual}
    return Problem(
        {"warps 4": lambda _: norms.norm(x, weight, out, **options)},
        lambda _: functional.layer_norm(x + residual, (size,), *low, _EPS),
        lambda: norms.reference(x, weight, **options)[0],
        size_of(x, weight, bias, residual, out),
    )


def _prepare_activation(layer: Layer, rows: int, operands: Operands) -> Problem:
    """What a product of cuBLAS left; gated: in stripes, as the weights are."""
    x = operands.normal(rows, layer.outputs * (1 + layer.gated))
    out = operands.unwritten(rows, layer.outputs)
    options: dict[str, Any] = {"kind": layer.activation, "gated": layer.gated, "stripe": layer.stripe}
    pair = peers.halves(x.T, layer.stripe).T.contiguous()

    def peer(_: int) -> torch.Tensor:
        if not layer.gated:
            return peers.activated(x, layer.activation)
        gate, other = pair.chunk(2, 1)
        return peers.activated(gate, layer.activation) * other

    return Problem(
        {"block 2048 warps 4": lambda _: activations.activation(x, out, **options)},
        peer,
        lambda: activations.reference(x, **options),
        size_of(x, out),
    )


def _prepare_gather(vocabulary: int, size: int, count: int, operands: Operands) -> Problem:
    """Embeddings of tokens: the stream is float32."""
    table = operands.normal(vocabulary, size)
    ids = operands.copies(lambda _: operands.below(vocabulary, count), 2 * count * size)
    out = operands.unwritten(count, size, dtype=torch.float32)
    return Problem(
        {"warps 4": lambda i: rows_kernel.gather(table, ids(i), out)},
        lambda i: functional.embedding(ids(i), table).float(),
        lambda: rows_kernel.reference(table, ids(0)),
        size_of(ids(0), out) + 2 * count * size,
    )


def _prepare_embeddings(encoder: Encoder, sequences: int, tokens: int, operands: Operands) -> Problem:
    """An encoder's words, positions and segments, added up and normalized."""
    size, count = encoder.hidden, sequences * tokens
    words, positions, segments = (operands.normal(n, size) for n in (encoder.vocabulary, encoder.positions, 2))
    ids, places = operands.below(encoder.vocabulary, count), torch.arange(tokens, device=operands.device)
    kinds, out = operands.below(2, count), operands.unwritten(count, size)
    weight, bias = operands.normal(size, mean=1.0, dtype=torch.float32), operands.normal(size, dtype=torch.float32)
    options: dict[str, Any] = {"second": (segments, kinds), "third": (positions, places), "norm": LAYER_NORM}
    options |= {"norm_weight": weight, "norm_bias": bias, "eps": _EPS}
    low = weight.to(DTYPE), bias.to(DTYPE)

    def peer(_: int) -> torch.Tensor:
        by_token = functional.embedding(ids, words) + functional.embedding(kinds, segments)
        total = by_token.view(sequences, tokens, size) + functional.embedding(places, positions)
        return functional.layer_norm(total, (size,), *low, eps=_EPS).view(count, size)

    return Problem(
        {"warps 4": lambda _: rows_kernel.gather(words, ids, out, **options)},
        peer,
        lambda: rows_kernel.reference(words, ids, **options),
        size_of(ids, places, kinds, out, weight, bias) + 2 * (count + tokens + 2) * size,
    )


def _prepare_argmax(vocabulary: int, rows: int, operands: Operands) -> Problem:
    logits = operands.normal(rows, vocabulary, dtype=torch.float32)
    ids = torch.empty(rows, dtype=torch.int64, device=operands.device)
    values = operands.unwritten(rows, dtype=torch.float32)
    space = best_of.argmax_workspace(rows, operands.device)

    def run(_: int) -> tuple[torch.Tensor, ...]:
        return best_of.argmax(logits, ids, values, space), values

    def peer(_: int) -> tuple[torch.Tensor, ...]:
        found = logits.max(1)
        return found.indices, found.values

    return Problem(
        {"span 2048 warps 4": run}, peer, lambda: best_of.reference(logits), size_of(logits, ids, values)
    )


def _prepare_sample(vocabulary: int, rows: int, operands: Operands) -> Problem:
    """Scores as spread as a model's: a few tokens have nearly all of the mass."""
    temperature, top_k, top_p = 0.8, min(50, vocabulary // 2), 0.95
    logits = operands.normal(rows, vocabulary, scale=3.0, dtype=torch.float32)
    uniforms = torch.linspace(0.05, 0.95, rows, dtype=torch.float64, device=operands.device)
    draws = torch.tensor([temperature, top_k, top_p, 0.0, 0.0], dtype=torch.float64, device=operands.device)
    draws = draws.repeat(rows, 1)
    draws[:, 4] = uniforms
    ids = torch.empty(rows, dtype=torch.int64, device=operands.device)
    values = operands.unwritten(rows, dtype=torch.float32)
    space = sampling.sample_workspace(rows, vocabulary, operands.device)

    def run(_: int) -> tuple[torch.Tensor, ...]:
        return sampling.sample(logits, draws, ids, values, space), values

    def peer(_: int) -> tuple[torch.Tensor, ...]:
        scores, tokens = logits.topk(top_k)
        weights = (scores / temperature).softmax(-1)
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0.0)
        tokens, order = tokens.sort(-1)
        ends = weights.gather(1, order).double().cumsum(-1)
        place = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True)
        found = tokens.gather(1, place)
        return found[:, 0], logits.gather(1, found)[:, 0]

    reference = partial(sampling.reference, logits, draws)
    return Problem({"span 2048 warps 4": run}, peer, reference, size_of(logits, draws, ids, values))


def _prepare_advance(vocabulary: int, rows: int, operands: Operands) -> Problem:
    """The host is told in page-locked memory of its own, where there is a GPU."""
    best = operands.below(vocabulary, 2 * rows)
    ids, positions = operands.below(vocabulary, rows), operands.below(100, rows)
    lengths = positions.to(torch.int32)
    told = torch.zeros(2, 2 * rows, dtype=torch.int64, pin_memory=operands.device.type == "cuda")
    turn = operands.numbers(0)
    places = ids, positions, lengths, told, turn

    def run(_: int) -> tuple[torch.Tensor, ...]:
        advance(best, ids, positions, lengths, told.view(-1), turn)
        return places

    def peer(_: int) -> tuple[torch.Tensor, ...]:
        ids.copy_(best[:rows])
        told[0].copy_(best, non_blocking=True)  # always there: which place it is would have to be known to the host
        active = lengths >= 0
        positions.add_(active)
        lengths.add_(active)
        turn.neg_().add_(1)
        return places

    def reference() -> tuple[torch.Tensor, ...]:
        there = torch.stack([best.cpu(), torch.zeros(2 * rows, dtype=torch.int64)])
        return best[:rows].clone(), positions + 1, lengths + 1, there, turn + 1

    moved = size_of(best, ids, told[0], turn, turn) + 2 * size_of(positions, lengths)
    return Problem({"warps 4": run}, peer, reference, moved)


def _norm_rows(shapes: Shapes) -> list[Row]:
    found, size = [], shapes.decoder.hidden
    several = shapes.few[-1]
    parts = launches.narrow_split_tile(shapes.decoder.down, several).splits
    for rows, count in ((1, 0), (several, parts), (shapes.prompts * shapes.prompt, 1)):
        extra = {0: "", 1: ", fp16 residual"}.get(count, f", residual in {count} fp32 parts")
        ops = ", ".join(["sum"] * (count > 1) + ["add"] * (count > 0) + ["rms_norm", "to fp16"])
        prepare = partial(_prepare_rms, size, rows, count)
        found.append(Row("norm", f"{rows} x {size}, RMS{extra}", "fp32", "", ops, prepare))
    for sequences, tokens in shapes.batches:
        size, rows = shapes.encoder.hidden, sequences * tokens
        prepare = partial(_prepare_layer_norm, size, rows)
        found.append(Row("norm", f"{rows} x {size}, layer norm, residual", "fp16", "", "add, layer_norm", prepare))
    return found


def rows_of(shapes: Shapes) -> list[Row]:
    """All of them."""
    decoder, encoder = shapes.decoder, shapes.encoder
    found = _norm_rows(shapes)
    smaller, larger = (sequences * tokens for sequences, tokens in shapes.batches)
    tokens = shapes.prompts * shapes.prompt
    for rows, layer in ((smaller, encoder.up), (larger, encoder.up), (tokens, decoder.gate_up)):
        prepare = partial(_prepare_activation, layer, rows)
        ops = "silu, mul" if layer.gated else "gelu"
        shape = f"{rows} x {layer.outputs}, {'gated silu' if layer.gated else ops}"
        found.append(Row("activation", shape, "fp16", "", ops, prepare))
    for count in (shapes.few[-1], tokens):
        prepare = partial(_prepare_gather, decoder.vocabulary, decoder.hidden, count)
        shape = f"{count} ids, table {decoder.vocabulary} x {decoder.hidden}"
        found.append(Row("gather", shape, "fp16", "table", "embedding, float", prepare))
    prepare = partial(_prepare_embeddings, encoder, *shapes.batches[1])
    shape = f"{larger} x {encoder.hidden}, positions and segments added, layer norm"
    found.append(Row("gather", shape, "fp16", "", "embedding, add, layer_norm", prepare))
    for rows in (1, shapes.few[-1]):
        shape = f"{rows} x {decoder.vocabulary}"
        prepare = partial(_prepare_argmax, decoder.vocabulary, rows)
        found.append(Row("argmax", shape, "fp32", "", "max", prepare))
    for rows in (1, shapes.few[-1]):
        shape = f"{rows} x {decoder.vocabulary}, temperature, top_k, top_p"
        prepare = partial(_prepare_sample, decoder.vocabulary, rows)
        ops = "topk, softmax, cumsum, sort, searchsorted"
        found.append(Row("sample", shape, "fp32", "", ops, prepare))
    for rows in (1, shapes.few[-1]):
        prepare = partial(_prepare_advance, decoder.vocabulary, rows)
        ops = "copies, ge, adds, neg"
        found.append(Row("advance", f"{rows} {'row' if rows == 1 else 'rows'}", "int64", "", ops, prepare))
    return found


__all__ = ["rows_of"]
