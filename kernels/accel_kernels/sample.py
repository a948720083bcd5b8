"""Tokens drawn from logits, without reading them back: temperature, top_k, top_p, min_p and the draw.

What may be drawn is a threshold on a row's scores, found once by number (top_k) and once by mass (top_p), see
``sample_search``. Then each chunk's mass is summed, and the chunk and the token found on which the draw falls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from accel_kernels.checks import INDICES, Expect
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.sample_body import BODY, TOLERANCES, reference
from accel_kernels.sample_search import (
    BORDER,
    FLOOR,
    INFINITY_BITS,
    KEPT,
    LEAST_ORDER,
    LEVELS,
    STATE,
    TIES,
    depths,
    element,
    list_kernel,
    order_of,
    row_of,
    settle_kernel,
    survey_kernel,
    units,
)
from accel_kernels.tiles import let_successor_start, wait_for_predecessor

FIELDS = 5  # of a draw: temperature, top_k, top_p, min_p, uniform
MAX_VOCAB = 1 << 20  # the sum of as many weights of at most 1 fits into 63 bits


class SampleSpace(NamedTuple):
    """Workspace of ``sample``; nothing in it outlives a call.

    Attributes:
        draws: float64 [R, 5].
        best, masses, ties: int64 [R, C] of each chunk: its best score and index; what is drawn from, sum and number.
        worst: float32 [R, C], each chunk's least score above -infinity.
        levels: int64 [R, 2, 2, 16]: by number and by mass, the two surveys.
        state: int64 [R, 4].
        cursors: int32 [R, 2], how many scores the list has.
        near: float32 [R, V], the list.
    """

    draws: torch.Tensor
    best: torch.Tensor
    masses: torch.Tensor
    ties: torch.Tensor
    worst: torch.Tensor
    levels: torch.Tensor
    state: torch.Tensor
    cursors: torch.Tensor
    near: torch.Tensor


@triton.jit
def extremes_kernel(
    logits, given, turn, draws, best, worst, levels, state, cursors, N, rows, SPAN: tl.constexpr,
    TURNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Each chunk's best and worst score; the row's draw from where the host wrote it; and a clean workspace."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = chunk * SPAN + tl.arange(0, SPAN)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    logit = tl.load(logits + row * N + n, mask=n < N, other=float("-inf"))
    order = tl.where(logit != logit, 0x7FFFFFFF, order_of(logit))  # NaN is found, not passed over
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - n).to(tl.int64)
    tl.store(best + row * tl.num_programs(1) + chunk, tl.max(key, 0))
    finite = tl.where(logit > float("-inf"), logit, float("inf"))
    tl.store(worst + row * tl.num_programs(1) + chunk, tl.min(finite, 0))
    if chunk == 0:
        field = tl.arange(0, 8)
        source = given + row * 5
        if TURNS:
            source += tl.load(turn).to(tl.int64) * rows * 5
        tl.store(draws + row * 5 + field, tl.load(source + field, mask=field < 5, volatile=True), mask=field < 5)
        cell = tl.arange(0, 4 * LEVELS)
        tl.store(levels + row * 4 * LEVELS + cell, tl.zeros_like(cell).to(tl.int64))
        tl.store(cursors + row * 2, 0)
        tl.store(cursors + row * 2 + 1, 0)
        tl.store(state + row * STATE + FLOOR, LEAST_ORDER)
        tl.store(state + row * STATE + KEPT, N)
        tl.store(state + row * STATE + BORDER, INFINITY_BITS)
        tl.store(state + row * STATE + TIES, 0)


@triton.jit
def _kept(logit, inside, draws, state, row, top, temperature):
    """What may be drawn: the amount of each score within the nucleus, and which lie on its border."""
    depth = depths(logit, top, temperature)
    weight = tl.exp(-depth)
    heavy = weight >= tl.load(draws + row * 5 + 3).to(tl.float32)
    kept = inside & heavy & (order_of(logit) >= tl.load(state + row * STATE + FLOOR))
    border = tl.load(state + row * STATE + BORDER).to(tl.int32)
    key = depth.to(tl.int32, bitcast=True)
    return tl.where(kept & (key < border), units(weight), 0), kept & (key == border)


@triton.jit
def weigh_kernel(
    logits, draws, best, state, masses, ties, N, chunks, SPAN: tl.constexpr, CHUNKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Each chunk's part of what is drawn from."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = chunk * SPAN + tl.arange(0, SPAN)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    temperature, drawn, _, top = row_of(draws, best, row, chunks, CHUNKS)
    if drawn:
        logit = tl.load(logits + row * N + n, mask=n < N, other=float("-inf"))
        amount, tied = _kept(logit, n < N, draws, state, row, top, temperature)
        tl.store(masses + row * chunks + chunk, tl.sum(amount, 0))
        tl.store(ties + row * chunks + chunk, tl.sum(tied.to(tl.int32), 0).to(tl.int64))


@triton.jit
def pick_kernel(
    logits, draws, best, state, masses, ties, out, value, N, chunks, SPAN: tl.constexpr, CHUNKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The token on which the uniform number falls: its chunk, then its place in there."""
    row = tl.program_id(0).to(tl.int64)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    temperature, drawn, winner, top = row_of(draws, best, row, chunks, CHUNKS)
    index = 0x7FFFFFFF - (winner & 0x7FFFFFFF)
    if drawn:
        border = tl.load(state + row * STATE + BORDER).to(tl.int32).to(tl.float32, bitcast=True)
        each = units(tl.exp(-border))
        place = tl.arange(0, CHUNKS)
        tied = tl.load(ties + row * chunks + place, mask=place < chunks, other=0)
        behind = tl.sum(tied, 0) - tl.cumsum(tied, 0)  # the border's last ones are kept
        taken = tl.minimum(tl.maximum(tl.load(state + row * STATE + TIES) - behind, 0), tied)
        mass = tl.load(masses + row * chunks + place, mask=place < chunks, other=0) + taken * each
        ends = tl.cumsum(mass, 0)
        total = tl.sum(mass, 0)
        target = tl.minimum((tl.load(draws + row * 5 + 4) * total.to(tl.float64)).to(tl.int64), total - 1)
        chunk = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), chunks - 1)
        n = chunk * SPAN + tl.arange(0, SPAN)
        logit = tl.load(logits + row * N + n, mask=n < N, other=float("-inf"))
        amount, on_border = _kept(logit, n < N, draws, state, row, top, temperature)
        rank = tl.cumsum(on_border.to(tl.int32), 0, reverse=True)
        amount += tl.where(on_border & (rank <= element(taken, place, chunk)), each, 0)
        reached = tl.cumsum(amount, 0) + element(ends, place, chunk - 1)
        found = chunk * SPAN + tl.sum((reached <= target).to(tl.int32), 0)
        index = tl.minimum(found, N - 1).to(tl.int64)
    tl.store(out + row, index)
    tl.store(value + row, tl.load(logits + row * N + index))


