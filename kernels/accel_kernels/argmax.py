"""The best token of logits, without reading them back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch
from accel_kernels.tiles import let_successor_start, wait_for_predecessor


@triton.jit
def argmax_kernel(logits, best, counters, out, value, N, SPAN: tl.constexpr, DEPENDENT: tl.constexpr):
    """First index of the largest of N logits. The parts of a row meet in one 64-bit cell: order of the value, index."""
    row = tl.program_id(0)
    n = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    logit = tl.load(logits + row.to(tl.int64) * N + n, mask=n < N, other=float("-inf"))
    bits = logit.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # of integers as of the floats they stand for
    order = tl.where(logit != logit, 0x7FFFFFFF, order)  # NaN is found, not passed over
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - n).to(tl.int64)
    tl.atomic_max(best + row, tl.max(key, 0))
    if tl.atomic_add(counters + row, 1) == tl.num_programs(1) - 1:
        winner = tl.atomic_xchg(best + row, -0x8000000000000000)
        tl.store(counters + row, 0)
        index = 0x7FFFFFFF - (winner & 0x7FFFFFFF)
        tl.store(out + row, index)
        high = (winner >> 32).to(tl.int32)
        tl.store(value + row, tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True))


def argmax_workspace(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Best keys int64 and arrival counters int32 for ``argmax``, which leaves them as it finds them."""
    least = torch.iinfo(torch.int64).min
    return torch.full((rows,), least, device=device), torch.zeros(rows, dtype=torch.int32, device=device)


def argmax(
    logits: torch.Tensor,
    out: torch.Tensor,
    value: torch.Tensor,
    space: tuple[torch.Tensor, torch.Tensor],
    *,
    span: int = 2048,
    warps: int = 4,
    dependent: bool | None = None,
) -> torch.Tensor:
    """logits: float32 [R, V]; out: int64 [R] and value: float32 [R], written; NaN counts as the largest."""
    dependent = has_dependent_launch(logits.device) if dependent is None else dependent
    rows, count = logits.shape
    argmax_kernel[(rows, triton.cdiv(count, span))](
        logits,
        *space,
        out,
        value,
        count,
        SPAN=span,
        DEPENDENT=dependent,
        num_warps=warps,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
