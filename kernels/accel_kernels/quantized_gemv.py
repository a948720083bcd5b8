"""One row times int4 or int8 weights in groups: dequantised in registers, nothing but the packed bytes is read.

A word of 32 bits holds 8 (4) neighbouring weights of one output as unsigned numbers with 8 (128) for zero. Of int4,
field i and field i + 4 are neighbours, so that one mask leaves a pair for the GPU's two-at-a-time float16 arithmetic:
together with the bits of 1024 such a field is the float16 1024 + w. Products of one word are summed in float16 (four
at a time), all others in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import INTERPRETED, has_dependent_launch, next_power_of_2
from accel_kernels.gemv import GemvTile
from accel_kernels.tiles import activate, let_successor_start, wait_for_predecessor

INTERPRETED_HERE = tl.constexpr(INTERPRETED)  # inline PTX does not run in the interpreter
# $1: word; $2 .. $5: its elements of the row, in pairs. 0xE408: -1032; 0xD480: -72 = -(1024 + 128) / 16; 0x2C00: 1/16.
_INT4 = tl.constexpr("""
{
    .reg .b32 a, b, c, d, high, less, less16, part, total;
    .reg .b16 lo, hi;
    .reg .f32 f, g;
    shr.u32 high, $1, 8;
    lop3.b32 a, $1, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 b, $1, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 c, high, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 d, high, 0x00F000F0, 0x64006400, 0xEA;
    mov.b32 less, 0xE408E408;
    mov.b32 less16, 0xD480D480;
    mov.b32 part, 0x2C002C00;
    add.rn.f16x2 a, a, less;
    fma.rn.f16x2 b, b, part, less16;
    add.rn.f16x2 c, c, less;
    fma.rn.f16x2 d, d, part, less16;
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


@triton.jit
def _field(words, place, BITS: tl.constexpr):
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
    if BITS == 4 and not INTERPRETED_HERE:
        part = tl.inline_asm_elementwise(
            _INT4,
            "=f,r,r,r,r,r",
            [words, p0[None], p1[None], p2[None], p3[None]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        FIELDS: tl.constexpr = 32 // BITS
        part = tl.zeros(words.shape, tl.float32)
        for i in tl.static_range(FIELDS):
            place = (i // 2 + i % 2 * 4) * 4 if BITS == 4 else i * BITS
            piece = tl.load(x + w * FIELDS + i, mask=w < width, other=0.0).to(tl.float32)
            part += _field(words, place, BITS) * piece[None]
    return tl.sum(part * factor.to(tl.float32), 1)


@triton.jit
def quantized_gemv_kernel(
    x,
    weight,
    scales,
    out,
    bias,
    residual,
    N,
    K,
    STRIPE,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """As ``gemv_kernel`` without a norm, with weight int32 [N, K * BITS / 32] and scales [N, K / GROUP]."""
    FIELDS: tl.constexpr = 32 // BITS
    SHARE: tl.constexpr = GROUP // FIELDS  # words of one scale
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    width = K // FIELDS
    line = n // STRIPE * (2 * STRIPE) + n % STRIPE if GATED else n
    rows = weight + line.to(tl.int64)[:, None] * width
    factors = scales + line.to(tl.int64)[:, None] * (width // SHARE)
    mask = (n < N)[:, None] & (w < width)[None]
    words = tl.load(rows + w[None], mask=mask, other=0)
    factor = tl.load(factors + (w // SHARE)[None], mask=mask, other=0.0)
    up_words = words
    up_factor = factor
    if GATED:
        up_words = tl.load(rows + STRIPE * width + w[None], mask=mask, other=0)
        up_factor = tl.load(factors + STRIPE * (width // SHARE) + (w // SHARE)[None], mask=mask, other=0.0)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    p0 = w
    p1 = w
    p2 = w
    p3 = w
    if BITS == 4 and not INTERPRETED_HERE:
        p0, p1, p2, p3 = _row_words(x, w, width)
    total = _product(words, factor, x, w, width, p0, p1, p2, p3, BITS)
    total_up = total
    if GATED:
        total_up = _product(up_words, up_factor, x, w, width, p0, p1, p2, p3, BITS)
    for start in range(BLOCK_W, width, BLOCK_W):
        at = start + w
        mask = (n < N)[:, None] & (at < width)[None]
        words = tl.load(rows + at[None], mask=mask, other=0)
        factor = tl.load(factors + (at // SHARE)[None], mask=mask, other=0.0)
        if BITS == 4 and not INTERPRETED_HERE:
            p0, p1, p2, p3 = _row_words(x, at, width)
        total += _product(words, factor, x, at, width, p0, p1, p2, p3, BITS)
        if GATED:
            words = tl.load(rows + STRIPE * width + at[None], mask=mask, other=0)
            factor = tl.load(factors + STRIPE * (width // SHARE) + (at // SHARE)[None], mask=mask, other=0.0)
            total_up += _product(words, factor, x, at, width, p0, p1, p2, p3, BITS)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            total_up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION >= 0:
        total = activate(total, ACTIVATION)
    if GATED:
        total = total * total_up
    if HAS_RESIDUAL:
        total += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


def pack(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest, symmetric per group.

    Args:
        weight: [N, K], K a multiple of ``group``.
        bits: 4 or 8.

    Returns:
        int32 [N, K * bits / 32] and scales float16 [N, K / group].
    """
    count, size = weight.shape
    grouped = weight.float().reshape(count, size // group, group)
    top = (1 << (bits - 1)) - 1
    scales = (grouped.abs().amax(-1) / top).clamp(min=torch.finfo(torch.float16).tiny).half()
    whole = (grouped / scales.float()[..., None]).round().clamp(-top - 1, top).to(torch.int64) + top + 1
    order = torch.arange(32 // bits, device=weight.device)
    if bits == 4:
        order = order // 2 + order % 2 * 4
    words = (whole.reshape(count, -1, 32 // bits) << (order * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32), scales


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
    activation: int = -1,
    tile: GemvTile = GemvTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """As ``gemv`` without a norm; x float16 [K]; tile.block_k counts words. weight, scales: as ``pack`` returns them."""
    size, count = x.numel(), out.numel()
    width = weight.shape[1]
    assert x.dtype == torch.float16 or bits == 8
    dependent = has_dependent_launch(x.device) if dependent is None else dependent
    quantized_gemv_kernel[(triton.cdiv(count, tile.block_n),)](
        x,
        weight,
        scales,
        out,
        bias,
        residual,
        count,
        size,
        stripe or count,
        BITS=bits,
        GROUP=size // scales.shape[1],
        BLOCK_N=tile.block_n,
        BLOCK_W=min(tile.block_k, next_power_of_2(width)),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        ACTIVATION=activation,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
