"""Some rows times a weight matrix with bias and activation in the epilogue: encoders of a few hundred tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch
from accel_kernels.tiles import activate, let_successor_start, wait_for_predecessor


@dataclass(frozen=True)
class BlockTile:
    """Rows, outputs and terms of a tile, warps, turns in flight."""

    block_m: int = 64
    block_n: int = 64
    block_k: int = 128
    warps: int = 4
    stages: int = 4


@triton.jit
def block_gemm_kernel(
    x,
    weight,
    out,
    bias,
    residual,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[m, n] = act(x[m] . weight[n] + bias[n]) + residual[m, n]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    lines = x + (m % M).to(tl.int64)[:, None] * K + k[None]
    columns = weight + (n % N).to(tl.int64)[None] * K + k[:, None]
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, K, BLOCK_K):
        inside = at + k < K
        tile = tl.load(lines + at, mask=inside[None], other=0.0)
        total = tl.dot(tile, tl.load(columns + at, mask=inside[:, None], other=0.0), total)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None]
    if ACTIVATION >= 0:
        total = activate(total, ACTIVATION)
    cells = m.to(tl.int64)[:, None] * N + n[None]
    mask = (m < M)[:, None] & (n < N)[None]
    if HAS_RESIDUAL:
        total += tl.load(residual + cells, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + cells, total.to(out.dtype.element_ty), mask=mask)


def block_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = -1,
    tile: BlockTile = BlockTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """x: [M, K]; weight: [N, K]; out, residual: [M, N]."""
    rows, size = x.shape
    count = out.shape[1]
    dependent = has_dependent_launch(x.device) if dependent is None else dependent
    block_gemm_kernel[(triton.cdiv(rows, tile.block_m), triton.cdiv(count, tile.block_n))](
        x,
        weight,
        out,
        bias,
        residual,
        rows,
        count,
        size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
