"""Which kernel multiplies which shape.

One row: a GEMV that takes the norm before and the residual behind it. A few rows: the tensor cores with the weights
as the tall operand; sums are split where the outputs are too few to fill the GPU. Many rows: cuBLAS, or a kernel of
our own, whichever is faster for the shape here.

Integer weights: a GEMV for one row. For more, tiles are dequantised on their way to the tensor cores, or the matrix
as a whole before it is multiplied as floats are, whichever is faster here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from accel_kernels.activation import activation
from accel_kernels.block_gemm import BlockTile, block_gemm
from accel_kernels.gemv import gemv
from accel_kernels.launches import (
    BLOCK_TILES,
    DESCRIBED_SPLIT_TILES,
    DESCRIBED_TILES,
    FEW,
    QUANTIZED_SPLIT_TILES,
    QUANTIZED_TILES,
    SPLIT_TILES,
    WIDE_TILES,
    gemv_tile,
    narrow_split_tile,
    narrow_tile,
    quantized_gemv_tile,
    splits_of,
)
from accel_kernels.narrow_gemm import narrow_gemm
from accel_kernels.norm import norm
from accel_kernels.quantized_gather import quantized_gather
from accel_kernels.quantized_gemm import QuantizedTile, quantized_gemm
from accel_kernels.quantized_gemv import quantized_gemv
from accel_kernels.specialized_gemm import HALVED, can_halve, specialized_gemm
from accel_kernels.specialized_gemm import TILE as SPECIALIZED
from accel_kernels.tiles import GELU_ERF, GELU_TANH, LAYER_NORM, SILU
from accel_kernels.wide_gemm import wide_gemm

from accel.engines.cuda.contest import Contest, Way
from accel.engines.cuda.program import STRIPE, Matrix
from accel.engines.cuda.values import Normed, Parts, Rows, Sum

KINDS = {"silu": SILU, "gelu": GELU_ERF, "gelu_tanh": GELU_TANH}
BLOCK_ROWS = 1024  # rows up to which a simple tiled kernel can start faster than one that stays
WIDE_ROWS = 512
SPLIT_ROWS = 256  # rows up to which sums may be split: more of them fill the GPU
_LONG_ROW = 16384  # elements that one program can hold to normalize them

Result = TypeVar("Result")


class Products:
    """Multiplies on one device in one type.

    Args:
        dtype: Of the weights, and of results that other kernels read.
        tensor_memory: Whether the GPU has the tensor memory accelerator (SM 90 and later).
        contest: Finds the fastest way for a shape; None: the first one.
        warp_jobs: Whether groups of its warps can have programs of their own (SM 90).
    """

    def __init__(
        self, dtype: torch.dtype, tensor_memory: bool, contest: Contest | None = None, *, warp_jobs: bool = False
    ) -> None:
        self.dtype, self._tensor_memory, self._contest = dtype, tensor_memory, contest
        self._warp_jobs = warp_jobs and dtype.itemsize == 2

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
            assert source.added is not None
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
            return self._several_quantized(x, matrix, kind, out_type, residual)
        return self._floats(x, matrix, kind, out_type, residual)

    def _floats(
        self, x: torch.Tensor, matrix: Matrix, kind: str | None, out_type: torch.dtype, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """Several rows times a matrix of floats."""
        rows = len(x)
        if rows <= FEW or (matrix.stripe is not None and rows <= 2 * FEW) or out_type == torch.float32:
            return self._few(x, matrix, kind, out_type, residual)
        assert residual is None, "many rows are added by the norm behind them"
        return self._gated(x, matrix, kind) if matrix.stripe is not None else self._many(x, matrix, kind)

    def parts(self, value: object, matrix: Matrix) -> Parts | torch.Tensor:
        """A product that its reader may add up: in parts where that fills the GPU better."""
        rows, splits = rows_of(value), splits_of(matrix)
        if 1 < rows <= SPLIT_ROWS and matrix.scales is not None:
            return self._split_quantized(self.low(value), matrix)
        if FEW < rows <= SPLIT_ROWS and matrix.scales is None and matrix.inputs * self.dtype.itemsize % 16 == 0:
            return self._split(self.low(value), matrix)
        if rows == 1 or rows > FEW or splits == 1 or matrix.bias is not None or matrix.scales is not None:
            return self.linear(value, matrix)
        x = self.low(value)
        out = torch.empty(splits, rows, matrix.outputs, dtype=torch.float32, device=x.device)
        narrow_gemm(x, matrix.weight, out, tile=narrow_split_tile(matrix, rows))
        return Parts(out)

    def sum(self, value: object, matrix: Matrix, stream: torch.Tensor, *, kept: bool) -> Sum:
        """stream + value W^T + b.

        Its reader adds up; or the product does, where that is faster. It rounds the sum, and a norm of 768 random
        numbers behind it errs by 3e-4 (RMS) in place of 2e-4; in bfloat16, by 2.4e-3 in place of 1.7e-3: left out.

        Args:
            value: See ``linear``.
            matrix: [N, K]; not gated where the product is to add.
            stream: [T, N], contiguous; in the engine's type where the product is to add.
            kept: Whether something besides one norm reads the sum.
        """
        fits = stream.dtype == self.dtype == torch.float16 and matrix.scales is None and matrix.stripe is None
        if kept or not fits or not self._warp_jobs or len(stream) < WIDE_ROWS:
            return self._apart(value, matrix, stream, kept)
        x = self.low(value)

        def together(halves: bool) -> Sum:
            out = torch.empty_like(stream)
            specialized_gemm(x, matrix.weight, out, bias=matrix.bias, residual=stream, halves=halves)
            return Sum(stream, None, kept, result=out)

        ways: dict[str, Callable[[], Sum]] = {"apart": partial(self._apart, x, matrix, stream, kept)}
        ways |= {name: partial(together, halves) for name, halves in _specialized(x, matrix).items()}
        return self._fastest(x, matrix, "added to a stream", ways)

    def _apart(self, value: object, matrix: Matrix, stream: torch.Tensor, kept: bool) -> Sum:
        added = self.parts(value, matrix)
        return Sum(stream, added.parts if isinstance(added, Parts) else as_tensor(added), kept)

    def _split(self, x: torch.Tensor, matrix: Matrix) -> Parts | torch.Tensor:
        """Whole or in parts, whichever is faster."""

        def parts(tile: BlockTile) -> Parts:
            out = torch.empty(tile.splits, len(x), matrix.outputs, dtype=torch.float32, device=x.device)
            return Parts(block_gemm(x, matrix.weight, out, bias=matrix.bias, tile=tile))

        ways: dict[str, Callable[[], Parts | torch.Tensor]] = {"whole": lambda: self._many(x, matrix, None)}
        tiles = DESCRIBED_SPLIT_TILES if self._tensor_memory else SPLIT_TILES
        ways |= {f"{tile}": partial(parts, tile) for tile in tiles}
        return self._fastest(x, matrix, "in parts", ways)

    def _split_quantized(self, x: torch.Tensor, matrix: Matrix) -> Parts | torch.Tensor:
        """Whole or in parts, whichever is faster."""

        def parts(tile: QuantizedTile) -> Parts:
            out = torch.empty(tile.splits, len(x), matrix.outputs, dtype=torch.float32, device=x.device)
            return Parts(self._quantized_tiles(x.contiguous(), matrix, None, out, None, tile))

        whole = partial(self._several_quantized, x, matrix, None, self.dtype, None)
        ways: dict[str, Callable[[], Parts | torch.Tensor]] = {"whole": whole}
        ways |= {f"{tile}": partial(parts, tile) for tile in QUANTIZED_SPLIT_TILES}
        return self._fastest(x, matrix, "in parts", ways)

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
            tile=quantized_gemv_tile(matrix, matrix.bits),
        )  # fmt: skip

    def _several_quantized(
        self, x: torch.Tensor, matrix: Matrix, kind: str | None, out_type: torch.dtype, residual: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty(len(x), matrix.outputs, dtype=out_type, device=x.device)
        tiles = partial(self._quantized_tiles, x, matrix, kind, out, residual)
        ways: dict[str, Callable[[], torch.Tensor]] = {f"{tile}": partial(tiles, tile) for tile in QUANTIZED_TILES}
        # The kernel for few rows reads weights before its predecessor ends: no kernel may just have written them. The
        # head, whose logits are float32, is too large to be written down.
        ahead = len(x) <= FEW * (1 + (matrix.stripe is not None))
        if not ahead and out_type != torch.float32:
            ways["whole"] = lambda: self._floats(x, self._dequantized(matrix), kind, out_type, residual)
        return self._fastest(x, matrix, kind, ways)

    def _quantized_tiles(
        self, x: torch.Tensor, matrix: Matrix, kind: str | None, out: torch.Tensor, residual: torch.Tensor | None,
        tile: QuantizedTile,
    ) -> torch.Tensor:  # fmt: skip
        assert matrix.scales is not None
        return quantized_gemm(
            x, matrix.weight, matrix.scales, out, bits=matrix.bits, bias=matrix.bias, residual=residual,
            gated=matrix.stripe is not None, stripe=matrix.stripe, activation=-1 if kind is None else KINDS[kind],
            tile=tile,
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
        options: dict[str, Any] = {"bias": matrix.bias, "activation": -1 if kind is None else KINDS[kind]}
        ways: dict[str, Callable[[], torch.Tensor]] = {}
        if len(x) <= BLOCK_ROWS and x.shape[1] * x.element_size() % 16 == 0:
            tiles = DESCRIBED_TILES if self._tensor_memory else BLOCK_TILES
            ways |= {f"{tile}": partial(block_gemm, x, matrix.weight, out, tile=tile, **options) for tile in tiles}
        if self._tensor_memory and len(x) >= WIDE_ROWS:
            ways |= {f"{tile}": partial(wide_gemm, x, matrix.weight, out, tile=tile, **options) for tile in WIDE_TILES}
        if self._warp_jobs and len(x) >= WIDE_ROWS:
            for name, halves in _specialized(x, matrix).items():
                ways[name] = partial(specialized_gemm, x, matrix.weight, out, halves=halves, **options)
        blas = {"blas": partial(self._blas, x, matrix, kind, out)}
        return self._fastest(x, matrix, kind, blas | ways if kind is None else ways | blas)

    def _blas(self, x: torch.Tensor, matrix: Matrix, kind: str | None, out: torch.Tensor) -> torch.Tensor:
        if matrix.low_bias is None:
            torch.mm(x, matrix.weight.T, out=out)
        else:
            torch.addmm(matrix.low_bias, x, matrix.weight.T, out=out)
        return out if kind is None else activation(out, out, kind=KINDS[kind], gated=False)

    def _gated(self, x: torch.Tensor, matrix: Matrix, kind: str | None) -> torch.Tensor:
        assert matrix.stripe is not None and kind is not None
        out = torch.empty(len(x), matrix.outputs, dtype=self.dtype, device=x.device)
        if matrix.bias is not None:
            return self._few(x, matrix, kind, self.dtype, None)
        ways: dict[str, Callable[[], torch.Tensor]] = {}
        if self._tensor_memory and len(x) >= WIDE_ROWS and matrix.stripe == STRIPE:
            tile = WIDE_TILES[-1]  # as wide as a stripe of both
            ways["wide"] = partial(
                wide_gemm, x, matrix.weight, out, gated=True, activation=KINDS[kind], tile=tile
            )  # fmt: skip
        if self._warp_jobs and len(x) >= WIDE_ROWS and matrix.stripe == STRIPE:
            for name, halves in _specialized(x, matrix).items():
                ways[name] = partial(
                    specialized_gemm, x, matrix.weight, out, gated=True, activation=KINDS[kind], halves=halves
                )  # fmt: skip
        ways["blas"] = partial(self._gated_blas, x, matrix, kind, out)
        return self._fastest(x, matrix, kind, ways)

    def _gated_blas(self, x: torch.Tensor, matrix: Matrix, kind: str, out: torch.Tensor) -> torch.Tensor:
        both = torch.mm(x, matrix.weight.T)
        return activation(both, out, kind=KINDS[kind], gated=True, stripe=matrix.stripe)

    def _fastest(
        self, x: torch.Tensor, matrix: Matrix, kind: str | None, ways: dict[str, Callable[[], Result]]
    ) -> Result:
        """Runs the fastest way for these sizes."""
        what = f"{matrix.bits}-bit weights" if matrix.bits else "weights"
        if matrix.scales is not None:
            what += f" in groups of {matrix.inputs // matrix.scales.shape[1]}"
        options = f"gated {matrix.stripe is not None}, {kind}, bias {matrix.bias is not None}"
        key = f"{len(x)}x{x.shape[1]} {self.dtype} by {matrix.outputs} {what}, {options}"
        return ways[self.fastest(key, ways, x)]()

    def fastest(self, key: str, ways: Mapping[str, Way], x: torch.Tensor) -> str:
        """The name of the fastest way in the middle of a run, see ``Contest.pick``.

        Args:
            x: [T, K], what each way reads; a kernel has just written it there.
        """
        if self._contest is None:
            return next(iter(ways))
        return self._contest.pick(key, {name: partial(self._between_norms, x, way) for name, way in ways.items()})

    def _between_norms(self, x: torch.Tensor, way: Way) -> None:
        """As in a model: a norm stands before, and another one adds up what is not added yet, if rows fit into one."""
        rows = x.contiguous()  # cuBLAS takes others too, a norm does not
        if rows.shape[1] <= _LONG_ROW:
            norm(rows, rows[0], torch.empty_like(rows), eps=1.0)
        result = way()
        if isinstance(result, Sum):
            if result.stream.shape[1] <= _LONG_ROW:
                self.norm(result, Normed(torch.empty(0), result.stream[0], None, 1.0, LAYER_NORM))
            return
        added = result.parts if isinstance(result, Parts) else as_tensor(result)
        stream = torch.empty(added.shape[-2:], dtype=self.dtype, device=x.device)
        if stream.shape[1] <= _LONG_ROW:
            norm(stream, stream[0], torch.empty_like(stream), eps=1.0, residual=added)


def _specialized(x: torch.Tensor, matrix: Matrix) -> dict[str, bool]:
    """Ways of ``specialized_gemm`` by name -> whether tiles that are left are halved."""
    return {SPECIALIZED: False} | ({HALVED: True} if can_halve(x, len(matrix.weight)) else {})


def as_tensor(value: object) -> torch.Tensor:
    """A value that is no norm, computed."""
    if isinstance(value, Sum | Parts | Rows):
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


__all__ = ["FEW", "KINDS", "Products", "as_tensor", "rows_of"]
