"""A few rows times a weight matrix: the decode step of several sequences.

The weights are the tensor cores' tall operand and the rows their narrow one, so that even two rows run on them at the
speed of the memory. Where the outputs are too few to fill the GPU, several programs share the sums of the same
outputs; the next kernel adds the parts up in a fixed order as it reads them, which costs it next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import FLOATS, Expect
from accel_kernels.device import fitting_stages, launch_options, next_power_of_2
from accel_kernels.plain import product
from accel_kernels.tiles import (
    ACTIVATIONS,
    NO_ACTIVATION,
    finish,
    let_successor_start,
    load_or_zeros,
    matrix_line,
    operand,
    wait_for_predecessor,
)

BODY = (
    HEADER
    + """
NarrowGemm <gated: int = 0, stripe, activation: int = -1> (x, weight, bias, residual) => (out)
{
    out = accel.kernels.Linear <gated: int = @gated, stripe: int = @stripe, activation: int = @activation>
        (x, weight, bias, residual)
}
"""
)
# The tensor cores round float32 to TF32, which has float16's precision.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MOST_ROWS = 256  # a program holds all rows


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    stripe: int | None = None,
    activation: int = NO_ACTIVATION,
) -> torch.Tensor:
    """What ``narrow_gemm`` computes of the same arguments, its parts added up: float64 [M, N]."""
    return product(x, weight, bias, residual, gated, stripe, activation)


@dataclass(frozen=True)
class NarrowTile:
    """Outputs per program, terms per turn, programs per sum, warps, turns in flight."""

    block_n: int = 64
    block_k: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4

    def fitting(self, x: torch.Tensor, gated: bool) -> NarrowTile:
        """The tile, with fewer turns in flight (and shorter ones) where shared memory has no room for them.

        Args:
            x: [M, K], the rows.
        """
        rows = max(16, next_power_of_2(len(x)))
        turn = (self.block_n * (1 + gated) + rows) * self.block_k * x.element_size()
        stages = fitting_stages(x.device, self.stages, turn, turn)
        if stages < 2 <= self.stages and self.block_k > 32:
            return replace(self, block_k=self.block_k // 2).fitting(x, gated)
        return replace(self, stages=stages)


@triton.jit
def _store(
    total, up, bias_line, up_bias_line, residual, out, n, m, M, N,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    total += bias_line.to(tl.float32)[:, None]
    up += up_bias_line.to(tl.float32)[:, None]
    total = finish(total, up, ACTIVATION, GATED)
    cells = m.to(tl.int64)[None] * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)[None]
    if HAS_RESIDUAL:
        total += tl.load(residual + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cells, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def narrow_gemm_kernel(
    x, weight, out, bias, residual, M, N, K, STRIPE,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = act(x[m] . weight[n] + bias[n]) (* the same of the other matrix, gated) + residual[m, n]."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    rows = weight + matrix_line(n, STRIPE, GATED).to(tl.int64)[:, None] * K
    lines = x + m.to(tl.int64)[None] * K
    real = (n < N)[:, None]
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    start = split * span
    stop = tl.minimum(start + span, K)
    now = start + k
    first = tl.load(rows + now[None], mask=real & (now < stop)[None], other=0.0)
    if GATED:
        first_up = tl.load(rows + STRIPE * K + now[None], mask=real & (now < stop)[None], other=0.0)
    bias_line = load_or_zeros(bias, n, N, HAS_BIAS)  # ahead: memory takes as long as many products do
    up_bias_line = load_or_zeros(bias, N + n, 2 * N, HAS_BIAS and GATED)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    tile = tl.load(lines + now[:, None], mask=(now < stop)[:, None] & (m < M)[None], other=0.0)
    total = tl.dot(operand(first), operand(tile))
    up = total
    if GATED:
        up = tl.dot(operand(first_up), operand(tile))
    for at in range(start + BLOCK_K, stop, BLOCK_K):
        now = at + k
        tile = operand(tl.load(lines + now[:, None], mask=(now < stop)[:, None] & (m < M)[None], other=0.0))
        piece = tl.load(rows + now[None], mask=real & (now < stop)[None], other=0.0)
        total = tl.dot(operand(piece), tile, total)
        if GATED:
            other = tl.load(rows + STRIPE * K + now[None], mask=real & (now < stop)[None], other=0.0)
            up = tl.dot(operand(other), tile, up)
    if SPLITS == 1:
        _store(total, up, bias_line, up_bias_line, residual, out, n, m, M, N, GATED, ACTIVATION, HAS_RESIDUAL)
    else:  # whoever reads the parts adds them up
        cells = (split * M + m).to(tl.int64)[None] * N + n[:, None]
        tl.store(out + cells, total, mask=real & (m < M)[None])


def narrow_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    stripe: int | None = None,
    activation: int = NO_ACTIVATION,
    tile: NarrowTile = NarrowTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """act(x W^T + bias) + residual of a few rows. Every tensor on one device, contiguous.

    Args:
        x: [M, K] in the weights' type; M at most 256.
        weight: [N, K]; gated: [2N, K], ``stripe`` rows of the gate, as many of the other matrix, and so on.
        out: [M, N], written; with ``tile.splits`` > 1 float32 [splits, M, N], parts that the reader adds up: there
            is no place for a bias, a residual or an activation then.
        bias: [N]; gated: [2N], the gate's first. Like the weights it is read before the predecessor ends: no
            kernel of ours in the same run may write it.
        residual: [M, N], added last; may be ``out``.
        stripe: Divides N; None: N.
        activation: SILU, GELU_ERF, GELU_TANH or NO_ACTIVATION; gated: of the gate.
        tile: Shrinks where shared memory is short.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; an epilogue behind a split sum.
    """
    _check(x, weight, out, bias, residual, gated, stripe, activation, tile.splits)
    (rows, size), count = x.shape, out.shape[-1]
    tile = tile.fitting(x, gated)
    narrow_gemm_kernel[(triton.cdiv(count, tile.block_n), tile.splits)](
        x, weight, out, bias, residual, rows, count, size, stripe or count,
        ROWS=max(16, next_power_of_2(rows)), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, SPLITS=tile.splits,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated, ACTIVATION=activation,
        **launch_options(x.device, dependent, tile.warps, tile.stages),
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
    stripe: int | None,
    activation: int,
    splits: int,
) -> None:
    expect = Expect("narrow_gemm", x.device)
    expect.tensor("x", x, -1, -1)
    rows, size = x.shape[-2:]
    count = out.shape[-1]
    expect.that(0 < rows <= MOST_ROWS, f"{rows} rows; from 1 to {MOST_ROWS} fit")
    expect.tensor("weight", weight, (1 + gated) * count, size, dtypes=(x.dtype,))
    if splits == 1:
        expect.tensor("out", out, rows, count)
    else:
        expect.tensor("out", out, splits, rows, count, dtypes=(torch.float32,))
        plain = bias is None and residual is None and not gated and activation == NO_ACTIVATION
        expect.that(plain, "sums in parts have no bias, residual, gate or activation")
    expect.tensor("bias", bias, (1 + gated) * count, dtypes=FLOATS)
    expect.tensor("residual", residual, rows, count)
    expect.that(activation in ACTIVATIONS, f"unknown activation {activation}")
    expect.stripe(stripe, count)


__all__ = ["BODY", "MOST_ROWS", "TOLERANCES", "NarrowTile", "narrow_gemm", "reference"]
