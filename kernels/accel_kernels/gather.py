"""Rows of an embedding table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import INDICES, Expect
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.tiles import let_successor_start, wait_for_predecessor

BODY = (
    HEADER
    + """
Gather (table, ids) => (out)
{
    rows = Gather <axis = 0> (table, ids)
    out = Cast <to = 1> (rows)
}
"""
)
# Exact where the output is of the table's type or float32.
TOLERANCES = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0}


def reference(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What ``gather`` reads: float64 [T, K]."""
    return table.double()[ids.long()]


@triton.jit
def gather_kernel(table, ids, out, K, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """out[t] = table[ids[t]]; one program per row."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    token = tl.load(ids + row).to(tl.int64)
    value = tl.load(table + token * K + k, mask=k < K, other=0.0)
    tl.store(out + row.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=k < K)


def gather(table: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, *, dependent: bool | None = None) -> torch.Tensor:
    """Rows of an embedding table. Every tensor on one device, contiguous.

    Args:
        table: [V, K].
        ids: int32 or int64 [T], from 0 to V - 1; nothing checks that on the device.
        out: [T, K], written; of any float type.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    expect = Expect("gather", table.device)
    expect.tensor("table", table, -1, -1)
    expect.tensor("ids", ids, -1, dtypes=INDICES)
    size = table.shape[1]
    expect.tensor("out", out, ids.numel(), size)
    gather_kernel[(ids.numel(),)](
        table, ids, out, size, BLOCK=next_power_of_2(size), **launch_options(table.device, dependent, 4)
    )  # fmt: skip
    return out


__all__ = ["BODY", "TOLERANCES", "gather", "reference"]
