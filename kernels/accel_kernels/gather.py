"""Rows of an embedding table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch, next_power_of_2
from accel_kernels.tiles import let_successor_start, wait_for_predecessor


@triton.jit
def gather_kernel(table, ids, out, K, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    token = tl.load(ids + row).to(tl.int64)
    value = tl.load(table + token * K + k, mask=k < K, other=0.0)
    tl.store(out + row.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=k < K)


def gather(table: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, *, dependent: bool | None = None) -> torch.Tensor:
    """Rows of an embedding table. table: [V, K]; ids: [T]; out: [T, K], written."""
    dependent = has_dependent_launch(table.device) if dependent is None else dependent
    gather_kernel[(ids.numel(),)](
        table,
        ids,
        out,
        table.shape[1],
        BLOCK=next_power_of_2(table.shape[1]),
        DEPENDENT=dependent,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
