"""The order of a quantised weight's bytes in memory, in which one copy serves matrix and vector products.

A weight ``[N, K]`` is padded with zeros to ``[N', K']``: N' the next multiple of 16 (``TILE``), K' the next multiple of
8. Its rows (outputs) form tiles of 16; four tiles form a panel of 64 (``PANEL``), the last panel has what is left,
one to four tiles. Panels follow one another. A panel is ``[K' / s, tiles, 16, 4]`` bytes:

- 8 bits (s = 4): byte ``[i, t, o, j]`` is ``q + 128`` of output ``16 t + o`` of the panel and input ``4 i + j``.
- 4 bits (s = 8): its low nibble is ``q + 8`` of input ``8 i + j``, its high nibble that of input ``8 i + 4 + j``.

So 64 bytes are the operand of one ``vpdpbusd``, and a panel is read from front to back.

Scales: without groups, float32 ``[N']``. With groups of g inputs, float16; a panel's are ``[ceil(K / g), outputs of
the panel]``, panels follow one another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TILE = 16
PANEL = 64
INPUT_MULTIPLE = 8
GROUPS = (0, 32, 64, 128)
RANGES = {8: (-128, 127), 4: (-8, 7)}


def packed_size(outputs: int, inputs: int, bits: int) -> int:
    """Bytes of a packed weight ``[outputs, inputs]``."""
    return _padded(outputs, TILE) * _padded(inputs, INPUT_MULTIPLE) * bits // 8


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Packs a quantised weight.

    Args:
        values: int8 [N, K]; in [-8, 7] for 4 bits.
        bits: 8 or 4.

    Returns:
        uint8 [``packed_size(N, K, bits)``].

    Raises:
        ValueError: Wrong shape, dtype or bits, or values that 4 bits do not hold.
    """
    _check(values, bits)
    outputs, inputs = values.shape
    padded = _padded(outputs, TILE)
    words = _padded(inputs, INPUT_MULTIPLE) * bits // 32
    packed = np.empty(padded * words, np.uint32)
    for first in range(0, padded, PANEL):  # panel by panel: what is transposed stays in the cache
        width = min(PANEL, padded - first)
        panel = _words(values[first : first + width], width, bits)
        packed[first * words : (first + width) * words].reshape(words, width)[...] = panel.T
    return packed.view(np.uint8)


