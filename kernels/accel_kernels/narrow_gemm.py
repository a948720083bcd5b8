"""A few rows times a weight matrix: the decode step of several sequences.

The weights are the tensor cores' tall operand and the rows their narrow one, so that even two rows run on them at the
speed of the memory. Where the outputs are too few to fill the GPU, several programs share the sums of the same
outputs; the next kernel adds the parts up in a fixed order as it reads them, which costs it next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import activate, let_successor_start, wait_for_predecessor


@dataclass(frozen=True)
class NarrowTile:
    """Outputs per program, terms per turn, programs per sum, warps, turns in flight."""

    block_n: int = 64
    block_k: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4


@triton.jit
def _finish(
    total,
    up,
    bias,
    residual,
    out,
    n,
    m,
    M,
    N,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION >= 0:
        total = activate(total, ACTIVATION)
    if GATED:
        total = total * up
    cells = m.to(tl.int64)[None] * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)[None]
    if HAS_RESIDUAL:
        total += tl.load(residual + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cells, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def narrow_gemm_kernel(
    x,
    weight,
    out,
    bias,
    residual,
    M,
    N,
    K,
    STRIPE,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[m, n] = act(x[m] . weight[n] + bias[n]) (* the same of weight[N + n], gated) + residual[m, n]."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    if GATED:
        rows = weight + (n // STRIPE * (2 * STRIPE) + n % STRIPE).to(tl.int64)[:, None] * K
    else:
        rows = weight + n.to(tl.int64)[:, None] * K
    lines = x + m.to(tl.int64)[None] * K
    real = (n < N)[:, None]
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    start = split * span
    stop = tl.minimum(start + span, K)
    now = start + k
    first = tl.load(rows + now[None], mask=real & (now < stop)[None], other=0.0)
    if GATED:
        first_up = tl.load(rows + STRIPE * K + now[None], mask=real & (now < stop)[None], other=0.0)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    tile = tl.load(lines + now[:, None], mask=(now < stop)[:, None] & (m < M)[None], other=0.0)
    total = tl.dot(first, tile)
    up = total
    if GATED:
        up = tl.dot(first_up, tile)
    for at in range(start + BLOCK_K, stop, BLOCK_K):
        now = at + k
        tile = tl.load(lines + now[:, None], mask=(now < stop)[:, None] & (m < M)[None], other=0.0)
        total = tl.dot(tl.load(rows + now[None], mask=real & (now < stop)[None], other=0.0), tile, total)
        if GATED:
            other = tl.load(rows + STRIPE * K + now[None], mask=real & (now < stop)[None], other=0.0)
            up = tl.dot(other, tile, up)
    if SPLITS == 1:
        _finish(total, up, bias, residual, out, n, m, M, N, GATED, ACTIVATION, HAS_BIAS, HAS_RESIDUAL)
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
    activation: int = -1,
    tile: NarrowTile = NarrowTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """Launches the kernel.

    Args:
        x: [M, K] in the weights' type.
        weight: [N, K]; gated: [2N, K] in stripes, as ``gemv`` takes it.
        out: [M, N], written; with ``tile.splits`` > 1 float32 [splits, M, N], parts that the reader adds up: there
            is no place for a bias, a residual or an activation then.
    """
    rows, size = x.shape
    count = out.shape[-1]
    assert tile.splits == 1 or (bias is None and residual is None and not gated and activation < 0)
    dependent = has_dependent_launch(x.device) if dependent is None else dependent
    narrow_gemm_kernel[(triton.cdiv(count, tile.block_n), tile.splits)](
        x,
        weight,
        out,
        bias,
        residual,
        rows,
        count,
        size,
        stripe or count,
        ROWS=max(16, next_power_of_2(rows)),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLITS=tile.splits,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        ACTIVATION=activation,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