def sample_workspace(rows: int, vocab: int, device: torch.device, span: int = 1024) -> SampleSpace:
    """Room for ``sample`` of at most ``rows`` rows of ``vocab`` logits, in spans of at least ``span``."""
    chunks = triton.cdiv(vocab, span)

    def space(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=device)

    return SampleSpace(
        draws=space(torch.float64, FIELDS),
        best=space(torch.int64, chunks),
        masses=space(torch.int64, chunks),
        ties=space(torch.int64, chunks),
        worst=space(torch.float32, chunks),
        levels=space(torch.int64, 2, 2, 16),
        state=space(torch.int64, 4),
        cursors=space(torch.int32, 2),
        near=space(torch.float32, vocab),
    )


def sample(
    logits: torch.Tensor,
    draws: torch.Tensor,
    out: torch.Tensor,
    value: torch.Tensor,
    space: SampleSpace,
    *,
    turn: torch.Tensor | None = None,
    span: int = 2048,
    warps: int = 4,
    dependent: bool | None = None,
) -> torch.Tensor:
    """A token of each row, drawn from what temperature, top_k, top_p and min_p leave, in that order.

    A row that is not drawn gets its first best token, and so does one whose best logit is NaN or infinite: ``value``
    tells. A drawn row's token is the one on whose share of the kept weights, in the order of their ids, the uniform
    number falls.

    Args:
        logits: float32 [R, V], V at most 2 ** 20.
        draws: float64 [R, 5], or [2, R, 5] with ``turn``, perhaps page-locked memory of the host: temperature (0: the
            row is not drawn), top_k (0: all; ties with the k-th stay), top_p (the least probable go that sum to
            1 - top_p at most, of equals those of lower indices first; one stays), min_p, and a number of [0, 1).
        out: int64 [R], written.
        value: float32 [R], written: that token's logit.
        space: From ``sample_workspace`` for at least R rows and as many logits.
        turn: int32 [1], which of two draws holds.
        span: Logits per program.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    rows, count = _check(logits, draws, out, value, space, turn, span)
    chunks = triton.cdiv(count, span)
    sizes = {"SPAN": span, "CHUNKS": next_power_of_2(chunks)}
    options = launch_options(logits.device, dependent, warps)
    own, best, masses, ties, worst, levels, state, cursors, near = space
    grid = (rows, chunks)
    extremes_kernel[grid](
        logits, draws, own if turn is None else turn, own, best, worst, levels, state, cursors, count, rows,
        SPAN=span, TURNS=turn is not None, **options,
    )  # fmt: skip
    for by_mass in (0, 1):
        for second in (0, 1):
            survey_kernel[grid](
                logits, own, best, worst, levels, state, count, chunks,
                BY_MASS=by_mass, SECOND=second, **sizes, **options,
            )  # fmt: skip
        list_kernel[grid](
            logits, own, best, worst, levels, state, cursors, near, count, chunks, BY_MASS=by_mass, **sizes, **options
        )  # fmt: skip
        settle_kernel[(rows,)](  # each program has a multiprocessor for itself
            own, best, worst, levels, state, cursors, near, count, chunks,
            CHUNKS=sizes["CHUNKS"], BY_MASS=by_mass, BLOCK=512, **options | {"num_warps": 16},
        )  # fmt: skip
    weigh_kernel[grid](logits, own, best, state, masses, ties, count, chunks, **sizes, **options)
    pick_kernel[(rows,)](logits, own, best, state, masses, ties, out, value, count, chunks, **sizes, **options)
    return out


def _check(
    logits: torch.Tensor, draws: torch.Tensor, out: torch.Tensor, value: torch.Tensor, space: SampleSpace,
    turn: torch.Tensor | None, span: int,
) -> tuple[int, int]:  # fmt: skip
    """Rows and logits of each."""
    expect = Expect("sample", logits.device)
    expect.tensor("logits", logits, -1, -1, dtypes=(torch.float32,))
    rows, count = logits.shape
    expect.that(0 < count <= MAX_VOCAB, f"{count} logits, not between 1 and {MAX_VOCAB}")
    elsewhere = Expect("sample", draws.device)  # perhaps the host's
    shape = (rows, FIELDS) if turn is None else (2, rows, FIELDS)
    elsewhere.tensor("draws", draws, *shape, dtypes=(torch.float64,))
    expect.that(draws.device == logits.device or draws.is_pinned(), "draws are on a host whose memory is not pinned")
    expect.tensor("turn", turn, 1, dtypes=(torch.int32,))
    expect.tensor("out", out, rows, dtypes=INDICES)
    expect.tensor("value", value, rows, dtypes=(torch.float32,))
    expect.tensor("the workspace's draws", space.draws, -1, FIELDS, dtypes=(torch.float64,))
    expect.tensor("the workspace's list", space.near, -1, -1, dtypes=(torch.float32,))
    expect.that(len(space.draws) >= rows, f"the workspace is for fewer than {rows} rows")
    expect.that(space.near.shape[1] >= count, f"the workspace is for fewer than {count} logits")
    expect.that(space.best.shape[1] * span >= count, f"spans of {span} are shorter than the workspace's")
    return rows, count


__all__ = ["BODY", "FIELDS", "TOLERANCES", "SampleSpace", "reference", "sample", "sample_workspace"]