def unpack(packed: NDArray[np.uint8], outputs: int, inputs: int, bits: int) -> NDArray[np.int8]:
    """The inverse of ``pack``: int8 [outputs, inputs].

    Raises:
        ValueError: The size does not fit, or bits is neither 8 nor 4.
    """
    if bits not in RANGES:
        raise ValueError(f"bits is {bits}; it must be 8 or 4")
    flat = np.ascontiguousarray(packed).reshape(-1)
    if flat.dtype != np.uint8 or flat.size != packed_size(outputs, inputs, bits):
        what = f"{flat.dtype} [{flat.size}], where uint8 [{packed_size(outputs, inputs, bits)}] is needed"
        raise ValueError(f"the packed weight is {what}")
    padded = _padded(outputs, TILE)
    words = _padded(inputs, INPUT_MULTIPLE) * bits // 32
    source = flat.view(np.uint32) if flat.flags.aligned else flat.copy().view(np.uint32)
    values = np.empty((padded, words * 32 // bits), np.int8)
    for first in range(0, padded, PANEL):
        width = min(PANEL, padded - first)
        panel = source[first * words : (first + width) * words].reshape(words, width).T
        codes = np.ascontiguousarray(panel).view(np.uint8)  # [width, 4 * words]
        target = values[first : first + width]
        if bits == 8:
            target[...] = (codes ^ 0x80).view(np.int8)
        else:
            quads = target.reshape(width, words, 2, 4)
            quads[:, :, 0] = (codes & 15).reshape(width, words, 4).view(np.int8) - 8
            quads[:, :, 1] = (codes >> 4).reshape(width, words, 4).view(np.int8) - 8
    return values[:outputs, :inputs]


def pack_scales(scales: NDArray[np.float32], block_size: int) -> NDArray[np.float32] | NDArray[np.float16]:
    """Packs the scales of a weight.

    Args:
        scales: float [N, G]; G is 1 where block_size is 0, else ceil(K / block_size).
        block_size: 0, 32, 64 or 128.

    Returns:
        float32 [N'] where block_size is 0, else float16 [N' * G].

    Raises:
        ValueError: Wrong shape or block_size, or scales that are not finite (in float16, if there are blocks).
    """
    if block_size not in GROUPS:
        raise ValueError(f"block_size is {block_size}; it must be one of {GROUPS}")
    if scales.ndim != 2 or scales.size == 0 or (block_size == 0 and scales.shape[1] != 1):
        raise ValueError(f"scales have shape {list(scales.shape)}; [N, {'1' if block_size == 0 else 'G'}] is needed")
    dtype = np.float32 if block_size == 0 else np.float16
    with np.errstate(over="ignore"):
        cast = scales.astype(dtype)
    if not np.isfinite(cast).all():
        raise ValueError(f"scales must be finite in {np.dtype(dtype).name}; the largest is {np.abs(scales).max()}")
    outputs, groups = scales.shape
    padded = np.zeros((_padded(outputs, TILE), groups), dtype)
    padded[:outputs] = cast
    return np.concatenate([padded[first : first + PANEL].T.reshape(-1) for first in range(0, len(padded), PANEL)])


def unpack_scales(packed: NDArray, outputs: int, groups: int) -> NDArray[np.float32]:
    """The inverse of ``pack_scales``: float32 [outputs, groups]."""
    padded = _padded(outputs, TILE)
    flat = packed.reshape(-1)
    if flat.size != padded * groups:
        raise ValueError(f"there are {flat.size} scales, where {padded * groups} are needed")
    panels = [
        flat[first * groups : min(first + PANEL, padded) * groups].reshape(groups, -1).T
        for first in range(0, padded, PANEL)
    ]
    return np.concatenate(panels)[:outputs].astype(np.float32)


def interleave_gated(gate: NDArray, up: NDArray) -> NDArray:
    """Rows of a gate and an up projection in the order that ``gated = 1`` wants: 16 of one, 16 of the other.

    Weights, scales and biases alike, before packing: the weight is then ``pack(interleave_gated(gate, up), bits)``. A
    bias stays as this function returns it.

    Args:
        gate: [F, ...].
        up: Of the same shape and dtype.

    Returns:
        [2 F', ...], F' the next multiple of 16; added rows are zeros.

    Raises:
        ValueError: Shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {list(gate.shape)}, but up is {up.dtype} {list(up.shape)}")
    rows, rest = gate.shape[0], gate.shape[1:]
    tiles = _padded(rows, TILE) // TILE
    both = np.zeros((tiles, 2, TILE, *rest), gate.dtype)
    for index, part in enumerate((gate, up)):
        padded = np.zeros((tiles * TILE, *rest), part.dtype)
        padded[:rows] = part
        both[:, index] = padded.reshape(tiles, TILE, *rest)
    return both.reshape(2 * tiles * TILE, *rest)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _check(values: NDArray[np.int8], bits: int) -> None:
    if bits not in RANGES:
        raise ValueError(f"bits is {bits}; it must be 8 or 4")
    if values.ndim != 2 or values.dtype != np.int8 or values.size == 0:
        raise ValueError(f"the weight is {values.dtype} {list(values.shape)}; int8 [N, K] is needed")
    low, high = RANGES[bits]
    if bits == 4 and (values.min() < low or values.max() > high):
        raise ValueError(f"4 bits hold values in [{low}, {high}]; these are in [{values.min()}, {values.max()}]")


def _words(rows: NDArray[np.int8], width: int, bits: int) -> NDArray[np.uint32]:
    """Rows as they are packed, before transposing: uint32 [width, words], each of 4 (8 bits) or 8 (4 bits) inputs."""
    inputs = _padded(rows.shape[1], INPUT_MULTIPLE)
    padded = rows
    if rows.shape != (width, inputs) or not rows.flags.c_contiguous:
        padded = np.zeros((width, inputs), np.int8)
        padded[: rows.shape[0], : rows.shape[1]] = rows
    codes = padded.view(np.uint8)
    if bits == 8:
        return (codes ^ 0x80).view(np.uint32)
    quads = (codes + np.uint8(8)).reshape(width, -1, 2, 4)  # wraps around: -8 becomes 0
    return (quads[:, :, 0] | quads[:, :, 1] << 4).view(np.uint32)[..., 0]


__all__ = [
    "PANEL",
    "TILE",
    "interleave_gated",
    "pack",
    "pack_scales",
    "packed_size",
    "unpack",
    "unpack_scales",
]
