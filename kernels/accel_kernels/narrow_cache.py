"""Caches in 8 bits, with a scale per channel: how keys and values are rounded, and what comes back as an operand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import INTERPRETED

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)  # caches that have scales
FLOAT8_SM = (8, 9)  # the first whose instructions convert it

_INTERPRETED = tl.constexpr(INTERPRETED)
# Four at once, five instructions in place of the converter's one per number, of which it does few at a time: with
# 128 added a byte is the low half of the float16 1024 + byte.
_INT8_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 bytes, offset;
    mov.b32 offset, 0x64806480;
    xor.b32 bytes, $2, 0x80808080;
    prmt.b32 $0, bytes, 0x64646464, 0x4140;
    prmt.b32 $1, bytes, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
}""")
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: next to it float32 holds whole numbers alone, and ties go to even


def rounded(x: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What a cache of a type holds of keys or values [..., KV, D], float64: multiples of ``scales`` [KV, D]."""
    x = x.double()
    if scales is None:
        return x
    ratio = x / scales.double()
    if dtype == torch.int8:
        return ratio.round().clamp(-128, 127)
    return ratio.clamp(-448, 448).float().to(dtype).double()


def meaning(cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The keys or values that a cache [B, KV, C, D] stands for, float64."""
    return cache.double() if scales is None else cache.double() * scales.double()[:, None]


@triton.jit
def _on_float8_grid(x):
    """The nearest number of three bits behind the point, ties to even; below the normal ones multiples of 2^-9."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    tiny = (x + 24576.0) - 24576.0  # 1.5 * 2^14
    return tl.where(tl.abs(x) < 0.015625, tiny, normal)


@triton.jit
def in_cache(x, scales, cache, NARROW: tl.constexpr):
    """float32 keys or values as a cache holds them, in its type; NARROW: of 8 bits."""
    element: tl.constexpr = cache.dtype.element_ty
    if NARROW:
        x = tl.div_rn(x, scales)
        if element == tl.int8:
            x = tl.minimum(tl.maximum(x, -128.0), 127.0)
            x = (x + _ROUNDER) - _ROUNDER
        else:
            x = tl.minimum(tl.maximum(x, -448.0), 448.0)
            if _INTERPRETED:  # whose conversion loses the carry into the exponent
                x = _on_float8_grid(x)
    return x.to(element)


@triton.jit
def operand_beside(tile, other):
    """A tile of the cache as ``tl.dot`` takes it beside a tile of the computation's type.

    Of one type already, it stays as it is. 8 bits are exact in all of these types. As in ``tiles.operand``, the
    interpreter gets float32.
    """
    if _INTERPRETED:
        return tile.to(tl.float32)
    elif tile.dtype == tl.int8 and other.dtype == tl.float16:
        return tl.inline_asm_elementwise(_INT8_TO_FLOAT16, "=r,=r,r", [tile], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return tile.to(other.dtype)


__all__ = ["EIGHT_BITS", "FLOAT8_SM", "in_cache", "meaning", "operand_beside", "rounded"]
