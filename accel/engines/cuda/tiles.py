"""The kernels' tiles: those that one kernel always takes, and the few that compete where a shape decides: each is
compiled once.

The former were measured on an H200 and, for integer weights, an H100.
"""

from __future__ import annotations

from accel_kernels.block_gemm import BlockTile
from accel_kernels.gemv import GemvTile
from accel_kernels.narrow_gemm import NarrowTile
from accel_kernels.quantized_gemm import QuantizedTile
from accel_kernels.wide_gemm import WideTile

from accel.engines.cuda.program import Matrix

FEW = 64  # rows up to which the weights are read once whatever the rows are
_TALL = 1 << 15  # outputs
_BLOCKS = 132  # programs that fill the GPU
BLOCK_TILES = (
    BlockTile(64, 32, 128, 4, 4),
    BlockTile(64, 64, 64, 4, 4),
    BlockTile(64, 64, 128, 4, 3),
    BlockTile(64, 64, 128, 4, 3, tail=32),
    BlockTile(128, 64, 64, 4, 4, tail=32),
    BlockTile(128, 64, 64, 8, 4, tail=32),
    BlockTile(128, 128, 64, 8, 3),
)
SPLIT_TILES = (  # whose parts the next kernel adds up
    BlockTile(64, 32, 128, 4, 4, 4),
    BlockTile(64, 64, 128, 4, 3, 4),
)
WIDE_TILES = (
    WideTile(128, 128, 64, 8, 4, 3, 2, 2),
    WideTile(128, 256, 64, 8, 8, 3, 2, 1),
)
QUANTIZED_TILES = (
    QuantizedTile(64, 64, 128, 4, 3),
    QuantizedTile(64, 64, 128, 8, 3),
    QuantizedTile(16, 64, 256, 4, 3),
)
QUANTIZED_SPLIT_TILES = (  # likewise
    QuantizedTile(64, 64, 256, 4, 3, 4),
    QuantizedTile(64, 64, 256, 4, 3, 8),
    QuantizedTile(64, 64, 128, 4, 4, 8),
)


def gemv_tile(matrix: Matrix) -> GemvTile:
    """2,048 weights of four outputs (gated: 1,024 of eight pairs) ahead of the wait."""
    size = matrix.weight.shape[1]
    if matrix.stripe is not None:
        return GemvTile(8, 1024, 4)
    if size > 4096:
        return GemvTile(4, 8192, 8)
    return GemvTile(8 if matrix.outputs > _TALL else 4, 2048, 4)


def quantized_gemv_tile(matrix: Matrix) -> GemvTile:
    """A turn takes a row of 2,048 weights, or half of a longer one; one warp's programs fill the GPU evenly."""
    words = (2048 if matrix.inputs <= 4096 else 4096) * matrix.bits // 32
    if matrix.bits == 8:
        return GemvTile(8 if matrix.outputs > _TALL else 4, words, 4)
    if matrix.stripe is not None:
        return GemvTile(4, words // 2, 1)
    if matrix.outputs > _TALL:
        return GemvTile(4, words, 1)
    return GemvTile(16, words, 8) if matrix.inputs <= 4096 else GemvTile(4, words, 4)


def narrow_tile(matrix: Matrix, rows: int) -> NarrowTile:
    """Wider rows leave room for less in flight."""
    if rows > FEW:
        return NarrowTile(64, 64, 1, 4, 4)
    return NarrowTile(64, 64, 1, 4, 3) if matrix.outputs > _TALL else NarrowTile(64, 128, 1, 4, 4)


def splits_of(matrix: Matrix) -> int:
    """Programs per sum that bring the grid near one per multiprocessor."""
    blocks = -(-matrix.outputs // 64)
    splits = 1
    while blocks * splits * 2 <= _BLOCKS and matrix.weight.shape[1] // (splits * 2) >= 256:
        splits *= 2
    return splits


__all__ = [
    "BLOCK_TILES",
    "FEW",
    "QUANTIZED_SPLIT_TILES",
    "QUANTIZED_TILES",
    "SPLIT_TILES",
    "WIDE_TILES",
    "gemv_tile",
    "narrow_tile",
    "quantized_gemv_tile",
    "splits_of",
]
