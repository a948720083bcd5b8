"""One row times int4 or int8 weights in groups: dequantised in registers, nothing but the packed bytes is read.

``packing`` says how words hold the weights. Together with the bits of 1024 a field of int4 is the float16 1024 + w.
Products of one word are summed in float16 (four at a time), all others in float32. Weights are a 32nd of themselves
there, so that no such sum exceeds the row's largest element: whatever row float16 holds, no sum overflows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import FLOATS, Expect
from accel_kernels.device import INTERPRETED, launch_options, next_power_of_2
from accel_kernels.gemv import GemvTile
from accel_kernels.packing import pack, unpack
from accel_kernels.plain import product
from accel_kernels.tiles import (
    ACTIVATIONS,
    NO_ACTIVATION,
    let_successor_start,
    load_or_zeros,
    matrix_line,
    store_line,
    wait_for_predecessor,
)

BODY = (
    HEADER
    + """
QuantizedGemv <bits, gated: int = 0, stripe, activation: int = -1> (x, weight, scales, bias, residual) => (out)
{
    matrix = accel.kernels.Unpack <bits: int = @bits> (weight, scales)
    out = accel.kernels.Linear <gated: int = @gated, stripe: int = @stripe, activation: int = @activation>
        (x, matrix, bias, residual)
}
"""
)
# Of int4, four products of a word are summed in float16.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 8e-3}
_TILE = GemvTile()
_INTERPRETED = tl.constexpr(INTERPRETED)  # inline PTX does not run in the interpreter
# $1: word; $2 .. $5: its elements of the row, in pairs. 0x2800, 0x1800: 1/32, 1/512; 0xD008: -(1024 + 8) / 32;
# 0xC080: -(1024 + 128) / 512.
_INT4 = tl.constexpr("""
{
    .reg .b32 a, b, c, d, high, low_less, high_less, low_part, high_part, total;
    .reg .b16 lo, hi;
    .reg .f32 f, g;
    shr.u32 high, $1, 8;
    lop3.b32 a, $1, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 b, $1, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 c, high, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 d, high, 0x00F000F0, 0x64006400, 0xEA;
    mov.b32 low_part, 0x28002800;
    mov.b32 low_less, 0xD008D008;
    mov.b32 high_part, 0x18001800;
    mov.b32 high_less, 0xC080C080;
    fma.rn.f16x2 a, a, low_part, low_less;
    fma.rn.f16x2 b, b, high_part, high_less;
    fma.rn.f16x2 c, c, low_part, low_less;
    fma.rn.f16x2 d, d, high_part, high_less;
    mul.rn.f16x2 total, a, $2;
    fma.rn.f16x2 total, b, $3, total;
    fma.rn.f16x2 total, c, $4, total;
    fma.rn.f16x2 total, d, $5, total;
    mov.b32 {lo, hi}, total;
    cvt.f32.f16 f, lo;
    cvt.f32.f16 g, hi;
    add.f32 $0, f, g;
}
""")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    stripe: int | None = None,
    activation: int = NO_ACTIVATION,
) -> torch.Tensor:
    """What ``quantized_gemv`` computes of the same arguments: float64 [N]."""
    added = None if residual is None else residual.reshape(1, -1)
    matrix = unpack(weight, scales, bits)
    return product(x.reshape(1, -1), matrix, bias, added, gated, stripe, activation)[0]


@triton.jit
def _field(words, place, BITS: tl.constexpr):
    """One weight of each word, float32."""
    return ((words >> place) & ((1 << BITS) - 1)).to(tl.float32) - (1 << (BITS - 1))


@triton.jit
def _row_words(x, w, width):
    """The row's elements for every word of int4, in pairs, as four int32 [W]."""
    pair = tl.arange(0, 4)
    pairs = tl.load(x.to(tl.pointer_type(tl.int32)) + w[:, None] * 4 + pair[None], mask=(w < width)[:, None], other=0)
    even, odd = pairs.reshape((w.shape[0], 2, 2)).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@triton.jit
