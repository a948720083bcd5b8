"""One row times a weight matrix, with what stands around it in a transformer: the decode step of one sequence.

A program computes BLOCK_N outputs and streams their weights once. It asks for its first weights before it waits for
the kernel before, so that the memory never idles between two kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import Expect
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.plain import normed, product
from accel_kernels.tiles import (
    ACTIVATIONS,
    NO_ACTIVATION,
    NO_NORM,
    NORMS,
    let_successor_start,
    load_or_zeros,
    matrix_line,
    normalized,
    row_statistics,
    store_line,
    wait_for_predecessor,
)

BODY = (
    HEADER
    + """
Gemv <norm: int = 0, eps: float = 0.0, gated: int = 0, stripe, activation: int = -1>
    (x, weight, norm_weight, norm_bias, bias, residual) => (out)
{
    line = accel.kernels.Normalize <norm: int = @norm, eps: float = @eps> (x, norm_weight, norm_bias)
    out = accel.kernels.Linear <gated: int = @gated, stripe: int = @stripe, activation: int = @activation>
        (line, weight, bias, residual)
}
"""
)
# Sums are float32 whatever the types; what is left is the rounding of the output.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: int = NO_NORM,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    stripe: int | None = None,
    activation: int = NO_ACTIVATION,
) -> torch.Tensor:
    """What ``gemv`` computes of the same arguments: float64 [N]."""
    line = normed(x.reshape(1, -1), norm, norm_weight, norm_bias, eps)
    added = None if residual is None else residual.reshape(1, -1)
    return product(line, weight, bias, added, gated, stripe, activation)[0]


@dataclass(frozen=True)
class GemvTile:
    """Outputs per program, weights per output and turn, warps."""

    block_n: int = 4
    block_k: int = 2048
    warps: int = 4


@triton.jit
def gemv_kernel(
    x, weight, out, norm_weight, norm_bias, bias, residual, N, K, STRIPE, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROW: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n] = act(norm(x) . weight[n] + bias[n]) (* the same of the other matrix, gated) + residual[n]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + matrix_line(n, STRIPE, GATED).to(tl.int64)[:, None] * K
    inside = (n < N)[:, None]
    now = tl.load(rows + k[None], mask=inside & (k < K)[None], other=0.0)
    if GATED:
        up = tl.load(rows + STRIPE * K + k[None], mask=inside & (k < K)[None], other=0.0)
    bias_line = load_or_zeros(bias, n, N, HAS_BIAS)  # ahead: memory takes as long as many products do
    up_bias_line = load_or_zeros(bias, N + n, 2 * N, HAS_BIAS and GATED)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    added = load_or_zeros(residual, n, N, HAS_RESIDUAL)
    mean = 0.0
    scale = 1.0
    if NORM != 0:
        mean, scale = row_statistics(x, K, eps, NORM, ROW)
    piece = normalized(x, k, k < K, mean, scale, norm_weight, norm_bias, NORM, HAS_NORM_BIAS)
    total = tl.sum(now.to(tl.float32) * piece[None], 1)
    total_up = total
    if GATED:
        total_up = tl.sum(up.to(tl.float32) * piece[None], 1)
    for start in range(BLOCK_K, K, BLOCK_K):
        at = start + k
        now = tl.load(rows + at[None], mask=inside & (at < K)[None], other=0.0)
        piece = normalized(x, at, at < K, mean, scale, norm_weight, norm_bias, NORM, HAS_NORM_BIAS)
        total += tl.sum(now.to(tl.float32) * piece[None], 1)
        if GATED:
            up = tl.load(rows + STRIPE * K + at[None], mask=inside & (at < K)[None], other=0.0)
            total_up += tl.sum(up.to(tl.float32) * piece[None], 1)
    store_line(total, total_up, bias_line, up_bias_line, added, out, n, N, GATED, ACTIVATION)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    norm: int = NO_NORM,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    stripe: int | None = None,
    activation: int = NO_ACTIVATION,
    tile: GemvTile = GemvTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """act(norm(x) . weight + bias) + residual of one row. Every tensor on one device, contiguous, of any float type.

    Args:
        x: [K].
        weight: [N, K]; gated: [2N, K], ``stripe`` rows of the gate, as many of the other matrix, and so on.
        out: [N], written; may be ``residual``.
        norm: NO_NORM, RMS_NORM or LAYER_NORM of x before the product.
        norm_weight, norm_bias: [K].
        bias: [N]; gated: [2N], the gate's first. Like the weights it is read before the predecessor ends: no
            kernel of ours in the same run may write it.
        residual: [N], added last.
        stripe: Divides N; None: N.
        activation: SILU, GELU_ERF, GELU_TANH or NO_ACTIVATION; gated: of the gate.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    size, count = x.numel(), out.numel()
    _check(x, weight, out, norm, norm_weight, norm_bias, bias, residual, gated, stripe, activation)
    gemv_kernel[(triton.cdiv(count, tile.block_n),)](
        x, weight, out, norm_weight, norm_bias, bias, residual, count, size, stripe or count, eps,
        BLOCK_N=tile.block_n, BLOCK_K=min(tile.block_k, next_power_of_2(size)), ROW=next_power_of_2(size),
        NORM=norm, HAS_NORM_BIAS=norm_bias is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, GATED=gated, ACTIVATION=activation,
        **launch_options(x.device, dependent, tile.warps),
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    norm: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
    stripe: int | None,
    activation: int,
) -> None:
    expect = Expect("gemv", x.device)
    size, count = x.numel(), out.numel()
    expect.tensor("x", x, size)
    expect.tensor("out", out, count)
    expect.tensor("weight", weight, (1 + gated) * count, size)
    expect.tensor("norm_weight", norm_weight, size)
    expect.tensor("norm_bias", norm_bias, size)
    expect.tensor("bias", bias, (1 + gated) * count)
    expect.tensor("residual", residual, count)
    expect.that(norm in NORMS and (norm == NO_NORM or norm_weight is not None), f"norm {norm} and no weight for it")
    expect.that(activation in ACTIVATIONS, f"unknown activation {activation}")
    expect.stripe(stripe, count)


__all__ = ["BODY", "TOLERANCES", "GemvTile", "gemv", "reference"]
