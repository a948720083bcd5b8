"""Rows of the products with float weights: gemv, narrow_gemm, block_gemm, wide_gemm, specialized_gemm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from accel_kernels import block_gemm as block
from accel_kernels import gemv as single
from accel_kernels import launches
from accel_kernels import narrow_gemm as narrow
from accel_kernels import specialized_gemm as specialized
from accel_kernels import wide_gemm as wide
from accel_kernels.benchmark import peers
from accel_kernels.benchmark.problem import Copies, Operands, Problem, Row, Run, size_of
from accel_kernels.benchmark.shapes import Layer, Shapes
from accel_kernels.device import has_tensor_memory_access
from accel_kernels.tiles import NO_NORM, RMS_NORM

_EPS = 1e-5
_COLD = "weights"


@dataclass(frozen=True)
class _Linear:
    """A layer's operands.

    Attributes:
        x: [M, K].
        weights: [N, K], gated [2N, K] in stripes.
        options: ``bias``, where the layer has one, ``activation`` and of a gated one ``gated``.
    """

    layer: Layer
    x: torch.Tensor
    weights: Copies[torch.Tensor]
    options: dict[str, Any]

    @property
    def rows(self) -> int:
        """M."""
        return len(self.x)

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.x.numel() * len(self.weights(0))

    def peer(self, **options: Any) -> Run:
        """See ``peers.linear``."""
        weights = self.weights
        if self.layer.stripe is not None:
            weights = Copies([peers.halves(self.weights(i), self.layer.stripe) for i in range(len(self.weights))])
        return peers.linear(self.layer, self.x, weights, bias=self.options.get("bias"), **options)


def _linear(operands: Operands, layer: Layer, rows: int, dtype: torch.dtype = torch.float16) -> _Linear:
    count, size = layer.outputs * (1 + layer.gated), layer.inputs
    weights = operands.copies(lambda _: operands.normal(count, size, scale=size**-0.5), 2 * count * size)
    options: dict[str, Any] = {"activation": layer.activation}
    if layer.gated:
        options["gated"] = True
    if layer.bias:
        options["bias"] = operands.normal(layer.outputs, dtype=torch.float32)
    return _Linear(layer, operands.normal(rows, size, dtype=dtype), weights, options)


def _prepare_gemv(layer: Layer, normed: bool, added: bool, logits: bool, operands: Operands) -> Problem:
    """The decode step of one sequence keeps its residual stream in float32."""
    made = _linear(operands, layer, 1, torch.float32 if normed else torch.float16)
    norm_weight = operands.normal(layer.inputs, scale=0.1, mean=1.0, dtype=torch.float32) if normed else None
    residual = operands.normal(1, layer.outputs, dtype=torch.float32) if added else None
    out = operands.unwritten(1, layer.outputs, dtype=torch.float32 if added or logits else torch.float16)
    options = made.options | {"norm": RMS_NORM if normed else NO_NORM, "norm_weight": norm_weight, "eps": _EPS}
    options |= {"residual": residual, "stripe": layer.stripe}
    tile = launches.gemv_tile(layer)
    return Problem(
        {launches.label(tile): lambda i: single.gemv(made.x, made.weights(i), out, tile=tile, **options)},
        made.peer(norm_weight=norm_weight, eps=_EPS, residual=residual),
        lambda: single.reference(made.x, made.weights(0), **options)[None],
        size_of(made.x, made.weights(0), norm_weight, residual, out),
        made.flops,
    )


def _prepare_narrow(layer: Layer, rows: int, tile: narrow.NarrowTile, logits: bool, operands: Operands) -> Problem:
    made = _linear(operands, layer, rows)
    whole = operands.unwritten(rows, layer.outputs, dtype=torch.float32 if logits else torch.float16)
    out = whole
    if tile.splits > 1:
        out = operands.unwritten(tile.splits, rows, layer.outputs, dtype=torch.float32)
    options = made.options | {"stripe": layer.stripe}
    return Problem(
        {launches.label(tile): lambda i: narrow.narrow_gemm(made.x, made.weights(i), out, tile=tile, **options)},
        made.peer(),
        lambda: narrow.reference(made.x, made.weights(0), **options),
        size_of(made.x, made.weights(0), whole),
        made.flops,
    )


def _tiles(in_parts: bool, device: torch.device) -> Sequence[block.BlockTile]:
    """Those that compete on a GPU; what stands for none is the newest."""
    if device.type == "cpu" or has_tensor_memory_access(device):
        return launches.DESCRIBED_SPLIT_TILES if in_parts else launches.DESCRIBED_TILES
    return launches.SPLIT_TILES if in_parts else launches.BLOCK_TILES


def _prepare_block(layer: Layer, rows: int, in_parts: bool, operands: Operands) -> Problem:
    made, tiles = _linear(operands, layer, rows), _tiles(in_parts, operands.device)
    whole = operands.unwritten(rows, layer.outputs)
    parts = {tile.splits: operands.unwritten(tile.splits, rows, layer.outputs, dtype=torch.float32) for tile in tiles}

    def run(tile: block.BlockTile, index: int) -> torch.Tensor:
        out = whole if tile.splits == 1 else parts[tile.splits]
        return block.block_gemm(made.x, made.weights(index), out, tile=tile, **made.options)

    return Problem(
        {launches.label(tile): partial(run, tile) for tile in tiles},
        made.peer(),
        lambda: block.reference(made.x, made.weights(0), **made.options),
        size_of(made.x, made.weights(0), made.options.get("bias"), whole),
        made.flops,
    )


def _prepare_wide(layer: Layer, rows: int, operands: Operands) -> Problem:
    made = _linear(operands, layer, rows)
    out = operands.unwritten(rows, layer.outputs)
    # A gated tile is as wide as a stripe of both matrices.
    tiles = launches.WIDE_TILES[-1:] if layer.gated else launches.WIDE_TILES

    def run(tile: wide.WideTile, index: int) -> torch.Tensor:
        return wide.wide_gemm(made.x, made.weights(index), out, tile=tile, **made.options)

    return Problem(
        {launches.label(tile): partial(run, tile) for tile in tiles},
        made.peer(),
        lambda: wide.reference(made.x, made.weights(0), stripe=layer.stripe, **made.options),
        size_of(made.x, made.weights(0), made.options.get("bias"), out),
        made.flops,
    )


def _prepare_specialized(layer: Layer, rows: int, added: bool, operands: Operands) -> Problem:
    made = _linear(operands, layer, rows)
    out = operands.unwritten(rows, layer.outputs)
    residual = operands.normal(rows, layer.outputs) if added else None
    options = made.options | {"residual": residual}
    ways = {specialized.TILE: False}
    if operands.device.type == "cuda" and specialized.can_halve(made.x, len(made.weights(0))):
        ways[specialized.HALVED] = True

    def run(halves: bool, index: int) -> torch.Tensor:
        return specialized.specialized_gemm(made.x, made.weights(index), out, halves=halves, **options)

    return Problem(
        {name: partial(run, halves) for name, halves in ways.items()},
        made.peer(residual=residual),
        lambda: specialized.reference(made.x, made.weights(0), stripe=layer.stripe, **options),
        size_of(made.x, made.weights(0), made.options.get("bias"), residual, out),
        made.flops,
    )


def _rows_text(rows: int, layer: Layer, extra: str = "") -> str:
    return f"{rows} {'row' if rows == 1 else 'rows'}, {layer}{extra}"


def _gemv_row(layer: Layer, *, normed: bool = False, added: bool = False, logits: bool = False) -> Row:
    extra = ", norm" * normed + ", residual" * added + ", fp32 logits" * logits
    ops = peers.linear_ops(layer, normed=normed, residual=added)
    prepare = partial(_prepare_gemv, layer, normed, added, logits)
    return Row("gemv", _rows_text(1, layer, extra), "fp16", _COLD, ops, prepare)


def _narrow_row(layer: Layer, rows: int, tile: narrow.NarrowTile, logits: bool = False) -> Row:
    extra = f", in {tile.splits} parts" * (tile.splits > 1) + ", fp32 logits" * logits
    prepare = partial(_prepare_narrow, layer, rows, tile, logits)
    return Row("narrow_gemm", _rows_text(rows, layer, extra), "fp16", _COLD, peers.linear_ops(layer), prepare)


def _block_row(layer: Layer, rows: int, in_parts: bool = False) -> Row:
    prepare, shape = partial(_prepare_block, layer, rows, in_parts), _rows_text(rows, layer, ", in parts" * in_parts)
    return Row("block_gemm", shape, "fp16", _COLD, peers.linear_ops(layer), prepare)


def _wide_row(layer: Layer, rows: int) -> Row:
    prepare = partial(_prepare_wide, layer, rows)
    ops, sm90 = peers.linear_ops(layer), (9, 0)  # the first with a tensor memory accelerator
    return Row("wide_gemm", _rows_text(rows, layer), "fp16", _COLD, ops, prepare, sm90)


def _specialized_row(layer: Layer, rows: int, added: bool = False) -> Row:
    prepare, ops = partial(_prepare_specialized, layer, rows, added), peers.linear_ops(layer, residual=added)
    shape = _rows_text(rows, layer, ", residual" * added)
    return Row("specialized_gemm", shape, "fp16", _COLD, ops, prepare, warp_jobs=True)


def rows_of(shapes: Shapes) -> list[Row]:
    """All of them."""
    decoder, encoder = shapes.decoder, shapes.encoder
    found = [
        _gemv_row(decoder.qkv, normed=True),
        _gemv_row(decoder.attention_output, added=True),
        _gemv_row(decoder.gate_up, normed=True),
        _gemv_row(decoder.down, added=True),
        _gemv_row(decoder.head, normed=True, logits=True),
    ]
    for rows in shapes.few:
        for layer in (decoder.qkv, decoder.down):
            found.append(_narrow_row(layer, rows, launches.narrow_split_tile(layer, rows)))
        found.append(_narrow_row(decoder.gate_up, rows, launches.narrow_tile(decoder.gate_up, rows)))
        found.append(_narrow_row(decoder.head, rows, launches.narrow_tile(decoder.head, rows), logits=True))
    found.append(_narrow_row(decoder.gate_up, shapes.prompt, launches.narrow_tile(decoder.gate_up, shapes.prompt)))
    smaller, larger = (sequences * tokens for sequences, tokens in shapes.batches)
    found += [
        _block_row(decoder.qkv, shapes.prompt),
        _block_row(decoder.down, shapes.prompt, in_parts=True),
        *(_block_row(layer, smaller) for layer in (encoder.qkv, encoder.up, encoder.down)),
        _wide_row(encoder.up, smaller),
        *(_wide_row(layer, larger) for layer in (encoder.qkv, encoder.up, encoder.down)),
        _wide_row(decoder.gate_up, shapes.prompts * shapes.prompt),
        *(_specialized_row(layer, larger) for layer in (encoder.qkv, encoder.up, encoder.down)),
        *(_specialized_row(layer, larger, added=True) for layer in (encoder.attention_output, encoder.down)),
        _specialized_row(decoder.gate_up, shapes.prompts * shapes.prompt),
    ]
    return found


__all__ = ["rows_of"]