def _product(words, factor, x, w, width, p0, p1, p2, p3, BITS: tl.constexpr):
    """Sums [N] of the words' weights times their elements of the row."""
    if BITS == 4 and not _INTERPRETED:
        part = tl.inline_asm_elementwise(
            _INT4,
            "=f,r,r,r,r,r",
            [words, p0[None], p1[None], p2[None], p3[None]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        part *= 32.0
    else:
        FIELDS: tl.constexpr = 32 // BITS
        part = tl.zeros(words.shape, tl.float32)
        for i in tl.static_range(FIELDS):
            place = (i // 2 + i % 2 * 4) * 4 if BITS == 4 else i * BITS
            piece = tl.load(x + w * FIELDS + i, mask=w < width, other=0.0).to(tl.float32)
            part += _field(words, place, BITS) * piece[None]
    return tl.sum(part * factor.to(tl.float32), 1)


@triton.jit
def _pairs(x, w, width, BITS: tl.constexpr):
    """The row's elements of each word where the product takes them in pairs; else nothing that anybody reads."""
    if BITS == 4 and not _INTERPRETED:
        return _row_words(x, w, width)
    else:
        return w, w, w, w


@triton.jit
def _load(rows, factors, w, mask, SHARE: tl.constexpr):
    """Words [N, W] and the scales that they share."""
    words = tl.load(rows + w[None], mask=mask, other=0)
    return words, tl.load(factors + (w // SHARE)[None], mask=mask, other=0.0)


@triton.jit
def quantized_gemv_kernel(
    x, weight, scales, out, bias, residual, N, K, STRIPE,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As ``gemv_kernel`` without a norm, with weight int32 [N, K * BITS / 32] and scales [N, K / GROUP]."""
    SHARE: tl.constexpr = GROUP // (32 // BITS)  # words of one scale
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    width = K // (32 // BITS)
    line = matrix_line(n, STRIPE, GATED)
    rows = weight + line.to(tl.int64)[:, None] * width
    factors = scales + line.to(tl.int64)[:, None] * (width // SHARE)
    mask = (n < N)[:, None] & (w < width)[None]
    words, factor = _load(rows, factors, w, mask, SHARE)
    if GATED:
        up_words, up_factor = _load(rows + STRIPE * width, factors + STRIPE * (width // SHARE), w, mask, SHARE)
    bias_line = load_or_zeros(bias, n, N, HAS_BIAS)  # ahead: memory takes as long as many products do
    up_bias_line = load_or_zeros(bias, N + n, 2 * N, HAS_BIAS and GATED)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    p0, p1, p2, p3 = _pairs(x, w, width, BITS)
    total = _product(words, factor, x, w, width, p0, p1, p2, p3, BITS)
    total_up = total
    if GATED:
        total_up = _product(up_words, up_factor, x, w, width, p0, p1, p2, p3, BITS)
    for start in range(BLOCK_W, width, BLOCK_W):
        at = start + w
        mask = (n < N)[:, None] & (at < width)[None]
        words, factor = _load(rows, factors, at, mask, SHARE)
        p0, p1, p2, p3 = _pairs(x, at, width, BITS)
        total += _product(words, factor, x, at, width, p0, p1, p2, p3, BITS)
        if GATED:
            words, factor = _load(rows + STRIPE * width, factors + STRIPE * (width // SHARE), at, mask, SHARE)
            total_up += _product(words, factor, x, at, width, p0, p1, p2, p3, BITS)
    added = load_or_zeros(residual, n, N, HAS_RESIDUAL)  # not before: it would delay what the products wait for
    store_line(total, total_up, bias_line, up_bias_line, added, out, n, N, GATED, ACTIVATION)


def quantized_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    bits: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    stripe: int | None = None,
    activation: int = NO_ACTIVATION,
    tile: GemvTile = _TILE,
    dependent: bool | None = None,
) -> torch.Tensor:
    """act(x . weight + bias) + residual of one row, as ``gemv`` without a norm. Every tensor contiguous.

    Args:
        x: [K]; with 4 bits float16.
        weight, scales: As ``pack`` returns them for [N, K]; gated: [2N, K] in stripes.
        out: [N], written; may be ``residual``.
        bits: 4 or 8.
        bias: [N]; gated: [2N], the gate's first. Like the weights it is read before the predecessor ends: no
            kernel of ours in the same run may write it.
        residual: [N], added last.
        stripe: Divides N; None: N.
        activation: SILU, GELU_ERF, GELU_TANH or NO_ACTIVATION; gated: of the gate.
        tile: Its ``block_k`` counts words.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; another number of bits.
    """
    _check(x, weight, scales, out, bits, bias, residual, gated, stripe, activation)
    size, count = x.numel(), out.numel()
    quantized_gemv_kernel[(triton.cdiv(count, tile.block_n),)](
        x, weight, scales, out, bias, residual, count, size, stripe or count,
        BITS=bits, GROUP=size // scales.shape[1], BLOCK_N=tile.block_n,
        BLOCK_W=min(tile.block_k, next_power_of_2(weight.shape[1])), HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, GATED=gated, ACTIVATION=activation,
        **launch_options(x.device, dependent, tile.warps),
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, bits: int,
    bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool, stripe: int | None, activation: int,
) -> None:  # fmt: skip
    expect = Expect("quantized_gemv", x.device)
    size, count = x.numel(), out.numel()
    expect.that(bits in (4, 8), f"weights of {bits} bits; there are 4 and 8")
    expect.tensor("x", x, size, dtypes=(torch.float16,) if bits == 4 else FLOATS)
    expect.tensor("out", out, count)
    expect.tensor("weight", weight, (1 + gated) * count, size * bits // 32, dtypes=(torch.int32,))
    expect.tensor("scales", scales, (1 + gated) * count, -1)
    expect.groups(scales.shape[1], size, 32 // bits)
    expect.tensor("bias", bias, (1 + gated) * count)
    expect.tensor("residual", residual, count)
    expect.that(activation in ACTIVATIONS, f"unknown activation {activation}")
    expect.stripe(stripe, count)


__all__ = ["BODY", "TOLERANCES", "pack", "quantized_gemv", "reference"]
