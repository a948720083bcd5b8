"""Rows of an embedding table, or the sums of rows of up to three: words, positions, segments; perhaps normalized."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import INDICES, Expect
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.plain import normed
from accel_kernels.tiles import NO_NORM, NORMS, let_successor_start, normalize_row, wait_for_predecessor

Lookup = tuple[torch.Tensor, torch.Tensor]  # a table and its ids

BODY = (
    HEADER
    + """
Gather <norm: int = 0, eps: float = 0.0>
    (table, ids, added, second, second_ids, third, third_ids, norm_weight, norm_bias) => (out)
{
    one = accel.kernels.AddRows (added, table, ids)
    two = accel.kernels.AddRows (one, second, second_ids)
    sums = accel.kernels.AddRows (two, third, third_ids)
    out = accel.kernels.Normalize <norm: int = @norm, eps: float = @eps> (sums, norm_weight, norm_bias)
}
"""
)
# Of norms; rows of one table are exact where the output is of its type or float32.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(
    table: torch.Tensor,
    ids: torch.Tensor,
    added: torch.Tensor | None = None,
    second: Lookup | None = None,
    third: Lookup | None = None,
    *,
    norm: int = NO_NORM,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """What ``gather`` reads, adds and normalizes: float64 [T, K]."""
    rows = table.double()[ids.long()]
    if added is not None:
        rows = (added.double().reshape(-1, *rows.shape) + rows).reshape(-1, rows.shape[1])
    for also in (second, third):
        if also is not None:
            more = also[0].double()[also[1].long()]
            rows = (rows.reshape(-1, *more.shape) + more).reshape(-1, rows.shape[1])
    return normed(rows, norm, norm_weight, norm_bias, eps)


@triton.jit
def gather_kernel(
    table, ids, added, second, second_ids, third, third_ids, norm_weight, norm_bias, out, K, eps, PERIOD,
    SECOND_PERIOD, THIRD_PERIOD, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_SECOND: tl.constexpr,
    HAS_THIRD: tl.constexpr, NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[t] = norm(table[ids[t % PERIOD]] + added[t] + ...); one program per row."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < K
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    token = tl.load(ids + row % PERIOD).to(tl.int64)
    value = tl.load(table + token * K + k, mask=inside, other=0.0)
    if HAS_ADDED:
        value = value.to(tl.float32) + tl.load(added + row.to(tl.int64) * K + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_SECOND:
        token = tl.load(second_ids + row % SECOND_PERIOD).to(tl.int64)
        value = value.to(tl.float32) + tl.load(second + token * K + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_THIRD:
        token = tl.load(third_ids + row % THIRD_PERIOD).to(tl.int64)
        value = value.to(tl.float32) + tl.load(third + token * K + k, mask=inside, other=0.0).to(tl.float32)
    if NORM != 0:
        value = normalize_row(value.to(tl.float32), inside, K, eps, NORM)
        value *= tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM_BIAS:
            value += tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=inside)


def gather(
    table: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
    *,
    added: torch.Tensor | None = None,
    second: Lookup | None = None,
    third: Lookup | None = None,
    norm: int = NO_NORM,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
    dependent: bool | None = None,
) -> torch.Tensor:
    """Rows of an embedding table, perhaps added to others and normalized. Every tensor on one device, contiguous.

    Args:
        table: [V, K].
        ids: int32 or int64 [T], from 0 to V - 1; nothing checks that on the device.
        out: [T, K], written; of any float type; may be ``added``.
        added: [T, K]; T may be a multiple of the ids then, which are used over and over.
        second, third: More tables [*, K] with their ids, whose number divides T: these rows are added too.
        norm: NO_NORM, RMS_NORM or LAYER_NORM, of the sums.
        norm_weight, norm_bias: [K], of the norm; it needs the weight.
        eps: Added to the mean square that the norm divides by; of a layer norm, to the variance.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    expect = Expect("gather", table.device)
    expect.tensor("table", table, -1, -1)
    size, sums = table.shape[1], added is not None or second is not None or third is not None
    expect.tensor("ids", ids, -1, dtypes=INDICES)
    expect.tensor("out", out, -1 if sums else ids.numel(), size)
    expect.tensor("added", added, len(out), size)
    lookups = [(table, ids), second or (None, None), third or (None, None)]
    for name, (rows, places) in zip(("table", "second", "third"), lookups, strict=True):
        expect.tensor(name, rows, -1, size)
        expect.tensor(f"{name} ids", places, -1, dtypes=INDICES)
        count = 1 if places is None else places.numel()
        whole = len(out) % count == 0 if count else len(out) == 0
        expect.that(whole, f"{len(out)} rows are no multiple of {count} ids")
    expect.tensor("norm_weight", norm_weight, size)
    expect.tensor("norm_bias", norm_bias, size)
    expect.that(norm in NORMS and (norm != NO_NORM) == (norm_weight is not None), f"norm {norm} and its weight differ")
    expect.that(norm != NO_NORM or norm_bias is None, "there is no norm for norm_bias")
    operands = [tensor for pair in lookups[1:] for tensor in pair]
    periods = [1 if places is None else places.numel() for _, places in lookups]
    gather_kernel[(len(out),)](
        table, ids, added, *operands, norm_weight, norm_bias, out, size, eps, *periods, BLOCK=next_power_of_2(size),
        HAS_ADDED=added is not None, HAS_SECOND=second is not None, HAS_THIRD=third is not None, NORM=norm,
        HAS_NORM_BIAS=norm_bias is not None, **launch_options(table.device, dependent, 4),
    )  # fmt: skip
    return out


__all__ = ["BODY", "TOLERANCES", "gather", "reference"]
