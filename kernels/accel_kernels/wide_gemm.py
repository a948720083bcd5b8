"""Many rows times a weight matrix with bias and activation in the epilogue, which cuBLAS has for tanh-GELU only.

A program stays and computes one tile after another; tiles come through the tensor memory accelerator (SM 90 and
later), so that the next tile's first loads run beside the epilogue of the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from accel_kernels.tiles import activate


@dataclass(frozen=True)
class WideTile:
    """Rows, outputs and terms of a tile, tiles of rows that share their weights in the L2, warps, turns in flight."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3
    pieces: int = 2  # the epilogue's, so that it needs little shared memory


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first output of a tile; tiles of GROUP bands of rows follow one another."""
    high, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tile // (GROUP * wide)
    rows = tl.minimum(high - band * GROUP, GROUP)
    within = tile % (GROUP * wide)
    return (band * GROUP + within % rows) * BLOCK_M, within // rows * BLOCK_N


@triton.jit
def _finish(total, bias, n, N, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None]
    if ACTIVATION >= 0:
        total = activate(total, ACTIVATION)
    return total


@triton.jit
def wide_gemm_kernel(
    x,
    weight,
    out,
    bias,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ELEMENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out[m, n] = act(x[m] . weight[n] + bias[n])."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        m, n = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            total = tl.dot(x.load([m, k * BLOCK_K]), weight.load([n, k * BLOCK_K]).T, total)
        if PIECES == 1:
            whole = _finish(total, bias, n + tl.arange(0, BLOCK_N), N, HAS_BIAS, ACTIVATION)
            out.store([m, n], whole.to(ELEMENT))
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = total.reshape((BLOCK_M, 2, HALF)).permute((0, 2, 1)).split()
            left = _finish(left, bias, n + tl.arange(0, HALF), N, HAS_BIAS, ACTIVATION)
            out.store([m, n], left.to(ELEMENT))
            right = _finish(right, bias, n + HALF + tl.arange(0, HALF), N, HAS_BIAS, ACTIVATION)
            out.store([m, n + HALF], right.to(ELEMENT))


@triton.jit
def gated_gemm_kernel(
    x,
    weight,
    out,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ELEMENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out = act(gate) * up; the weights' stripes are BLOCK_N / 2 high, so that a tile holds both."""
    HALF: tl.constexpr = BLOCK_N // 2
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(2 * N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        m, n = _place(tile, M, 2 * N, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            total = tl.dot(x.load([m, k * BLOCK_K]), weight.load([n, k * BLOCK_K]).T, total)
        gate, up = total.reshape((BLOCK_M, 2, HALF)).permute((0, 2, 1)).split()
        out.store([m, n // 2], (activate(gate, ACTIVATION) * up).to(ELEMENT))


ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def wide_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    activation: int = -1,
    tile: WideTile = WideTile(),
    programs: int | None = None,
    flatten: bool = True,
) -> torch.Tensor:
    """Launches the kernel.

    Args:
        x: [M, K].
        weight: [N, K]; gated: [2N, K] in stripes of ``tile.block_n`` / 2 rows, and no bias.
        out: [M, N], written.
        programs: How many stay; None: one per multiprocessor.
    """
    rows, size = x.shape
    count = out.shape[1]
    assert not (gated and bias is not None)
    if programs is None:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    width = tile.block_n // (2 if gated else tile.pieces)
    a = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
    b = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    c = TensorDescriptor.from_tensor(out, [tile.block_m, width])
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(weight.shape[0], tile.block_n)
    programs = min(programs, tiles)
    common = dict(
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP=tile.group,
        PROGRAMS=programs,
        ACTIVATION=activation,
        ELEMENT=ELEMENTS[out.dtype],
        FLATTEN=flatten,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if gated:
        gated_gemm_kernel[(programs,)](a, b, c, rows, count, size, **common)
    else:
        wide_gemm_kernel[(programs,)](
            a, b, c, bias, rows, count, size, PIECES=tile.pieces, HAS_BIAS=bias is not None, **common
        )
    return out
