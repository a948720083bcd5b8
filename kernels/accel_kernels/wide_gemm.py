"""Many rows times a weight matrix with bias and activation in the epilogue, which cuBLAS has for tanh-GELU only.

A program stays and computes one tile after another; tiles come through the tensor memory accelerator (SM 90 and
later), so that the next tile's first loads run beside the epilogue of the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from accel_kernels.bodies import HEADER
from accel_kernels.checks import Expect
from accel_kernels.device import fitting_stages, has_tensor_memory_access, multiprocessors
from accel_kernels.plain import product
from accel_kernels.tiles import ACTIVATIONS, NO_ACTIVATION, activate, finish, operand

BODY = (
    HEADER
    + """
WideGemm <gated: int = 0, stripe, activation: int = -1> (x, weight, bias) => (out)
{
    nothing = Constant <value_float = 0.0> ()
    out = accel.kernels.Linear <gated: int = @gated, stripe: int = @stripe, activation: int = @activation>
        (x, weight, bias, nothing)
}
"""
)
# The tensor cores round float32 to TF32, which has float16's precision.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    stripe: int | None = None,
    activation: int = NO_ACTIVATION,
) -> torch.Tensor:
    """What ``wide_gemm`` computes of the same arguments with a tile of 2 * ``stripe`` outputs: float64 [M, N]."""
    return product(x, weight, bias, None, gated, stripe, activation)


@dataclass(frozen=True)
class WideTile:
    """Rows, outputs and terms of a tile, tiles of rows that share their weights in the L2, warps, turns in flight.

    Attributes:
        pieces: The epilogue's, 1 or 2, so that it needs little shared memory.
        resident: Programs that stay on each multiprocessor: the epilogue of one runs beside the products of the other.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3
    pieces: int = 2
    resident: int = 1


@triton.jit
def place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first output of a tile; tiles of GROUP bands of rows follow one another. Some place behind the end
    for a tile that is not there.
    """
    high, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tile // (GROUP * wide)
    rows = tl.maximum(tl.minimum(high - band * GROUP, GROUP), 1)
    within = tile % (GROUP * wide)
    return (band * GROUP + within % rows) * BLOCK_M, within // rows * BLOCK_N


@triton.jit
def _sums(x, weight, m, n, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of x W^T, float32 [BLOCK_M, BLOCK_N]."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        piece = operand(x.load([m, k * BLOCK_K]))
        total = tl.dot(piece, operand(weight.load([n, k * BLOCK_K])).T, total)
    return total


@triton.jit
def _finish(total, bias, n, N, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ROUNDED: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None]
    return finish(total, total, ACTIVATION, False, ROUNDED)


@triton.jit
def wide_gemm_kernel(
    x, weight, out, bias, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ELEMENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[m, n] = act(x[m] . weight[n] + bias[n]); x, weight and out are descriptors."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    ROUNDED: tl.constexpr = tl.float32 != ELEMENT
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        m, n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        total = _sums(x, weight, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        if PIECES == 1:
            whole = _finish(total, bias, n + tl.arange(0, BLOCK_N), N, HAS_BIAS, ACTIVATION, ROUNDED)
            out.store([m, n], whole.to(ELEMENT))
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = total.reshape((BLOCK_M, 2, HALF)).permute((0, 2, 1)).split()
            left = _finish(left, bias, n + tl.arange(0, HALF), N, HAS_BIAS, ACTIVATION, ROUNDED)
            out.store([m, n], left.to(ELEMENT))
            right = _finish(right, bias, n + HALF + tl.arange(0, HALF), N, HAS_BIAS, ACTIVATION, ROUNDED)
            out.store([m, n + HALF], right.to(ELEMENT))


@triton.jit
def gated_gemm_kernel(
    x, weight, out, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, ACTIVATION: tl.constexpr, ELEMENT: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up; the weights' stripes are BLOCK_N / 2 high, so that a tile holds both."""
    HALF: tl.constexpr = BLOCK_N // 2
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(2 * N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        m, n = place(tile, M, 2 * N, BLOCK_M, BLOCK_N, GROUP)
        total = _sums(x, weight, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        gate, up = total.reshape((BLOCK_M, 2, HALF)).permute((0, 2, 1)).split()
        out.store([m, n // 2], (activate(gate, ACTIVATION, tl.float32 != ELEMENT) * up).to(ELEMENT))


def wide_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    activation: int = NO_ACTIVATION,
    tile: WideTile = WideTile(),
    programs: int | None = None,
    flatten: bool = True,
) -> torch.Tensor:
    """act(x W^T + bias). Every tensor on one device, contiguous, each row a multiple of 16 bytes.

    Args:
        x: [M, K] in the weights' type.
        weight: [N, K]; gated: [2N, K] in stripes of ``tile.block_n`` / 2 rows that divide N, and no bias.
        out: [M, N], written.
        bias: [N].
        activation: SILU, GELU_ERF, GELU_TANH or NO_ACTIVATION (not gated); gated: of the gate.
        tile: Has fewer turns in flight where shared memory is short.
        programs: How many stay; None: ``tile.resident`` per multiprocessor.
        flatten: Let the loop over tiles and the loop over terms be one, which hides the epilogue.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; the GPU is older than SM 90.
    """
    _check(x, weight, out, bias, gated, activation, tile)
    (rows, size), count = x.shape, out.shape[1]
    width = tile.block_n // (2 if gated else tile.pieces)
    a = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
    b = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    c = TensorDescriptor.from_tensor(out, [tile.block_m, width])
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(weight.shape[0], tile.block_n)
    programs = min(multiprocessors(x.device) * tile.resident if programs is None else programs, tiles)
    turn = (tile.block_m + tile.block_n) * tile.block_k * x.element_size()
    stages = fitting_stages(x.device, tile.stages, turn, tile.block_m * width * out.element_size())
    common: dict[str, Any] = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": tile.group,
        "PROGRAMS": programs, "ACTIVATION": activation, "ELEMENT": _ELEMENTS[out.dtype], "FLATTEN": flatten,
        "num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip
    if gated:
        gated_gemm_kernel[(programs,)](a, b, c, rows, count, size, **common)
    else:
        pieces, has_bias = tile.pieces, bias is not None
        wide_gemm_kernel[(programs,)](a, b, c, bias, rows, count, size, PIECES=pieces, HAS_BIAS=has_bias, **common)
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    gated: bool,
    activation: int,
    tile: WideTile,
) -> None:
    expect = Expect("wide_gemm", x.device)
    expect.that(has_tensor_memory_access(x.device), "the GPU has no tensor memory accelerator (SM 90 and later do)")
    expect.tensor("x", x, -1, -1)
    (rows, size), count = x.shape[-2:], out.shape[-1]
    expect.tensor("weight", weight, (1 + gated) * count, size, dtypes=(x.dtype,))
    expect.tensor("out", out, rows, count)
    expect.tensor("bias", bias, count)
    expect.that(not (gated and bias is not None), "a gated product has no bias")
    expect.that(activation in ACTIVATIONS, f"unknown activation {activation}")
    expect.that(not gated or activation != NO_ACTIVATION, "a gated product needs an activation")
    expect.that(not gated or count % (tile.block_n // 2) == 0, f"stripes of {tile.block_n // 2} do not divide {count}")
    expect.described(x=x, weight=weight, out=out)


__all__ = ["BODY", "TOLERANCES", "WideTile", "place", "reference", "wide_gemm"]
