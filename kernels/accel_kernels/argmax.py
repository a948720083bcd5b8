"""The best token of logits, without reading them back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import INDICES, Expect
from accel_kernels.device import launch_options
from accel_kernels.tiles import let_successor_start, wait_for_predecessor

# The lines that find a row's best token; ``sample`` begins with them too.
BEST = """
    last = Constant <value_ints = [-1]> ()
    below_all = Constant <value_float = -inf> ()
    is_nan = IsNaN (logits)
    nans = Cast <to = 1> (is_nan)
    first_nan = ArgMax <axis = -1, keepdims = 1> (nans)
    numbers = Where (is_nan, below_all, logits)
    best_number = ArgMax <axis = -1, keepdims = 1> (numbers)
    most = ReduceMax (nans, last)
    has_nan = Cast <to = 9> (most)
    best = Where (has_nan, first_nan, best_number)
    found = GatherElements <axis = -1> (logits, best)
"""
BODY = (
    HEADER
    + """
Argmax (logits) => (ids, values)
{
"""
    + BEST
    + """
    ids = Squeeze (best, last)
    values = Squeeze (found, last)
}
"""
)
TOLERANCES = {torch.float32: 0.0}  # it chooses, it does not compute


def reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``argmax`` finds: ids int64 [R] and values float32 [R]."""
    nan = logits.isnan()
    best = logits.masked_fill(nan, float("-inf")).argmax(1)
    ids = torch.where(nan.any(1), nan.int().argmax(1), best)
    return ids, logits.gather(1, ids[:, None])[:, 0]


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
    """The first index of each row's largest logit; NaN counts as the largest, and -0.0 as less than 0.0.

    Args:
        logits: float32 [R, V].
        out: int64 [R], written.
        value: float32 [R], written: that logit.
        space: From ``argmax_workspace`` with at least R rows.
        span: Logits per program.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    expect = Expect("argmax", logits.device)
    expect.tensor("logits", logits, -1, -1, dtypes=(torch.float32,))
    rows, count = logits.shape
    expect.that(count > 0, "there are no logits")
    expect.tensor("out", out, rows, dtypes=INDICES)
    expect.tensor("value", value, rows, dtypes=(torch.float32,))
    best, counters = space
    expect.tensor("best keys", best, -1, dtypes=(torch.int64,))
    expect.tensor("counters", counters, -1, dtypes=(torch.int32,))
    expect.that(min(best.numel(), counters.numel()) >= rows, f"the workspace is for fewer than {rows} rows")
    argmax_kernel[(rows, triton.cdiv(count, span))](
        logits, best, counters, out, value, count, SPAN=span, **launch_options(logits.device, dependent, warps)
    )  # fmt: skip
    return out


__all__ = ["BEST", "BODY", "TOLERANCES", "argmax", "argmax_workspace", "reference"]
