"""Launch parameters for models' shapes: tiles that one kernel always takes, and the few that compete where a shape
decides: each is compiled once.

They were measured on an H200; those for integer weights, and the encoders' attention, on an H100.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch

from accel_kernels.block_gemm import BlockTile
from accel_kernels.gemv import GemvTile
from accel_kernels.narrow_gemm import NarrowTile
from accel_kernels.quantized_gemm import QuantizedTile
from accel_kernels.wide_gemm import WideTile

FEW = 64  # rows up to which the weights are read once whatever the rows are
_TALL = 1 << 15  # outputs
_BLOCKS = 132  # programs that fill the GPU
BLOCK_TILES = (
    BlockTile(64, 32, 128, 4, 4),
    BlockTile(64, 64, 64, 4, 4),
    BlockTile(64, 64, 128, 4, 3),
    BlockTile(64, 64, 128, 4, 3, tail=32),
    BlockTile(128, 64, 64, 8, 4, tail=32),
    BlockTile(128, 128, 64, 8, 3),
)
DESCRIBED_TILES = (  # from SM 90 on: more turns in flight, and tiles of which a thousand rows fill the GPU once
    BlockTile(64, 64, 128, 4, 4, described=True),
    BlockTile(64, 64, 128, 4, 5, described=True),
    BlockTile(64, 32, 128, 4, 6, described=True),
    BlockTile(64, 32, 256, 4, 3, described=True),
    BlockTile(64, 64, 128, 4, 4, tail=32, described=True),
    BlockTile(64, 128, 64, 4, 4, tail=16, described=True),
    BlockTile(128, 64, 128, 4, 3, described=True),
    BlockTile(128, 64, 64, 4, 3, tail=32, described=True),
    BlockTile(128, 128, 64, 8, 3, tail=64, described=True),
)
SPLIT_TILES = (  # whose parts the next kernel adds up
    BlockTile(64, 32, 128, 4, 4, 4),
    BlockTile(64, 64, 128, 4, 3, 4),
)
DESCRIBED_SPLIT_TILES = (  # likewise
    BlockTile(64, 64, 128, 4, 4, 4, described=True),
    BlockTile(64, 64, 128, 4, 4, 2, described=True),
    BlockTile(64, 32, 128, 4, 4, 2, described=True),
    BlockTile(128, 64, 64, 4, 6, 4, described=True),
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
ENCODER_ATTENTION_TILES = (
    {"block_m": 64, "block_n": 64, "warps": 4, "stages": 3},
    {"block_m": 64, "block_n": 64, "warps": 4, "stages": 2},
    {"block_m": 64, "block_n": 128, "warps": 4, "stages": 2},
    {"block_m": 128, "block_n": 64, "warps": 8, "stages": 3},
)
SHORT_PAST = 512  # positions up to which one program per head is as fast as several that must meet
_MOST_SPLITS = 16


class Layer(Protocol):
    """A linear layer's sizes: K inputs, N outputs, and rows of a gate's stripe (None: not gated)."""

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    @property
    def stripe(self) -> int | None: ...


def gemv_tile(layer: Layer) -> GemvTile:
    """2,048 weights of four outputs (gated: 1,024 of eight pairs) ahead of the wait."""
    if layer.stripe is not None:
        return GemvTile(8, 1024, 4)
    if layer.inputs > 4096:
        return GemvTile(4, 8192, 8)
    return GemvTile(8 if layer.outputs > _TALL else 4, 2048, 4)


def quantized_gemv_tile(layer: Layer, bits: int) -> GemvTile:
    """A turn takes a row of 2,048 weights, or half of a longer one; one warp's programs fill the GPU evenly."""
    words = (2048 if layer.inputs <= 4096 else 4096) * bits // 32
    if bits == 8:
        return GemvTile(8 if layer.outputs > _TALL else 4, words, 4)
    if layer.stripe is not None:
        return GemvTile(4, words // 2, 1)
    if layer.outputs > _TALL:
        return GemvTile(4, words, 1)
    return GemvTile(16, words, 8) if layer.inputs <= 4096 else GemvTile(4, words, 4)


def narrow_tile(layer: Layer, rows: int) -> NarrowTile:
    """Wider rows leave room for less in flight."""
    if rows > FEW:
        return NarrowTile(64, 64, 1, 4, 4)
    return NarrowTile(64, 64, 1, 4, 3) if layer.outputs > _TALL else NarrowTile(64, 128, 1, 4, 4)


def splits_of(layer: Layer) -> int:
    """Programs per sum that bring the grid near one per multiprocessor."""
    blocks = -(-layer.outputs // 64)
    splits = 1
    while blocks * splits * 2 <= _BLOCKS and layer.inputs // (splits * 2) >= 256:
        splits *= 2
    return splits


def narrow_split_tile(layer: Layer, rows: int) -> NarrowTile:
    """Of a few rows whose sums the reader may add up: in parts where the outputs are too few to fill the GPU."""
    splits = splits_of(layer)
    if splits == 1:
        return narrow_tile(layer, rows)
    return NarrowTile(64, 256, splits, 4, 3) if layer.inputs // splits <= 1024 else NarrowTile(64, 128, splits, 4, 4)


def decode_launch(rows: int, kv_heads: int, dim: int, long_past: bool, cache: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of ``decode_attention``.

    Args:
        long_past: Whether a row may have ``SHORT_PAST`` positions in the cache, or more.
        cache: Its type.
    """
    heads = rows * kv_heads
    splits = max(1, min(_MOST_SPLITS, 2 * _BLOCKS // heads)) if long_past else 1
    few = heads * splits <= _BLOCKS
    block = _block(few, dim, long_past)
    if cache.itemsize == 1:  # whose conversion takes registers
        block = min(block, 128 if dim <= 64 else 64)
    return {"splits": splits, "block": block, "least": 256, "warps": 8 if few else 4}


def _block(few: bool, dim: int, long_past: bool) -> int:
    """Positions of a turn: asking for many at once hides the memory's latency, but larger heads leave less room."""
    if dim > 128:
        return 64
    if dim > 64:
        return 256 if few and long_past else 128
    return 256 if few or long_past else 128


def label(launch: Any) -> str:
    """A tile's or keyword arguments' names and numbers in words."""
    named = {each.name: getattr(launch, each.name) for each in fields(launch)} if is_dataclass(launch) else launch
    return " ".join(f"{name} {size}" for name, size in named.items())


__all__ = [
    "BLOCK_TILES",
    "DESCRIBED_SPLIT_TILES",
    "DESCRIBED_TILES",
    "ENCODER_ATTENTION_TILES",
    "FEW",
    "QUANTIZED_SPLIT_TILES",
    "QUANTIZED_TILES",
    "SHORT_PAST",
    "SPLIT_TILES",
    "WIDE_TILES",
    "Layer",
    "decode_launch",
    "gemv_tile",
    "label",
    "narrow_split_tile",
    "narrow_tile",
    "quantized_gemv_tile",
    "splits_of",
]
