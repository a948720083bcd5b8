"""Several rows times int4 or int8 weights in groups: tiles are dequantised in registers and meet the tensor cores.

As in ``narrow_gemm`` the weights are the tall operand and the rows the narrow one. A weight is rounded once more, to
the rows' type, when its scale is on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import FLOATS, Expect
from accel_kernels.device import fitting_stages, launch_options, next_power_of_2
from accel_kernels.packing import unpack
from accel_kernels.plain import product
from accel_kernels.tiles import (
    ACTIVATIONS,
    NO_ACTIVATION,
    finish,
    let_successor_start,
    load_or_zeros,
    matrix_line,
    operand,
    unpacked,
    wait_for_predecessor,
)

BODY = (
    HEADER
    + """
QuantizedGemm <bits, gated: int = 0, stripe, activation: int = -1> (x, weight, scales, bias, residual) => (out)
{
    matrix = accel.kernels.Unpack <bits: int = @bits> (weight, scales)
    out = accel.kernels.Linear <gated: int = @gated, stripe: int = @stripe, activation: int = @activation>
        (x, matrix, bias, residual)
}
"""
)
# The tensor cores round float32 to TF32, which has float16's precision; bfloat16 rounds the weights beside the result.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-3, torch.bfloat16: 16e-3}
_LEAST = 16  # rows, and terms of a turn, that the tensor cores take


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
    """What ``quantized_gemm`` computes of the same arguments: float64 [M, N]."""
    return product(x, unpack(weight, scales, bits), bias, residual, gated, stripe, activation)


@dataclass(frozen=True)
class QuantizedTile:
    """Outputs and rows per program, terms per turn, warps, turns in flight, programs per sum."""

    block_n: int = 64
    block_m: int = 64
    block_k: int = 128
    warps: int = 4
    stages: int = 3
    splits: int = 1

    def fitting(self, x: torch.Tensor, group: int, bits: int, gated: bool) -> QuantizedTile:
        """The tile for rows [M, K] and groups of a size.

        Turns hold whole groups, or groups whole turns. Where shared memory is short, fewer turns are in flight, or
        shorter ones.
        """
        rows = min(self.block_m, max(_LEAST, next_power_of_2(len(x))))
        power = group & -group
        depth = self.block_k if power == group and group <= self.block_k else min(self.block_k, power)
        height, size = self.block_n * (1 + gated), x.element_size()
        turn = (height * bits // 8 + rows * size) * depth
        stages = fitting_stages(x.device, self.stages, turn, height * depth * size)
        if stages < 2 <= self.stages and depth > max(group, 32):
            return replace(self, block_k=depth // 2).fitting(x, group, bits, gated)
        return replace(self, block_m=rows, block_k=depth, stages=stages)


@triton.jit
def _dequantized(words, factor, BITS: tl.constexpr, SHARES: tl.constexpr, TYPE: tl.constexpr):
    """Weights [N, K] of words [N, W] and scales [N, SHARES], in a type."""
    whole = unpacked(words, BITS)
    if SHARES == 1:
        return operand((whole.to(tl.float32) * factor.to(tl.float32)).to(TYPE))
    N: tl.constexpr = whole.shape[0]
    K: tl.constexpr = whole.shape[1]
    grouped = tl.reshape(whole, (N, SHARES, K // SHARES)).to(tl.float32) * factor.to(tl.float32)[:, :, None]
    return operand(tl.reshape(grouped.to(TYPE), (N, K)))


@triton.jit
def _load(rows, factors, w, g, inside, width, groups):
    """Words [N, W] and scales [N, SHARES]; zeros, which make zeros, behind the end."""
    words = tl.load(rows + w[None], mask=inside & (w < width)[None], other=0)
    return words, tl.load(factors + g[None], mask=inside & (g < groups)[None], other=0.0)


@triton.jit
def _store(
    total, other, out, bias_line, up_bias_line, residual, n, m, split, M, N,
    SPLITS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    bias_line = bias_line.to(tl.float32)
    if SPLITS > 1:  # the first part has it
        bias_line *= (split == 0).to(tl.float32)
    total += bias_line[:, None]
    other += up_bias_line.to(tl.float32)[:, None]
    total = finish(total, other, ACTIVATION, GATED)
    cells = (split * M + m).to(tl.int64)[None] * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)[None]
    if HAS_RESIDUAL:
        total += tl.load(residual + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cells, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantized_gemm_kernel(
    x, weight, scales, out, bias, residual, M, N, K, STRIPE,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As ``narrow_gemm_kernel`` with weight int32 [N, K * BITS / 32] and scales [N, K / GROUP], SHARES in a turn."""
    FIELDS: tl.constexpr = 32 // BITS
    TYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w = tl.arange(0, BLOCK_K // FIELDS)
    g = tl.arange(0, SHARES)
    width, groups = K // FIELDS, K // GROUP
    line = matrix_line(n, STRIPE, GATED).to(tl.int64)[:, None]
    rows = weight + line * width
    factors = scales + line * groups
    lines = x + m.to(tl.int64)[None] * K
    real = (n < N)[:, None]
    split = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    first, stop = split * span, tl.minimum(split * span + span, K)
    at, share, now = first // FIELDS + w, first // GROUP + g, first + k
    words, factor = _load(rows, factors, at, share, real, width, groups)
    if GATED:
        up_words, up_factor = _load(rows + STRIPE * width, factors + STRIPE * groups, at, share, real, width, groups)
    bias_line = load_or_zeros(bias, n, N, HAS_BIAS)  # ahead: memory takes as long as many products do
    up_bias_line = load_or_zeros(bias, N + n, 2 * N, HAS_BIAS and GATED)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    tile = operand(tl.load(lines + now[:, None], mask=(now < K)[:, None] & (m < M)[None], other=0.0))
    total = tl.dot(_dequantized(words, factor, BITS, SHARES, TYPE), tile)
    other = total
    if GATED:
        other = tl.dot(_dequantized(up_words, up_factor, BITS, SHARES, TYPE), tile)
    for start in range(first + BLOCK_K, stop, BLOCK_K):
        now = start + k
        at = start // FIELDS + w
        share = start // GROUP + g
        words, factor = _load(rows, factors, at, share, real, width, groups)
        tile = operand(tl.load(lines + now[:, None], mask=(now < K)[:, None] & (m < M)[None], other=0.0))
        total = tl.dot(_dequantized(words, factor, BITS, SHARES, TYPE), tile, total)
        if GATED:
            words, factor = _load(rows + STRIPE * width, factors + STRIPE * groups, at, share, real, width, groups)
            other = tl.dot(_dequantized(words, factor, BITS, SHARES, TYPE), tile, other)
    _store(
        total, other, out, bias_line, up_bias_line, residual, n, m, split, M, N, SPLITS, HAS_RESIDUAL, GATED, ACTIVATION
    )  # fmt: skip


def quantized_gemm(
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
    tile: QuantizedTile = QuantizedTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """act(x W^T + bias) + residual of any number of rows. Every tensor on one device, contiguous.

    Args:
        x: [M, K] of any float type.
        weight, scales: As ``packing`` has them for [N, K]; gated: [2N, K] in stripes. Groups of a multiple of 16.
        out: [M, N], written; may be ``residual``. With ``tile.splits`` > 1 float32 [splits, M, N], parts that the
            reader adds up: there is no gate, residual or activation then.
        bits: 4 or 8.
        bias: [N]; gated: [2N], the gate's first. Like the weights it is read before the predecessor ends: no
            kernel of ours in the same run may write it.
        residual: [M, N], added last.
        stripe: Divides N; None: N.
        activation: SILU, GELU_ERF, GELU_TANH or NO_ACTIVATION; gated: of the gate.
        tile: Its turns are cut to the groups, and shrink where shared memory is short.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; another number of bits; odd groups.
    """
    _check(x, weight, scales, out, bits, bias, residual, gated, stripe, activation, tile.splits)
    (rows, size), count = x.shape, out.shape[-1]
    group = size // scales.shape[1]
    tile = tile.fitting(x, group, bits, gated)
    quantized_gemm_kernel[(triton.cdiv(count, tile.block_n), triton.cdiv(rows, tile.block_m), tile.splits)](
        x, weight, scales, out, bias, residual, rows, count, size, stripe or count,
        BITS=bits, GROUP=group, SHARES=max(tile.block_k // group, 1),
        BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, SPLITS=tile.splits,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated, ACTIVATION=activation,
        **launch_options(x.device, dependent, tile.warps, tile.stages),
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, bits: int,
    bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool, stripe: int | None, activation: int,
    splits: int,
) -> None:  # fmt: skip
    expect = Expect("quantized_gemm", x.device)
    expect.that(bits in (4, 8), f"weights of {bits} bits; there are 4 and 8")
    expect.tensor("x", x, -1, -1, dtypes=FLOATS)
    rows, size = x.shape
    count = out.shape[-1]
    if splits == 1:
        expect.tensor("out", out, rows, count)
    else:
        expect.tensor("out", out, splits, rows, count, dtypes=(torch.float32,))
        whole = residual is None and activation == NO_ACTIVATION and not gated
        expect.that(whole, "sums in parts have no gate, residual or activation")
    expect.that(rows > 0 and count > 0, f"{rows} rows of {count} outputs")
    expect.tensor("weight", weight, (1 + gated) * count, size * bits // 32, dtypes=(torch.int32,))
    expect.tensor("scales", scales, (1 + gated) * count, -1)
    expect.groups(scales.shape[1], size, 32 // bits)
    group = size // scales.shape[1]
    expect.that(group % _LEAST == 0, f"groups of {group}; the tensor cores take multiples of {_LEAST}")
    expect.tensor("bias", bias, (1 + gated) * count)
    expect.tensor("residual", residual, rows, count)
    expect.that(activation in ACTIVATIONS, f"unknown activation {activation}")
    expect.stripe(stripe, count)


__all__ = ["BODY", "TOLERANCES", "QuantizedTile", "quantized_gemm", "reference"]
