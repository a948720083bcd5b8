"""Rows of an embedding table, or the sums of rows of up to three: words, positions, segments; perhaps normalized."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import INDICES, Expect
from accel_kernels.device import launch_options
from accel_kernels.plain import normed
from accel_kernels.row_pieces import (
    add_pieces,
    load_pieces,
    multiply_pieces,
    normalize_pieces,
    row_options,
    store_pieces,
)
from accel_kernels.tiles import NO_NORM, NORMS, let_successor_start, wait_for_predecessor

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
def _lines(ids, row, T, PERIOD, K: tl.constexpr):
    """Where rows ids[row % PERIOD] of a table start, [ROWS, 1]."""
    return tl.load(ids + row % PERIOD, mask=row < T, other=0).to(tl.int64)[:, None] * K


@triton.jit(do_not_specialize=["T"])  # which asks only where rows end: one kernel for all
def gather_kernel(
    table, ids, added, second, second_ids, third, third_ids, norm_weight, norm_bias, out, T, eps, PERIOD,
    SECOND_PERIOD, THIRD_PERIOD, K: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, HAS_ADDED: tl.constexpr,
    HAS_SECOND: tl.constexpr, HAS_THIRD: tl.constexpr, NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[t] = norm(table[ids[t % PERIOD]] + added[t] + ...); ROWS of T rows of K per program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, line, same = (row < T)[:, None], row.to(tl.int64)[:, None] * K, tl.zeros((ROWS, 1), tl.int32)
    if NORM != 0:
        factors = load_pieces(norm_weight, same, there, K, PIECE)
        if HAS_NORM_BIAS:
            shifts = load_pieces(norm_bias, same, there, K, PIECE)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    lines = _lines(ids, row, T, PERIOD, K)  # all ids are asked for before the first row
    if HAS_SECOND:
        second_lines = _lines(second_ids, row, T, SECOND_PERIOD, K)
    if HAS_THIRD:
        third_lines = _lines(third_ids, row, T, THIRD_PERIOD, K)
    rows = load_pieces(table, lines, there, K, PIECE)
    if HAS_ADDED:
        rows = add_pieces(rows, load_pieces(added, line, there, K, PIECE))
    if HAS_SECOND:
        rows = add_pieces(rows, load_pieces(second, second_lines, there, K, PIECE))
    if HAS_THIRD:
        rows = add_pieces(rows, load_pieces(third, third_lines, there, K, PIECE))
    if NORM != 0:
        rows = multiply_pieces(normalize_pieces(rows, K, PIECE, eps, NORM), factors)
        if HAS_NORM_BIAS:
            rows = add_pieces(rows, shifts)
    store_pieces(out, line, there, rows, K, PIECE)


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
    together: bool | None = None,
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
        norm_weight, norm_bias: [K], of the norm; it needs the weight. Read before the predecessor ends: no kernel of
            ours in the same run may write them.
        eps: Added to the mean square that the norm divides by; of a layer norm, to the variance.
        together: Whether several rows share a program, see ``row_pieces``; None: where that is faster.
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
    options = row_options(len(out), size, together)
    gather_kernel[(triton.cdiv(len(out), options["ROWS"]),)](
        table, ids, added, *operands, norm_weight, norm_bias, out, len(out), eps, *periods,
        K=size, HAS_ADDED=added is not None, HAS_SECOND=second is not None, HAS_THIRD=third is not None, NORM=norm,
        HAS_NORM_BIAS=norm_bias is not None, **options, **launch_options(table.device, dependent, 4),
    )  # fmt: skip
    return out


__all__ = ["BODY", "TOLERANCES", "gather", "reference"]
