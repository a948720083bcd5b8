"""The step behind a decode step: its tokens are the best ones of this one, one position on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import let_successor_start, wait_for_predecessor


@triton.jit
def advance_kernel(best, ids, positions, lengths, told, turn, rows, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """ids = best; positions and lengths + 1 where they are not negative; told[turn] = best, and turn the other one."""
    row = tl.arange(0, BLOCK)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    real = row < rows
    token = tl.load(best + row, mask=real)
    tl.store(ids + row, token, mask=real)
    now = tl.load(turn)
    place = told + now * 2 * rows + row
    tl.store(place, token, mask=real)
    tl.store(place + rows, tl.load(best + rows + row, mask=real), mask=real)
    tl.store(turn, 1 - now)
    position = tl.load(positions + row, mask=real, other=0)
    length = tl.load(lengths + row, mask=real, other=0)
    tl.store(positions + row, position + (length >= 0).to(tl.int64), mask=real)
    tl.store(lengths + row, length + (length >= 0).to(tl.int32), mask=real)


def advance(
    best: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    told: torch.Tensor,
    turn: torch.Tensor,
    *,
    dependent: bool | None = None,
) -> None:
    """Makes the step behind this one of it, and tells the host. All but ``best`` are written.

    Args:
        best: int64 [2B]: each row's token, then whatever the host is told besides.
        ids, positions: int64 [B].
        lengths: int32 [B]; negative: the row sits out.
        told: int64 [2, 2B], perhaps page-locked memory of the host: there ``best`` goes, to one place and the other.
        turn: int32 [1], to which place.
        dependent: Start before the predecessor ends; None: where the device can.
    """
    dependent = has_dependent_launch(best.device) if dependent is None else dependent
    advance_kernel[(1,)](
        best,
        ids,
        positions,
        lengths,
        told,
        turn,
        ids.numel(),
        BLOCK=next_power_of_2(ids.numel()),
        DEPENDENT=dependent,
        **({"launch_pdl": True} if dependent else {}),
    )


__all__ = ["advance"]
