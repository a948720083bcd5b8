"""The search for the scores that top_k and top_p keep: two surveys, a list, and one program per row that settles it.

Depths are how far scores lie below the row's best in units of the temperature: a weight is exp(-depth). Sums of weights
over rows are integers, so that no order of adding changes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel_kernels.sample_body import LEAST_TEMPERATURE
from accel_kernels.tiles import let_successor_start, wait_for_predecessor

LEVELS = tl.constexpr(16)
ONE = tl.constexpr(float(1 << 42))  # a weight of 1
COLDEST = tl.constexpr(LEAST_TEMPERATURE)
DEEPEST = tl.constexpr(40.0)  # exp(-40) weighs nothing, however often
LEAST_STEP = tl.constexpr(2.0**-100)
FEW = tl.constexpr(4096)  # scores that one program searches as fast as another survey goes
LEAST_ORDER = tl.constexpr(-0x80000000)
INFINITY_BITS = tl.constexpr(0x7F800000)
# of a row's state, int64
FLOOR = tl.constexpr(0)  # order of the least score that top_k keeps
KEPT = tl.constexpr(1)  # how many it keeps
BORDER = tl.constexpr(2)  # bits of the depth at which top_p's nucleus ends
TIES = tl.constexpr(3)  # how many of that depth it keeps, those of the highest indices
STATE = tl.constexpr(4)


@triton.jit
def order_of(value):
    """Integers ordered as the floats."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(order):
    """The float of an order, which may be of 64 bits."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def units(weight):
    """Weights, or a sum of some in float32, as integers."""
    return (weight * ONE).to(tl.int64)


@triton.jit
def element(vector, place, at):
    """One element of a vector that stands in registers; 0 where there is none."""
    return tl.sum(tl.where(place == at, vector, 0), 0)


@triton.jit
def row_of(draws, best, row, chunks, CHUNKS: tl.constexpr):
    """Temperature, whether the row is drawn, its best score's key and value."""
    chunk = tl.arange(0, CHUNKS)
    winner = tl.max(tl.load(best + row * chunks + chunk, mask=chunk < chunks, other=-0x8000000000000000), 0)
    top = value_of(winner >> 32)
    temperature = tl.load(draws + row * 5)
    drawn = (temperature > 0) & (tl.abs(top) < float("inf"))
    return tl.maximum(temperature, COLDEST).to(tl.float32), drawn, winner, top


@triton.jit
def depths(logit, top, temperature):
    return tl.div_rn(top - logit, temperature + tl.zeros_like(logit))


@triton.jit
def _is_asked(draws, row, N, BY_MASS: tl.constexpr):
    """Whether the row's filters have anything to do for this stage."""
    if BY_MASS:
        asked = tl.load(draws + row * 5 + 2) < 1.0
    else:
        top_k = tl.load(draws + row * 5 + 1)
        asked = (top_k > 0) & (top_k < N)
    return asked & (tl.load(draws + row * 5) > 0)


@triton.jit
def _need(draws, levels, row, N, BY_MASS: tl.constexpr):
    """How many scores, or how much mass, the stage keeps."""
    if BY_MASS:
        total = tl.load(levels + row * 4 * LEVELS + 2 * LEVELS + LEVELS - 1)
        return _mass_needed(tl.load(draws + row * 5 + 2), total)
    else:  # of a cold row's top_k what lies deeper than any weight reaches need not be found
        surveyed = tl.load(levels + row * 4 * LEVELS + LEVELS - 1)
        return tl.minimum(tl.load(draws + row * 5 + 1).to(tl.int64), surveyed)


