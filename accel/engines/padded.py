"""Packed steps -> runs of padded rows, for engines whose graphs take [B, S].

Rows that bring one token run together, from row 0 on unless a later start needs a smaller batch: a batch is then the
same run, over the same addresses, whichever of its rows are busy. A row that brings more runs alone, on its own
slice of the cache, so that nobody pays for its length; where the engine allows it, neighbours whose caches are empty
and whose prompts are about as long run side by side. A run writes S slots of every row it covers, padding included:
what lies behind a row's tokens is free for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import StepInputs

_MOST_PADDING = 0.25  # of the tokens of prompts that run side by side


@dataclass(frozen=True)
class PaddedStep:
    """One run over the cache rows ``first .. first + B - 1``.

    Attributes:
        first: First cache row.
        input_ids: int64 [B, S].
        position_ids: int64 [B, S]; padding repeats a position of its row.
        write_index: int64 [B], the slot that each row's first token goes to.
        logits_positions: int64 [R], R >= 1, indices into the B * S tokens.
        wanted: int64 [R], which row of the packed step's logits each one is; -1: nobody's.
    """

    first: int
    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    write_index: NDArray[np.int64]
    logits_positions: NDArray[np.int64]
    wanted: NDArray[np.int64]


class StepPadder:
    """Cuts packed steps into padded runs, and remembers how many slots of each row are taken.

    Args:
        rows: Cache rows.
        capacity: Slots per row.
        batches: Batch sizes to choose from for one-token runs, ascending, the last at least ``rows``.
        widths: Lengths to choose from for longer runs, ascending; longer ones, and those for which the capacity
            leaves no room, keep their own length.
        max_tokens: Longest run.
        max_logits: Most logits of one run; a longer request is cut into several runs.
        side_by_side: Most tokens, padding included, of a run of several first prompts; 0: each runs alone.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        batches: Sequence[int],
        widths: Sequence[int] = (),
        max_tokens: int | None = None,
        max_logits: int | None = None,
        side_by_side: int = 0,
    ) -> None:
        assert batches and batches[-1] >= rows, (batches, rows)
        self._rows, self._capacity = rows, capacity
        self._batches, self._widths = [min(size, rows) for size in batches], list(widths)
        self._max_tokens, self._max_logits = max_tokens or capacity, max_logits or capacity
        self._side_by_side = side_by_side
        self._taken = np.zeros(rows, np.int64)

    def split(self, inputs: StepInputs) -> Iterator[PaddedStep]:
        """The runs of one step, in an order that keeps every row's tokens in sequence."""
        lengths = inputs.query_lengths.astype(np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        singles = np.flatnonzero(lengths == 1)
        if singles.size:
            yield self._together(inputs, singles, starts)
        for rows in self._groups(inputs, lengths, starts):
            if len(rows) > 1:
                yield self._prompts(inputs, rows, starts, lengths)
            else:
                yield from self._alone(inputs, rows[0], int(starts[rows[0]]), int(ends[rows[0]]))

    def copied(self, source: int, target: int, length: int) -> None:
        """Notes that the first ``length`` slots of a row were copied over another's."""
        self._taken[target] = length

    def _groups(
        self, inputs: StepInputs, lengths: NDArray[np.int64], starts: NDArray[np.int64]
    ) -> Iterator[list[int]]:
        """Rows of several tokens that share a run, in order."""
        several = np.flatnonzero(lengths > 1).tolist()
        if not self._side_by_side or len(several) < 2:  # as nearly always
            yield from ([row] for row in several)
            return
        asked = np.histogram(inputs.logits_positions, [*starts, len(inputs.input_ids)])[0].tolist()
        own, past = lengths.tolist(), inputs.past_lengths.tolist()
        group: list[int] = []
        width = tokens = logits = 0
        for row in several:
            width, tokens, logits = max(width, own[row]), tokens + own[row], logits + asked[row]
            size = width * (len(group) + 1)
            fits = size <= self._side_by_side and logits <= self._max_logits and size - tokens <= _MOST_PADDING * size
            if group and not (fits and row == group[-1] + 1 and past[row] == past[group[-1]] == 0):
                yield group
                group, width, tokens, logits = [], own[row], own[row], asked[row]
            group.append(row)
        yield group

    def _prompts(
        self, inputs: StepInputs, rows: list[int], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> PaddedStep:
        """Neighbours' first prompts, padded behind their ends."""
        own = lengths[rows]
        start, stop = int(starts[rows[0]]), int(starts[rows[-1]] + own[-1])  # their tokens follow one another
        real = np.arange(own.max()) < own[:, None]
        ids, positions = np.zeros(real.shape, np.int64), np.zeros(real.shape, np.int64)
        ids[real], positions[real] = inputs.input_ids[start:stop], inputs.position_ids[start:stop]
        positions = np.where(real, positions, inputs.position_ids[starts[rows] + own - 1][:, None])
        whose = np.flatnonzero((inputs.logits_positions >= start) & (inputs.logits_positions < stop))
        at = np.flatnonzero(real)[inputs.logits_positions[whose] - start]
        self._taken[rows] = own
        if not at.size:
            at, whose = np.zeros(1, np.int64), np.full(1, -1, np.int64)
        return PaddedStep(rows[0], ids, positions, np.zeros(len(rows), np.int64), at, whose)

    def _together(self, inputs: StepInputs, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> PaddedStep:
        """Rows with one token each, and those between and behind them, which write one slot behind their own."""
        self._taken[rows] = inputs.past_lengths[rows]
        count = int(rows[-1] - rows[0]) + 1
        size = next(batch for batch in self._batches if batch >= count)
        first = 0 if rows[-1] < size else min(int(rows[0]), self._rows - size)
        write = np.minimum(self._taken[first : first + size], self._capacity - 1)
        ids, positions = np.zeros((size, 1), np.int64), np.zeros((size, 1), np.int64)
        place, tokens = rows - first, starts[rows]
        ids[place, 0], positions[place, 0] = inputs.input_ids[tokens], inputs.position_ids[tokens]
        wanted = np.full(size, -1, np.int64)
        order = {int(token): index for index, token in enumerate(inputs.logits_positions)}
        wanted[place] = [order.get(int(token), -1) for token in tokens]
        self._taken[rows] += 1
        return PaddedStep(first, ids, positions, write, np.arange(size), wanted)

    def _alone(self, inputs: StepInputs, row: int, start: int, end: int) -> Iterator[PaddedStep]:
        chosen = np.flatnonzero((inputs.logits_positions >= start) & (inputs.logits_positions < end))
        tokens = inputs.logits_positions[chosen]
        past = int(inputs.past_lengths[row])
        at = start
        while at < end:
            stop = min(end, at + self._max_tokens)
            within = np.flatnonzero((tokens >= at) & (tokens < stop))
            if within.size > self._max_logits:
                within = within[: self._max_logits]
                stop = int(tokens[within[-1]]) + 1
            positions = tokens[within] - at
            yield self._run(inputs, row, at, stop, past + at - start, positions, chosen[within])
            at = stop
        self._taken[row] = past + end - start

    def _run(
        self,
        inputs: StepInputs,
        row: int,
        start: int,
        stop: int,
        past: int,
        positions: NDArray[np.int64],
        wanted: NDArray[np.int64],
    ) -> PaddedStep:
        count = stop - start
        room = min(self._capacity - past, self._max_tokens)
        width = next((width for width in self._widths if count <= width <= room), count)
        ids, own = np.zeros((1, width), np.int64), np.empty((1, width), np.int64)
        ids[0, :count] = inputs.input_ids[start:stop]
        own[0, :count] = inputs.position_ids[start:stop]
        own[0, count:] = own[0, count - 1]
        if not positions.size:
            positions, wanted = np.zeros(1, np.int64), np.full(1, -1, np.int64)
        return PaddedStep(row, ids, own, np.array([past], np.int64), positions, wanted)


__all__ = ["PaddedStep", "StepPadder"]
