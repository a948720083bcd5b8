"""The launch parameters that the ``cuda`` engine takes, and those that it chooses from by measurement.

The engine imports this package, not the other way round; tests/kernels/test_benchmark.py compares both.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from accel_kernels.benchmark.shapes import Layer
from accel_kernels.block_gemm import BlockTile
from accel_kernels.gemv import GemvTile
from accel_kernels.narrow_gemm import NarrowTile
from accel_kernels.quantized_gemm import QuantizedTile
from accel_kernels.wide_gemm import WideTile

_FEW = 64  # rows up to which weights are read once whatever the rows are
_TALL = 1 << 15  # outputs
_BLOCKS = 132  # programs that fill the GPU
_MOST_SPLITS = 16
_SHORT_PAST = 512  # positions up to which one program serves a head
BLOCK_TILES = (
    BlockTile(64, 32, 128, 4, 4),
    BlockTile(64, 64, 64, 4, 4),
    BlockTile(64, 64, 128, 4, 3),
    BlockTile(64, 64, 128, 4, 3, tail=32),
    BlockTile(128, 64, 64, 8, 4, tail=32),
    BlockTile(128, 128, 64, 8, 3),
)
SPLIT_TILES = (BlockTile(64, 32, 128, 4, 4, 4), BlockTile(64, 64, 128, 4, 3, 4))
WIDE_TILES = (WideTile(128, 128, 64, 8, 4, 3, 2, 2), WideTile(128, 256, 64, 8, 8, 3, 2, 1))
QUANTIZED_TILES = (
    QuantizedTile(64, 64, 128, 4, 3),
    QuantizedTile(64, 64, 128, 8, 3),
    QuantizedTile(16, 64, 256, 4, 3),
)
QUANTIZED_SPLIT_TILES = (
    QuantizedTile(64, 64, 256, 4, 3, 4),
    QuantizedTile(64, 64, 256, 4, 3, 8),
    QuantizedTile(64, 64, 128, 4, 4, 8),
)
ENCODER_ATTENTION = (
    {"block_m": 64, "block_n": 64, "warps": 4, "stages": 3},
    {"block_m": 64, "block_n": 128, "warps": 4, "stages": 2},
    {"block_m": 128, "block_n": 64, "warps": 8, "stages": 3},
)


def gemv_tile(layer: Layer) -> GemvTile:
    """Of one row of floats."""
    if layer.gated:
        return GemvTile(8, 1024, 4)
    if layer.inputs > 4096:
        return GemvTile(4, 8192, 8)
    return GemvTile(8 if layer.outputs > _TALL else 4, 2048, 4)


def quantized_gemv_tile(layer: Layer, bits: int) -> GemvTile:
    """Of one row and integer weights; ``block_k`` counts words."""
    words = (2048 if layer.inputs <= 4096 else 4096) * bits // 32
    if bits == 8:
        return GemvTile(8 if layer.outputs > _TALL else 4, words, 4)
    if layer.gated:
        return GemvTile(4, words // 2, 1)
    if layer.outputs > _TALL:
        return GemvTile(4, words, 1)
    return GemvTile(16, words, 8) if layer.inputs <= 4096 else GemvTile(4, words, 4)


def narrow_tile(layer: Layer, rows: int) -> NarrowTile:
    """Of a few rows, sums whole."""
    if rows > _FEW:
        return NarrowTile(64, 64, 1, 4, 4)
    return NarrowTile(64, 64, 1, 4, 3) if layer.outputs > _TALL else NarrowTile(64, 128, 1, 4, 4)


def narrow_split_tile(layer: Layer, rows: int) -> NarrowTile:
    """Of a few rows whose sums the reader may add up: in parts where the outputs are too few to fill the GPU."""
    splits = 1
    while -(-layer.outputs // 64) * splits * 2 <= _BLOCKS and layer.inputs // (splits * 2) >= 256:
        splits *= 2
    if splits == 1:
        return narrow_tile(layer, rows)
    return NarrowTile(64, 256, splits, 4, 3) if layer.inputs // splits <= 1024 else NarrowTile(64, 128, splits, 4, 4)


def decode_launch(rows: int, kv_heads: int, dim: int, past: int) -> dict[str, Any]:
    """Keyword arguments of ``decode_attention`` for rows with ``past`` tokens in the cache."""
    few = rows * kv_heads <= _BLOCKS
    splits = max(1, min(_MOST_SPLITS, _BLOCKS // (rows * kv_heads))) if past >= _SHORT_PAST else 1
    block = 64 if dim > 128 else (256 if few and dim <= 64 else 128)
    return {"splits": splits, "block": block, "least": 256, "warps": 8 if few else 4}


def label(launch: Any) -> str:
    """A tile's or keyword arguments' names and numbers in words."""
    named = {each.name: getattr(launch, each.name) for each in fields(launch)} if is_dataclass(launch) else launch
    return " ".join(f"{name} {size}" for name, size in named.items())


__all__ = [
    "BLOCK_TILES",
    "ENCODER_ATTENTION",
    "QUANTIZED_SPLIT_TILES",
    "QUANTIZED_TILES",
    "SPLIT_TILES",
    "WIDE_TILES",
    "decode_launch",
    "gemv_tile",
    "label",
    "narrow_split_tile",
    "narrow_tile",
    "quantized_gemv_tile",
]