@triton.jit
def _mass_needed(top_p, total):
    """The heaviest tokens are kept until they reach this: what goes sums to (1 - top_p) of the total at most."""
    return tl.maximum(total - ((1.0 - top_p) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _narrowed(levels, need, low, high, step, base):
    """Of a survey's range (low, high] the part in which the sum reaches ``need``, and the sum up to there."""
    level = tl.arange(0, LEVELS)
    reached = tl.load(levels + level)
    part = tl.minimum(tl.sum((reached < need).to(tl.int32), 0), LEVELS - 1)
    start = tl.maximum(low, 0.0)
    base = tl.where(part == 0, base, element(reached, level, part - 1))
    found = element(reached, level, part) - base
    high = tl.where(part == LEVELS - 1, high, start + (part + 1).to(tl.float32) * step)
    return tl.where(part == 0, low, start + part.to(tl.float32) * step), high, base, found


@triton.jit
def _first_step(draws, worst, row, top, temperature, chunks, N, CHUNKS: tl.constexpr, BY_MASS: tl.constexpr):
    """The first survey's step: a power of two, so that every level is exact, 16 of which reach the worst score.

    Or as far as counts: the tokens below the last level all go, or weigh nothing, or both.
    """
    chunk = tl.arange(0, CHUNKS)
    least = tl.min(tl.load(worst + row * chunks + chunk, mask=chunk < chunks, other=float("inf")), 0)
    reach = tl.minimum(tl.div_rn(top - least, temperature), DEEPEST)
    if BY_MASS:
        rest = tl.maximum(1.0 - tl.load(draws + row * 5 + 2), 1e-15).to(tl.float32)
        reach = tl.minimum(reach, tl.log(N / rest))  # so much less than the best one all N together are spared
    power = (reach.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000
    return tl.maximum(power.to(tl.float32, bitcast=True) / LEVELS, LEAST_STEP)


@triton.jit
def _end(step, BY_MASS: tl.constexpr):
    """Where the first survey ends: all mass is somewhere, but scores are counted as far as they weigh anything."""
    return float("inf") if BY_MASS else LEVELS * step


@triton.jit
def _range(draws, worst, levels, state, row, top, temperature, chunks, N, CHUNKS: tl.constexpr, BY_MASS: tl.constexpr):
    """After the first survey: (low, high] of the depths among which the threshold is, the sum above them, the second
    survey's step, what is needed, and whether so few are left that it is not made. Of few that top_k left all are.
    """
    need = _need(draws, levels, row, N, BY_MASS)
    step = _first_step(draws, worst, row, top, temperature, chunks, N, CHUNKS, BY_MASS)
    first = levels + row * 4 * LEVELS + BY_MASS * 2 * LEVELS
    low, high, base, found = _narrowed(first, need, -1.0, _end(step, BY_MASS), step, tl.zeros((), tl.int64))
    finer = step / LEVELS
    if BY_MASS:
        few = tl.load(state + row * STATE + KEPT) <= FEW
        low, high, base = tl.where(few, -1.0, low), tl.where(few, float("inf"), high), tl.where(few, 0, base)
    else:
        few = found <= FEW
    return low, high, base, finer, need, few


@triton.jit
def survey_kernel(
    logits, draws, best, worst, levels, state, N, chunks, SPAN: tl.constexpr, CHUNKS: tl.constexpr,
    BY_MASS: tl.constexpr, SECOND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """How many scores, or how much mass, lie above each of 16 levels, the last one of which is the range's end."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    asked = _is_asked(draws, row, N, BY_MASS)
    if BY_MASS:
        asked = asked & (tl.load(state + row * STATE + KEPT) > FEW)
    if asked:  # most rows are through with this at once
        temperature, drawn, _, top = row_of(draws, best, row, chunks, CHUNKS)
        if SECOND:
            low, high, _, step, _, few = _range(
                draws, worst, levels, state, row, top, temperature, chunks, N, CHUNKS, BY_MASS
            )  # fmt: skip
            wanted = drawn & (few == 0)
        else:
            step = _first_step(draws, worst, row, top, temperature, chunks, N, CHUNKS, BY_MASS)
            low, high, wanted = -1.0, _end(step, BY_MASS), drawn
        if wanted:
            logit = tl.load(logits + row * N + n, mask=n < N, other=float("-inf"))
            depth = depths(logit, top, temperature)
            cells = levels + row * 4 * LEVELS + (BY_MASS * 2 + SECOND) * LEVELS
            if BY_MASS:
                near = order_of(logit) >= tl.load(state + row * STATE + FLOOR)
                weight = tl.where(near & (n < N), tl.exp(-depth), 0.0)
            start = tl.maximum(low, 0.0)
            for level in tl.static_range(LEVELS):
                limit = high if level == LEVELS - 1 else start + (level + 1) * step
                if BY_MASS:
                    found = units(tl.sum(tl.where(depth <= limit, weight, 0.0), 0))
                else:
                    found = tl.sum(((depth <= limit) & (n < N)).to(tl.int32), 0).to(tl.int64)
                tl.atomic_add(cells + level, found, sem="relaxed")


@triton.jit
def _settled_range(
    draws, worst, levels, state, row, top, temperature, chunks, N, CHUNKS: tl.constexpr, BY_MASS: tl.constexpr
):
    """As ``_range``, after all surveys that were made."""
    low, high, base, step, need, few = _range(
        draws, worst, levels, state, row, top, temperature, chunks, N, CHUNKS, BY_MASS
    )  # fmt: skip
    if few == 0:
        second = levels + row * 4 * LEVELS + (BY_MASS * 2 + 1) * LEVELS
        low, high, base, _ = _narrowed(second, need, low, high, step, base)
    return low, high, base, need, few


@triton.jit
def list_kernel(
    logits, draws, best, worst, levels, state, cursors, near, N, chunks, SPAN: tl.constexpr, CHUNKS: tl.constexpr,
    BY_MASS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The scores among which the threshold is, one after another, in any order."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    if _is_asked(draws, row, N, BY_MASS):
        temperature, drawn, _, top = row_of(draws, best, row, chunks, CHUNKS)
        low, high, _, _, _ = _settled_range(
            draws, worst, levels, state, row, top, temperature, chunks, N, CHUNKS, BY_MASS
        )  # fmt: skip
        logit = tl.load(logits + row * N + n, mask=n < N, other=float("-inf"))
        depth = depths(logit, top, temperature)
        inside = (depth > low) & (depth <= high) & (n < N)
        if BY_MASS:
            inside = inside & (logit > float("-inf")) & (order_of(logit) >= tl.load(state + row * STATE + FLOOR))
        places = tl.cumsum(inside.to(tl.int32), 0)
        count = tl.sum(inside.to(tl.int32), 0)
        if drawn & (count > 0):
            start = tl.atomic_add(cursors + row * 2 + BY_MASS, count, sem="relaxed")
            tl.store(near + row * N + start + places - 1, logit, mask=inside)


@triton.jit
def _listed(near, n, start, top, temperature, BLOCK: tl.constexpr, BY_MASS: tl.constexpr):
    """A block of the list: keys int64, ascending from the best, what each counts for, and which are there."""
    place = start + tl.arange(0, BLOCK)
    logit = tl.load(near + place, mask=place < n, other=float("-inf"))
    if BY_MASS:
        depth = depths(logit, top, temperature)
        key = depth.to(tl.int32, bitcast=True)
        amount = units(tl.exp(-depth))
    else:
        key = -1 - order_of(logit)
        amount = tl.full((BLOCK,), 1, tl.int64)
    return key.to(tl.int64), tl.where(place < n, amount, 0), place < n


@triton.jit
def _bounds(near, n, top, temperature, BLOCK: tl.constexpr, BY_MASS: tl.constexpr):
    """The list's least and greatest key, and the sum of its amounts."""
    least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int64)
    most = tl.full((BLOCK,), -0x80000000, tl.int64)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        key, amount, there = _listed(near, n, start, top, temperature, BLOCK, BY_MASS)
        least = tl.minimum(least, tl.where(there, key, 0x7FFFFFFF))
        most = tl.maximum(most, tl.where(there, key, -0x80000000))
        total += amount
    return tl.min(least, 0), tl.max(most, 0), tl.sum(total, 0)


@triton.jit
def _up_to(near, n, limits, top, temperature, BLOCK: tl.constexpr, BY_MASS: tl.constexpr):
    """The sum of the list's amounts whose keys are not above each limit, int64 [16]."""
    total = tl.zeros((BLOCK, LEVELS), tl.int64)
    for start in range(0, n, BLOCK):
        key, amount, _ = _listed(near, n, start, top, temperature, BLOCK, BY_MASS)
        total += tl.where(key[:, None] <= limits[None, :], amount[:, None], 0)
    return tl.sum(total, 0)


@triton.jit
def settle_kernel(
    draws, best, worst, levels, state, cursors, near, N, chunks, CHUNKS: tl.constexpr, BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The exact threshold: the first key up to which the sum reaches what is needed."""
    row = tl.program_id(0).to(tl.int64)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    n = tl.load(cursors + row * 2 + BY_MASS)  # 0 where nothing was asked
    if n > 0:
        near += row * N
        temperature, _, _, top = row_of(draws, best, row, chunks, CHUNKS)
        _, _, base, need, few = _settled_range(
            draws, worst, levels, state, row, top, temperature, chunks, N, CHUNKS, BY_MASS
        )  # fmt: skip
        low, high, total = _bounds(near, n, top, temperature, BLOCK, BY_MASS)
        if BY_MASS:
            need = tl.where(few, _mass_needed(tl.load(draws + row * 5 + 2), total), need)
        level = tl.arange(0, LEVELS)
        while low < high:
            step = (high - low) // LEVELS + 1
            reached = base + _up_to(near, n, low + (level + 1) * step - 1, top, temperature, BLOCK, BY_MASS)
            part = tl.minimum(tl.sum((reached < need).to(tl.int32), 0), LEVELS - 1)
            low += part * step
            high = tl.minimum(high, low + step - 1)
        # up to the key before it, and up to it
        sums = base + _up_to(near, n, low + tl.minimum(level, 1) - 1, top, temperature, BLOCK, BY_MASS)
        if BY_MASS:
            each = tl.maximum(units(tl.exp(-low.to(tl.int32).to(tl.float32, bitcast=True))), 1)
            ties = tl.maximum((need - element(sums, level, 0) + each - 1) // each, 1)
            tl.store(state + row * STATE + BORDER, low)
            tl.store(state + row * STATE + TIES, ties)
        else:
            tl.store(state + row * STATE + FLOOR, -1 - low)
            tl.store(state + row * STATE + KEPT, element(sums, level, 1))


__all__ = [
    "BORDER",
    "FLOOR",
    "INFINITY_BITS",
    "KEPT",
    "LEAST_ORDER",
    "LEVELS",
    "STATE",
    "TIES",
    "depths",
    "element",
    "list_kernel",
    "order_of",
    "row_of",
    "settle_kernel",
    "survey_kernel",
    "units",
]
