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
Gather (table, ids, added) => (out)
{
    low = Gather <axis = 0> (table, ids)
    rows = Cast <to = 1> (low)
    shape = Shape (rows)
    last = Constant <value_ints = [-1]> ()
    by_turn = Concat <axis = 0> (last, shape)
    turns = Reshape (added, by_turn)
    sums = Add (turns, rows)
    width = Shape <start = 1> (rows)
    flat = Concat <axis = 0> (last, width)
    out = Reshape (sums, flat)
}
"""
)
# Exact where the output is of the table's type or float32.
TOLERANCES = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0}


def reference(table: torch.Tensor, ids: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """What ``gather`` reads, and adds: float64 [T, K]."""
    rows = table.double()[ids.long()]
    if added is None:
        return rows
    return (added.double().reshape(-1, *rows.shape) + rows).reshape(-1, rows.shape[1])


@triton.jit
def gather_kernel(
    table, ids, added, out, K, PERIOD, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr, DEPENDENT: tl.constexpr
):
    """out[t] = table[ids[t % PERIOD]] + added[t]; one program per row."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    token = tl.load(ids + row % PERIOD).to(tl.int64)
    value = tl.load(table + token * K + k, mask=k < K, other=0.0)
    if HAS_ADDED:
        value = value.to(tl.float32) + tl.load(added + row.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=k < K)


def gather(
    table: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
    *,
    added: torch.Tensor | None = None,
    dependent: bool | None = None,
) -> torch.Tensor:
    """Rows of an embedding table, perhaps added to others. Every tensor on one device, contiguous.

    Args:
        table: [V, K].
        ids: int32 or int64 [T], from 0 to V - 1; nothing checks that on the device.
        out: [T, K], written; of any float type; may be ``added``.
        added: [T, K]; T may be a multiple of the ids then, which are used over and over.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    expect = Expect("gather", table.device)
    expect.tensor("table", table, -1, -1)
    expect.tensor("ids", ids, -1, dtypes=INDICES)
    size = table.shape[1]
    expect.tensor("out", out, ids.numel() if added is None else -1, size)
    expect.tensor("added", added, len(out), size)
    expect.that(len(out) % max(1, ids.numel()) == 0, f"{len(out)} rows are no multiple of {ids.numel()} ids")
    gather_kernel[(len(out),)](
        table, ids, added, out, size, ids.numel(), BLOCK=next_power_of_2(size), HAS_ADDED=added is not None,
        **launch_options(table.device, dependent, 4),
    )  # fmt: skip
    return out


__all__ = ["BODY", "TOLERANCES", "gather", "reference"]
