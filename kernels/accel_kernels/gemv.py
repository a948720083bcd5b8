"""One row times a weight matrix, with what stands around it in a transformer: the decode step of one sequence.

A program computes BLOCK_N outputs and streams their weights once. It asks for its first weights before it waits for
the kernel before, so that the memory never idles between two kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import (
    NO_NORM,
    activate,
    let_successor_start,
    normalized,
    row_statistics,
    wait_for_predecessor,
)


@dataclass(frozen=True)
class GemvTile:
    """Outputs per program, weights per output and turn, warps."""

    block_n: int = 4
    block_k: int = 2048
    warps: int = 4


@triton.jit
def gemv_kernel(
    x,
    weight,
    out,
    norm_weight,
    norm_bias,
    bias,
    residual,
    N,
    K,
    STRIPE,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW: tl.constexpr,
    NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[n] = act(norm(x) . weight[n] + bias[n]) (* the same of weight[N + n], gated) + residual[n]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if GATED:
        rows = weight + (n // STRIPE * (2 * STRIPE) + n % STRIPE).to(tl.int64)[:, None] * K
    else:
        rows = weight + n.to(tl.int64)[:, None] * K
    inside = (n < N)[:, None]
    now = tl.load(rows + k[None], mask=inside & (k < K)[None], other=0.0)
    if GATED:
        up = tl.load(rows + STRIPE * K + k[None], mask=inside & (k < K)[None], other=0.0)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    mean = 0.0
    scale = 1.0
    if NORM != 0:
        mean, scale = row_statistics(x, K, eps, NORM, ROW)
    piece = normalized(x, k, k < K, mean, scale, norm_weight, norm_bias, NORM, HAS_NORM_BIAS)
    total = tl.sum(now.to(tl.float32) * piece[None], 1)
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
    activation: int = -1,
    tile: GemvTile = GemvTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """Launches the kernel; every tensor on one device, contiguous.

    Args:
        x: [K].
        weight: [N, K]; gated: [2N, K], ``stripe`` rows of the gate, as many of the other matrix, and so on.
        out: [N], written; may be ``residual``.
        bias: [N]; gated: [2N], the gate's first.
        stripe: Divides N; None: N.
        norm: NO_NORM, RMS_NORM or LAYER_NORM of x before the product.
        activation: SILU, GELU_ERF, GELU_TANH, or -1: none; gated: of the gate.
        dependent: Start before the predecessor ends; None: where the device can.
    """
    size = x.numel()
    count = out.numel()
    dependent = has_dependent_launch(x.device) if dependent is None else dependent
    block_k = min(tile.block_k, next_power_of_2(size))
    gemv_kernel[(triton.cdiv(count, tile.block_n),)](
        x,
        weight,
        out,
        norm_weight,
        norm_bias,
        bias,
        residual,
        count,
        size,
        stripe or count,
        eps,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        ROW=next_power_of_2(size),
        NORM=norm,
        HAS_NORM_BIAS=norm_bias is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        ACTIVATION=activation,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
