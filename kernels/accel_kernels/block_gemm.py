"""Some rows times a weight matrix with bias and activation in the epilogue: encoders of a few hundred tokens.

Where tiles are too few to fill the GPU, several programs share the sums of the same tile; the next kernel adds the
parts up as it reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from accel_kernels.bodies import HEADER
from accel_kernels.checks import Expect
from accel_kernels.device import fitting_stages, has_tensor_memory_access, launch_options
from accel_kernels.plain import product
from accel_kernels.tiles import (
    ACTIVATIONS,
    NO_ACTIVATION,
    finish,
    let_successor_start,
    load_or_zeros,
    operand,
    wait_for_predecessor,
)

BODY = (
    HEADER
    + """
BlockGemm <stripe, activation: int = -1> (x, weight, bias, residual) => (out)
{
    out = accel.kernels.Linear <stripe: int = @stripe, activation: int = @activation> (x, weight, bias, residual)
}
"""
)
# The tensor cores round float32 to TF32, which has float16's precision.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = NO_ACTIVATION,
) -> torch.Tensor:
    """What ``block_gemm`` computes of the same arguments, its parts added up: float64 [M, N]."""
    return product(x, weight, bias, residual, False, None, activation)


@dataclass(frozen=True)
class BlockTile:
    """Rows, outputs and terms of a tile, warps, turns in flight, programs per sum.

    Attributes:
        tail: Outputs beside the ``block_n``: with 64 and 32 of them 3,072 outputs are 32 tiles, with which a thousand
            rows fill 128 multiprocessors twice.
        described: Whether operands come through the tensor memory accelerator (SM 90 and later), which takes the
            places of a turn off the programs; rows of x and weights are multiples of 16 bytes then.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 128
    warps: int = 4
    stages: int = 4
    splits: int = 1
    tail: int = 0
    described: bool = False

    @property
    def outputs(self) -> int:
        """Of the tile."""
        return self.block_n + self.tail

    def fitting(self, x: torch.Tensor) -> BlockTile:
        """The tile, with fewer turns in flight (and shorter ones) where shared memory has no room for them.

        Args:
            x: [M, K], the rows.
        """
        turn = (self.block_m + self.outputs) * self.block_k * x.element_size()
        stages = fitting_stages(x.device, self.stages, turn, 0)
        if stages < 2 <= self.stages and self.block_k > 32:
            return replace(self, block_k=self.block_k // 2).fitting(x)
        return replace(self, stages=stages)


@triton.jit
def _columns(weight, n, N, K, k):
    """Where the turns of outputs n start, [K, N]. Those behind the end wrap around, as rows do."""
    return weight + (n % N).to(tl.int64)[None] * K + k[:, None]


@triton.jit
def _rows(x, m, M, K, k):
    """Where the turns of rows m start, [M, K]. Loads of rows behind the end need no mask: they are not stored."""
    return x + (m % M).to(tl.int64)[:, None] * K + k[None]


@triton.jit
def _store(
    total, out, bias_line, residual, m, n, split, M, N, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    bias_line = bias_line.to(tl.float32)
    if SPLITS > 1:  # the first part has it
        bias_line *= (split == 0).to(tl.float32)
    total += bias_line[None]
    total = finish(total, total, ACTIVATION, False, out.dtype.element_ty != tl.float32)
    cells = (split * M + m).to(tl.int64)[:, None] * N + n[None]
    mask = (m < M)[:, None] & (n < N)[None]
    if HAS_RESIDUAL:
        total += tl.load(residual + cells, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + cells, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def block_gemm_kernel(
    x, weight, far_weight, out, bias, residual, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, DESCRIBED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = act(x[m] . weight[n] + bias[n]) + residual[m, n]. DESCRIBED: x and the weights are descriptors."""
    top = tl.program_id(0) * BLOCK_M
    left = tl.program_id(1) * (BLOCK_N + TAIL)
    m, n = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    bias_line = load_or_zeros(bias, n, N, HAS_BIAS)  # ahead: memory takes as long as many products do
    if not DESCRIBED:
        lines = _rows(x, m, M, K, k)
        columns = _columns(weight, n, N, K, k)
    if TAIL:
        far = left + BLOCK_N + tl.arange(0, TAIL)
        far_total = tl.zeros((BLOCK_M, TAIL), tl.float32)
        far_bias_line = load_or_zeros(bias, far, N, HAS_BIAS)
        if not DESCRIBED:
            far_columns = _columns(far_weight, far, N, K, k)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    split = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    for at in range(split * span, tl.minimum(split * span + span, K), BLOCK_K):
        if DESCRIBED:  # zeros behind the ends
            tile = operand(x.load([top, at]))
            total = tl.dot(tile, operand(weight.load([left, at])).T, total)
            if TAIL:
                far_total = tl.dot(tile, operand(far_weight.load([left + BLOCK_N, at])).T, far_total)
        else:
            inside = at + k < K
            tile = operand(tl.load(lines + at, mask=inside[None], other=0.0))
            total = tl.dot(tile, operand(tl.load(columns + at, mask=inside[:, None], other=0.0)), total)
            if TAIL:
                far_tile = operand(tl.load(far_columns + at, mask=inside[:, None], other=0.0))
                far_total = tl.dot(tile, far_tile, far_total)
    _store(total, out, bias_line, residual, m, n, split, M, N, HAS_RESIDUAL, ACTIVATION, SPLITS)
    if TAIL:
        _store(far_total, out, far_bias_line, residual, m, far, split, M, N, HAS_RESIDUAL, ACTIVATION, SPLITS)


def block_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = NO_ACTIVATION,
    tile: BlockTile = BlockTile(),
    dependent: bool | None = None,
) -> torch.Tensor:
    """act(x W^T + bias) + residual. Every tensor on one device, contiguous.

    Args:
        x: [M, K] in the weights' type.
        weight: [N, K].
        out: [M, N], written; with ``tile.splits`` > 1 float32 [splits, M, N], parts that the reader adds up: there is
            no place for a residual or an activation then.
        bias: [N]; it is read before the predecessor ends: no kernel of ours in the same run may write it.
        residual: [M, N], added last; may be ``out``.
        activation: SILU, GELU_ERF, GELU_TANH or NO_ACTIVATION.
        tile: Shrinks where shared memory is short.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; an activation or a residual of parts.
    """
    expect = Expect("block_gemm", x.device)
    expect.tensor("x", x, -1, -1)
    (rows, size), count = x.shape[-2:], out.shape[-1]
    expect.tensor("weight", weight, count, size, dtypes=(x.dtype,))
    if tile.splits == 1:
        expect.tensor("out", out, rows, count)
    else:
        expect.tensor("out", out, tile.splits, rows, count, dtypes=(torch.float32,))
        expect.that(residual is None and activation == NO_ACTIVATION, "sums in parts have no residual or activation")
    expect.tensor("bias", bias, count)
    expect.tensor("residual", residual, rows, count)
    expect.that(activation in ACTIVATIONS, f"unknown activation {activation}")
    if tile.described:
        expect.that(has_tensor_memory_access(x.device), "the GPU has no tensor memory accelerator (SM 90 and later do)")
        expect.described(x=x, weight=weight)
    tile = tile.fitting(x)
    block_gemm_kernel[(triton.cdiv(rows, tile.block_m), triton.cdiv(count, tile.outputs), tile.splits)](
        *_operands(x, weight, tile), out, bias, residual, rows, count, size,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TAIL=tile.tail, BLOCK_K=tile.block_k, SPLITS=tile.splits,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
        DESCRIBED=tile.described, **launch_options(x.device, dependent, tile.warps, tile.stages),
    )  # fmt: skip
    return out


def _operands(x: torch.Tensor, weight: torch.Tensor, tile: BlockTile) -> tuple[Any, Any, Any]:
    """x, the weights, and the weights as the tail reads them."""
    if not tile.described:
        return x, weight, weight
    heights = (tile.block_m, tile.block_n, tile.tail or tile.block_n)
    tensors = (x, weight, weight)
    a, b, c = (TensorDescriptor.from_tensor(*pair) for pair in zip(tensors, ([h, tile.block_k] for h in heights)))
    return a, b, c


__all__ = ["BODY", "TOLERANCES", "BlockTile", "block_gemm", "reference"]
