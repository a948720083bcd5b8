"""RMS norm and layer norm of rows, a residual added first if there is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import RMS_NORM, let_successor_start, wait_for_predecessor


@triton.jit
def norm_kernel(
    x,
    residual,
    stream,
    out,
    weight,
    bias,
    K,
    eps,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """stream = x + residual, which may come in parts; out = norm(stream); one program per row."""
    line = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    inside = k < K
    factor = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    row = tl.load(x + line + k, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            place = residual + part * tl.num_programs(0).to(tl.int64) * K + line + k
            row += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if HAS_STREAM:
            tl.store(stream + line + k, row.to(stream.dtype.element_ty), mask=inside)
    if NORM == 2:
        row = tl.where(inside, row - tl.sum(row, 0) / K, 0.0)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / K + eps) * factor
    if HAS_BIAS:
        row += shift
    tl.store(out + line + k, row.to(out.dtype.element_ty), mask=inside)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
    kind: int = RMS_NORM,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stream: torch.Tensor | None = None,
    warps: int = 4,
    dependent: bool | None = None,
) -> torch.Tensor:
    """out = norm(x + residual), the sum also into ``stream`` if it is given.

    Args:
        x, stream, out: [T, K]; stream may be x.
        weight, bias: [K].
        residual: [T, K], or [P, T, K]: parts to be added up.
    """
    rows, size = x.shape
    dependent = has_dependent_launch(x.device) if dependent is None else dependent
    norm_kernel[(rows,)](
        x,
        residual,
        stream,
        out,
        weight,
        bias,
        size,
        eps,
        BLOCK=next_power_of_2(size),
        NORM=kind,
        PARTS=0 if residual is None else residual.numel() // x.numel(),
        HAS_STREAM=stream is not None,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=warps,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
