"""Which kernel multiplies which shape.

One row: a GEMV that takes the norm before and the residual behind it. A few rows: the tensor cores with the weights
as the tall operand; sums are split where the outputs are too few to fill the GPU. Many rows: cuBLAS, or a kernel of
our own where an activation follows.

Integer weights: a GEMV for one row, tiles dequantised on their way to the tensor cores for more; from
``MANY_QUANTIZED`` rows on the matrix is dequantised as a whole and multiplied as floats are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accel_kernels.activation import activation
from accel_kernels.block_gemm import BlockTile, block_gemm
from accel_kernels.gemv import GemvTile, gemv
from accel_kernels.narrow_gemm import NarrowTile, narrow_gemm
from accel_kernels.norm import norm
from accel_kernels.quantized_gather import quantized_gather
from accel_kernels.quantized_gemm import QuantizedTile, quantized_gemm
from accel_kernels.quantized_gemv import quantized_gemv
from accel_kernels.tiles import GELU_ERF, GELU_TANH, SILU
from accel_kernels.wide_gemm import WideTile, wide_gemm

from accel.engines.cuda.program import STRIPE, Matrix
from accel.engines.cuda.values import Normed, Parts, Sum

KINDS = {"silu": SILU, "gelu": GELU_ERF, "gelu_tanh": GELU_TANH}
FEW = 64  # rows up to which the weights are read once whatever the rows are
BLOCK_ROWS = 512  # rows up to which a simple tiled kernel starts faster than one that stays
WIDE_ROWS = 512
MANY_QUANTIZED = 512  # rows from which reading and writing the floats of a matrix is the smaller part of its product
_BLOCKS = 132  # programs that fill the GPU
_LONG_ROW = 16384  # elements that one program can hold to normalize them


class Products:
    """Multiplies on one device in one type.

    Args:
        dtype: Of the weights, and of results that other kernels read.
        tensor_memory: Whether the GPU has the tensor memory accelerator (SM 90 and later).
    """

    def __init__(self, dtype: torch.dtype, tensor_memory: bool) -> None:
        self.dtype, self._tensor_memory = dtype, tensor_memory

    def low(self, value: object) -> torch.Tensor:
        """A value as a [T, K] tensor of the engine's type."""
        if isinstance(value, Normed):
            return self.normalize(value)
        tensor = as_tensor(value)
        return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)

    def normalize(self, value: Normed) -> torch.Tensor:
        """The norm as a tensor of the engine's type; computed once."""
        if value.result is None:
            value.result = self.norm(value.source, value)
        return value.result

    def norm(self, source: torch.Tensor | Sum, by: Normed) -> torch.Tensor:
        """norm(source); a sum gets its result on the way."""
        if isinstance(source, Sum) and source.result is None:
            out = torch.empty_like(source.stream, dtype=self.dtype)
            if source.kept:
                source.result = torch.empty_like(source.stream, dtype=torch.float32)
            norm(
                source.stream, by.weight, out, eps=by.epsilon, kind=by.kind, bias=by.bias,
                residual=source.added.contiguous(), stream=source.result,
            )  # fmt: skip
            return out
        rows = source.tensor() if isinstance(source, Sum) else source
        rows = rows.contiguous()
        out = torch.empty_like(rows, dtype=self.dtype)
        return norm(rows, by.weight, out, eps=by.epsilon, kind=by.kind, bias=by.bias)

    def linear(
        self, value: object, matrix: Matrix, *, kind: str | None = None, wide_out: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """activation(value W^T + b) + residual, [T, N].

        Args:
            value: A tensor [T, K], a sum, or a norm that was not computed yet.
            matrix: Gated or not.
            kind: The activation's name.
            wide_out: float32 in place of the engine's type.
            residual: float32 [T, N]; the result is float32 then.
        """
        rows = rows_of(value)
        out_type = torch.float32 if wide_out or residual is not None else self.dtype
        if rows == 1:
            return self._one(value, matrix, kind, out_type, residual)
        x = self.low(value)
        if matrix.scales is not None:
            if rows < MANY_QUANTIZED or out_type == torch.float32:
                return self._several_quantized(x, matrix, kind, out_type, residual)
            matrix = self._dequantized(matrix)
        if rows <= FEW or (matrix.stripe is not None and rows <= 2 * FEW) or out_type == torch.float32:
            return self._few(x, matrix, kind, out_type, residual)
        assert residual is None, "many rows are added by the norm behind them"
        return self._gated(x, matrix, kind) if matrix.stripe is not None else self._many(x, matrix, kind)

    def parts(self, value: object, matrix: Matrix) -> Parts | torch.Tensor:
        """A product that its reader may add up: in parts where that fills the GPU better."""
        rows, splits = rows_of(value), splits_of(matrix)
        if rows == 1 or rows > FEW or splits == 1 or matrix.bias is not None or matrix.scales is not None:
            return self.linear(value, matrix)
        x = self.low(value)
        out = torch.empty(splits, rows, matrix.outputs, dtype=torch.float32, device=x.device)
        depth = x.shape[1] // splits
        tile = NarrowTile(64, 256, splits, 4, 3) if depth <= 1024 else NarrowTile(64, 128, splits, 4, 4)
        narrow_gemm(x, matrix.weight, out, tile=tile)
        return Parts(out)

    def _one(
        self, value: object, matrix: Matrix, kind: str | None, out_type: torch.dtype, residual: torch.Tensor | None
    ) -> torch.Tensor:
        if matrix.scales is not None:
            return self._one_quantized(self.low(value), matrix, kind, out_type, residual)
        options: dict[str, Any] = {}
        if isinstance(value, Normed) and value.source.shape[-1] <= _LONG_ROW:
            x = value.source
            options = {"norm": value.kind, "norm_weight": value.weight, "norm_bias": value.bias, "eps": value.epsilon}
        else:
            x = self.low(value) if isinstance(value, Normed) else as_tensor(value)
        out = torch.empty(1, matrix.outputs, dtype=out_type, device=x.device)
        return gemv(
            x.contiguous(), matrix.weight, out, bias=matrix.bias, residual=residual, gated=matrix.stripe is not None,
            stripe=matrix.stripe, activation=-1 if kind is None else KINDS[kind], tile=gemv_tile(matrix), **options,
        )  # fmt: skip

    def _one_quantized(
        self, x: torch.Tensor, matrix: Matrix, kind: str | None, out_type: torch.dtype, residual: torch.Tensor | None
    ) -> torch.Tensor:
        assert matrix.scales is not None
        out = torch.empty(1, matrix.outputs, dtype=out_type, device=x.device)
        return quantized_gemv(
            x.contiguous(), matrix.weight, matrix.scales, out, bits=matrix.bits, bias=matrix.bias, residual=residual,
            gated=matrix.stripe is not None, stripe=matrix.stripe, activation=-1 if kind is None else KINDS[kind],
            tile=quantized_gemv_tile(matrix),
        )  # fmt: skip

    def _several_quantized(
        self, x: torch.Tensor, matrix: Matrix, kind: str | None, out_type: torch.dtype, residual: torch.Tensor | None
    ) -> torch.Tensor:
        assert matrix.scales is not None
        out = torch.empty(len(x), matrix.outputs, dtype=out_type, device=x.device)
        return quantized_gemm(
            x.contiguous(), matrix.weight, matrix.scales, out, bits=matrix.bits, bias=matrix.bias, residual=residual,
            gated=matrix.stripe is not None, stripe=matrix.stripe, activation=-1 if kind is None else KINDS[kind],
            tile=quantized_gemm_tile(len(x)),
        )  # fmt: skip

    def _dequantized(self, matrix: Matrix) -> Matrix:
        """The matrix in the engine's type, for one product."""
        assert matrix.scales is not None
        weight = torch.empty(len(matrix.weight), matrix.inputs, dtype=self.dtype, device=matrix.weight.device)
        quantized_gather(matrix.weight, matrix.scales, weight, bits=matrix.bits)
        return replace(matrix, weight=weight, scales=None, bits=0)

    def _few(
        self, x: torch.Tensor, matrix: Matrix, kind: str | None, out_type: torch.dtype, residual: torch.Tensor | None
    ) -> torch.Tensor:
        out = torch.empty(len(x), matrix.outputs, dtype=out_type, device=x.device)
        for start in range(0, len(x), 2 * FEW):
            rows = slice(start, start + 2 * FEW)
            narrow_gemm(
                x[rows], matrix.weight, out[rows], bias=matrix.bias, gated=matrix.stripe is not None,
                stripe=matrix.stripe, residual=None if residual is None else residual[rows],
                activation=-1 if kind is None else KINDS[kind], tile=narrow_tile(matrix, len(x)),
            )  # fmt: skip
        return out

    def _many(self, x: torch.Tensor, matrix: Matrix, kind: str | None) -> torch.Tensor:
        out = torch.empty(len(x), matrix.outputs, dtype=self.dtype, device=x.device)
        if kind is not None and len(x) <= BLOCK_ROWS:
            return block_gemm(x, matrix.weight, out, bias=matrix.bias, activation=KINDS[kind], tile=block_tile(x))
        if kind is not None and self._tensor_memory:
            return wide_gemm(x, matrix.weight, out, bias=matrix.bias, activation=KINDS[kind], tile=wide_tile(x))
        if matrix.low_bias is None:
            torch.mm(x, matrix.weight.T, out=out)
        else:
            torch.addmm(matrix.low_bias, x, matrix.weight.T, out=out)
        return out if kind is None else activation(out, out, kind=KINDS[kind], gated=False)

    def _gated(self, x: torch.Tensor, matrix: Matrix, kind: str | None) -> torch.Tensor:
        assert matrix.stripe is not None and kind is not None
        out = torch.empty(len(x), matrix.outputs, dtype=self.dtype, device=x.device)
        if self._tensor_memory and len(x) >= WIDE_ROWS and matrix.stripe == STRIPE and matrix.bias is None:
            return wide_gemm(x, matrix.weight, out, gated=True, activation=KINDS[kind], tile=WideTile())
        if matrix.bias is not None:
            return self._few(x, matrix, kind, self.dtype, None)
        both = torch.mm(x, matrix.weight.T)
        return activation(both, out, kind=KINDS[kind], gated=True, stripe=matrix.stripe)


def as_tensor(value: object) -> torch.Tensor:
    """A value that is no norm, computed."""
    if isinstance(value, Sum | Parts):
        return value.tensor()
    assert isinstance(value, torch.Tensor), type(value)
    return value


def rows_of(value: object) -> int:
    """Its tokens."""
    if isinstance(value, Normed):
        return len(value.source)
    if isinstance(value, Sum):
        return len(value.stream)
    return value.parts.shape[1] if isinstance(value, Parts) else len(as_tensor(value))


def gemv_tile(matrix: Matrix) -> GemvTile:
    """Measured on an H200: 2,048 weights of four outputs (gated: 1,024 of eight pairs) ahead of the wait."""
    size = matrix.weight.shape[1]
    if matrix.stripe is not None:
        return GemvTile(8, 1024, 4)
    if size > 4096:
        return GemvTile(4, 8192, 8)
    return GemvTile(8 if matrix.outputs > 1 << 15 else 4, 2048, 4)


def quantized_gemv_tile(matrix: Matrix) -> GemvTile:
    """One turn of 4-bit weights takes a row of 2,048 or 4,096. Not measured yet."""
    tall = matrix.outputs > 1 << 15 or matrix.stripe is not None
    return GemvTile(8 if tall else 4, 256 if matrix.inputs <= 4096 else 512, 4)


def quantized_gemm_tile(rows: int) -> QuantizedTile:
    """Not measured yet: more rows reuse a dequantised tile, fewer leave room for turns in flight."""
    return QuantizedTile(64, 64, 64, 4, 3) if rows > FEW else QuantizedTile(64, 64, 128, 4, 3)


def narrow_tile(matrix: Matrix, rows: int) -> NarrowTile:
    """Measured on an H200; wider rows leave room for less in flight."""
    if rows > FEW:
        return NarrowTile(64, 64, 1, 4, 4)
    return NarrowTile(64, 64, 1, 4, 3) if matrix.outputs > 1 << 15 else NarrowTile(64, 128, 1, 4, 4)


def block_tile(x: torch.Tensor) -> BlockTile:
    """Measured on an H200."""
    return BlockTile(64, 32, 128, 4, 4) if len(x) <= 256 else BlockTile(64, 64, 64, 4, 4)


def wide_tile(x: torch.Tensor) -> WideTile:
    """Measured on an H200: short sums want more tiles under way."""
    if x.shape[1] <= 1024:
        return WideTile(64, 128, 64, 8, 4, 4, 1) if len(x) > 8192 else WideTile(128, 128, 64, 8, 8, 4, 1)
    return WideTile()


def splits_of(matrix: Matrix) -> int:
    """Programs per sum that bring the grid near one per multiprocessor."""
    blocks = -(-matrix.outputs // 64)
    splits = 1
    while blocks * splits * 2 <= _BLOCKS and matrix.weight.shape[1] // (splits * 2) >= 256:
        splits *= 2
    return splits


__all__ = ["FEW", "KINDS", "Products", "as_tensor", "rows_of"]
