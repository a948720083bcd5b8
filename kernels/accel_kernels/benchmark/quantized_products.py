"""Rows of what reads integer weights in groups: quantized_gemv, quantized_gemm, quantized_gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from accel_kernels import launches
from accel_kernels import quantized_gather as rows_kernel
from accel_kernels import quantized_gemm as several
from accel_kernels import quantized_gemv as single
from accel_kernels.benchmark import peers
from accel_kernels.benchmark.problem import DTYPE, Copies, Operands, Problem, Row, size_of
from accel_kernels.benchmark.shapes import Layer, Shapes

BITS = (4, 8)
_COLD = "weights"
_SLICE = 8192  # rows of a matrix that are unpacked at once: an integer takes 4 bytes on the way
_Packed = tuple[torch.Tensor, torch.Tensor]


def _packed(operands: Operands, count: int, size: int, bits: int, group: int) -> Copies[_Packed]:
    """Words [count, size * bits / 32] and scales [count, size / group] of random integers.

    The scales leave the outputs of a row of normal numbers near 1.
    """
    spread = (2**bits / 12**0.5) * size**0.5

    def make(_: int) -> _Packed:
        scales = operands.normal(count, size // group, scale=0.1 / spread, mean=1 / spread)
        return operands.words(count, size * bits // 32), scales

    return operands.copies(make, count * size * bits // 8 + 2 * count * size // group)


def _places(bits: int, device: torch.device) -> torch.Tensor:
    """The first bit of each neighbour in a word, int32 [32 / bits]; see ``packing``."""
    order = torch.arange(32 // bits, dtype=torch.int32, device=device)
    return (order // 2 + order % 2 * 4) * 4 if bits == 4 else order * bits


def _unpacked(words: torch.Tensor, scales: torch.Tensor, places: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights that words and scales stand for, fp16 [N, K], in few ops of PyTorch."""
    count, groups = scales.shape
    whole = ((words[..., None] >> places) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return (whole.reshape(count, groups, -1) * scales[..., None]).reshape(count, -1)


def _floats(operands: Operands, packed: Copies[_Packed], bits: int, stripe: int | None) -> Copies[torch.Tensor]:
    """The same weights in fp16, as PyTorch reads them."""

    places = _places(bits, operands.device)

    def make(index: int) -> torch.Tensor:
        words, scales = packed(index)
        pieces = zip(words.split(_SLICE), scales.split(_SLICE))
        return peers.halves(torch.cat([_unpacked(*piece, places, bits) for piece in pieces]), stripe)

    return operands.copies(make, 2 * packed(0)[0].numel() * 32 // bits)


@dataclass(frozen=True)
class _Linear:
    """A layer's operands: rows [M, K], packed matrices, the kernels' options."""

    layer: Layer
    x: torch.Tensor
    packed: Copies[_Packed]
    floats: Copies[torch.Tensor]
    options: dict[str, Any]

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.x.numel() * self.layer.outputs * (1 + self.layer.gated)

    def bytes(self, out: torch.Tensor) -> int:
        """Read and written."""
        return size_of(self.x, *self.packed(0), out)


def _linear(operands: Operands, layer: Layer, rows: int, bits: int, group: int) -> _Linear:
    packed = _packed(operands, layer.outputs * (1 + layer.gated), layer.inputs, bits, group)
    floats = _floats(operands, packed, bits, layer.stripe)
    options = {"bits": bits, "gated": layer.gated, "stripe": layer.stripe, "activation": layer.activation}
    return _Linear(layer, operands.normal(rows, layer.inputs), packed, floats, options)


def _prepare_gemv(layer: Layer, bits: int, group: int, added: bool, logits: bool, operands: Operands) -> Problem:
    made = _linear(operands, layer, 1, bits, group)
    residual = operands.normal(1, layer.outputs, dtype=torch.float32) if added else None
    out = operands.unwritten(1, layer.outputs, dtype=torch.float32 if added or logits else DTYPE)
    options, tile = made.options | {"residual": residual}, launches.quantized_gemv_tile(layer, bits)
    return Problem(
        {launches.label(tile): lambda i: single.quantized_gemv(made.x, *made.packed(i), out, tile=tile, **options)},
        peers.linear(layer, made.x, made.floats, residual=residual),
        lambda: single.reference(made.x, *made.packed(0), **options)[None],
        made.bytes(out) + size_of(residual),
        made.flops,
    )


def _prepare_gemm(
    layer: Layer, rows: int, bits: int, group: int, tiles: Sequence[several.QuantizedTile], operands: Operands
) -> Problem:
    made = _linear(operands, layer, rows, bits, group)
    whole = operands.unwritten(rows, layer.outputs)
    parts = {tile.splits: operands.unwritten(tile.splits, rows, layer.outputs, dtype=torch.float32) for tile in tiles}

    def run(tile: several.QuantizedTile, index: int) -> torch.Tensor:
        out = whole if tile.splits == 1 else parts[tile.splits]
        return several.quantized_gemm(made.x, *made.packed(index), out, tile=tile, **made.options)

    return Problem(
        {launches.label(tile): partial(run, tile) for tile in tiles},
        peers.linear(layer, made.x, made.floats),
        lambda: several.reference(made.x, *made.packed(0), **made.options),
        made.bytes(whole),
        made.flops,
    )


def _prepare_rows(size: int, vocabulary: int, count: int, bits: int, group: int, operands: Operands) -> Problem:
    """Embeddings of tokens; of the table PyTorch has fp16."""
    alone = Operands(operands.device)  # one table: each call reads other rows of it
    table = _packed(alone, vocabulary, size, bits, group)
    floats = _floats(alone, table, bits, None)(0)
    touched = count * size * bits // 8
    ids = operands.copies(lambda _: operands.below(vocabulary, count), touched)
    out = operands.unwritten(count, size, dtype=torch.float32)
    words, scales = table(0)
    return Problem(
        {"default": lambda i: rows_kernel.quantized_gather(words, scales, out, ids(i), bits=bits)},
        lambda i: functional.embedding(ids(i), floats).float(),
        lambda: rows_kernel.reference(words, scales, ids(0), bits=bits),
        size_of(ids(0), out) + touched + 2 * count * size // group,
    )


def _prepare_matrix(layer: Layer, bits: int, group: int, operands: Operands) -> Problem:
    """A whole matrix, which cuBLAS multiplies with many rows then."""
    packed = _packed(operands, layer.outputs * (1 + layer.gated), layer.inputs, bits, group)
    out = operands.unwritten(len(packed(0)[0]), layer.inputs)
    places = _places(bits, operands.device)
    return Problem(
        {"default": lambda i: rows_kernel.quantized_gather(*packed(i), out, bits=bits)},
        lambda i: _unpacked(*packed(i), places, bits),
        lambda: rows_kernel.reference(*packed(0), bits=bits),
        size_of(*packed(0), out),
    )


def _gemv_row(layer: Layer, bits: int, group: int, *, added: bool = False, logits: bool = False) -> Row:
    shape = f"1 row, {layer}" + ", residual" * added + ", fp32 logits" * logits
    prepare = partial(_prepare_gemv, layer, bits, group, added, logits)
    ops = f"fp16: {peers.linear_ops(layer, residual=added)}"
    return Row("quantized_gemv", shape, f"int{bits} g{group}", _COLD, ops, prepare)


def _gemm_row(layer: Layer, rows: int, bits: int, group: int, parts: bool = False) -> Row:
    tiles = (launches.QUANTIZED_TILES + launches.QUANTIZED_SPLIT_TILES) if parts else launches.QUANTIZED_TILES
    shape = f"{rows} rows, {layer}" + ", perhaps in parts" * parts
    prepare = partial(_prepare_gemm, layer, rows, bits, group, tiles)
    return Row("quantized_gemm", shape, f"int{bits} g{group}", _COLD, f"fp16: {peers.linear_ops(layer)}", prepare)


def rows_of(shapes: Shapes) -> list[Row]:
    """All of them."""
    decoder, group = shapes.decoder, shapes.group
    found: list[Row] = []
    for bits in BITS:
        found += [
            _gemv_row(decoder.qkv, bits, group),
            _gemv_row(decoder.gate_up, bits, group),
            _gemv_row(decoder.down, bits, group, added=True),
            _gemv_row(decoder.head, bits, group, logits=True),
            *(_gemm_row(decoder.gate_up, rows, bits, group) for rows in shapes.few),
            _gemm_row(decoder.down, shapes.few[-1], bits, group, parts=True),
        ]
    found.append(_gemm_row(decoder.gate_up, shapes.prompt, 4, group))
    tokens = shapes.prompts * shapes.prompt
    for bits in BITS:
        dtype = f"int{bits} g{group}"
        prepare = partial(_prepare_rows, decoder.hidden, decoder.vocabulary, tokens, bits, group)
        shape = f"{tokens} ids, table {decoder.vocabulary} x {decoder.hidden}"
        found.append(Row("quantized_gather", shape, dtype, "table", "fp16: embedding, float", prepare))
        matrix = partial(_prepare_matrix, decoder.down, bits, group)
        ops = "shift, and, sub, mul"
        found.append(Row("quantized_gather", f"all of {decoder.down}", dtype, _COLD, ops, matrix))
    return found


__all__ = ["BITS", "rows_of"]
