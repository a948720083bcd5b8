"""The step behind a decode step: its tokens are the best ones of this one, one position on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import let_successor_start, wait_for_predecessor


@triton.jit
def advance_kernel(best, ids, positions, lengths, rows, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """ids = best; positions and lengths + 1 where they are not negative."""
    row = tl.arange(0, BLOCK)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    real = row < rows
    tl.store(ids + row, tl.load(best + row, mask=real), mask=real)
    position = tl.load(positions + row, mask=real, other=0)
    length = tl.load(lengths + row, mask=real, other=0)
    tl.store(positions + row, position + (length >= 0).to(tl.int64), mask=real)
    tl.store(lengths + row, length + (length >= 0).to(tl.int32), mask=real)


def advance(
    best: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    *,
    dependent: bool | None = None,
) -> None:
    """best, ids, positions: int64 [B]; lengths: int32 [B], negative: the row sits out. All but best are written."""
    dependent = has_dependent_launch(best.device) if dependent is None else dependent
    advance_kernel[(1,)](
        best,
        ids,
        positions,
        lengths,
        ids.numel(),
        BLOCK=next_power_of_2(ids.numel()),
        DEPENDENT=dependent,
        **({"launch_pdl": True} if dependent else {}),
    )


__all__ = ["advance"]
