"""Steps' places on the device: the inputs that a recorded run reads, and the results that it leaves."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from accel_kernels.advance import advance
from accel_kernels.argmax import argmax, argmax_workspace
from accel_kernels.launches import SHORT_PAST
from numpy.typing import NDArray

from accel.engines.cuda.attention import StepTensors
from accel.engines.cuda.device import Device, is_full
from accel.engines.cuda.drawing import FIELDS, DrawTable, Table, values_of
from accel.engines.cuda.executor import Executor
from accel.engines.cuda.replay import Replay
from accel.engines.session import ChosenTokens, Draws, StepInputs

SITS_OUT = -1
_log = logging.getLogger("accel")


class UnderWay(NamedTuple):
    """A step that was launched."""

    lengths: NDArray[np.int64]
    place: int  # where its tokens go, and whose draws it reads
    table: Table | None  # how its tokens are drawn; None: they are the best ones


class DecodePlace:
    """One-token steps of the first ``rows`` cache rows: token b is row b's.

    A run leaves the next step's inputs where it found its own: each row's token, the best one or a drawn one, one
    position on. So the next step can follow at once, while the host still looks at this one's tokens.
    """

    def __init__(self, rows: int, long_past: bool, device: Device, executor: Executor) -> None:
        self._device, self._executor, self._rows, self._long_past = device, executor, rows, long_past
        place = device.torch
        self._host = device.pinned(3 * rows)
        self._inputs = torch.zeros(3 * rows, dtype=torch.int64, device=place)  # ids, positions; as int32 lengths, turn
        self._ids, self._positions = self._inputs[:rows], self._inputs[rows : 2 * rows]
        self._lengths, self._turn = self._inputs[2 * rows :].view(torch.int32)[: rows + 1].split([rows, 1])
        self._lengths.fill_(SITS_OUT)
        self._logits: torch.Tensor | None = None  # float32 [rows, V], where the run leaves them
        self._best = torch.zeros(2 * rows, dtype=torch.int64, device=place)  # tokens, then their logits' float32
        self._space = argmax_workspace(rows, place)
        self._told = device.pinned(4 * rows)  # what two steps left: the device writes it to the host
        self._events: list[Any] = [device.event() for _ in range(2)]
        self._copied: Any = None
        self._under_way: deque[UnderWay] = deque()
        self._launched = 0  # steps, that of the place's first run included: the next one's turn, if that is even or odd
        self._room_ahead = True
        self._tokens: NDArray[np.int64] | None = None  # of the step that was read last
        self._draws = DrawTable(rows, 2, device)
        self._greedy, self._sampled = Replay(device, self._run_greedy), Replay(device, self._run_sampled)
        self._greedy.run()  # compiles; every row sits out
        self._launched += 1
        if device.is_gpu:
            self._greedy.record()

    def start(self, inputs: StepInputs, capacity: int, ahead: bool, draws: Draws | None = None) -> None:
        """Makes this step the first one under way, and with ``ahead`` the one behind it the second."""
        lengths = self._lengths_of(inputs)
        table = self._table_of(lengths, draws, 0)
        if not (ahead and self._is_under_way(inputs, lengths, table)):
            self._under_way.clear()
            self._fill(inputs, lengths)
            self._launch(lengths, table)
        limit = capacity if self._long_past else min(capacity, SHORT_PAST)
        if ahead and self._room_ahead and len(self._under_way) < 2 and lengths.max() + 1 < limit:
            self._launch_ahead(np.where(lengths >= 0, lengths + 1, lengths), self._table_of(lengths, draws, 1))

    def forget(self) -> None:
        """Nobody will ask for the steps under way: others may have written to the cache meanwhile."""
        self._under_way.clear()

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """float32 [R, V] of the step that was started."""
        self._under_way.clear()
        assert self._logits is not None
        rows = np.flatnonzero(inputs.query_lengths[: self._rows])
        if len(rows) == rows[-1] + 1:
            return self._logits[: len(rows)].cpu().numpy()
        return self._logits[torch.from_numpy(rows).to(self._logits.device)].cpu().numpy()

    def tokens(self, inputs: StepInputs) -> ChosenTokens:
        """Waits for the step that was started; each active row's token."""
        place = self._under_way.popleft().place
        if self._events[place] is not None:
            self._events[place].synchronize()
        taken = self._told.numpy()[2 * self._rows * place :]
        rows = np.flatnonzero(inputs.query_lengths[: self._rows])
        self._tokens = taken[: self._rows].copy()
        values = taken[self._rows : 2 * self._rows].view(np.float32)[: self._rows]
        return ChosenTokens(self._tokens[rows], values[rows].copy())

    def _lengths_of(self, inputs: StepInputs) -> NDArray[np.int64]:
        active = inputs.query_lengths[: self._rows] > 0
        return np.where(active, inputs.past_lengths[: self._rows], SITS_OUT).astype(np.int64)

    def _table_of(self, lengths: NDArray[np.int64], draws: Draws | None, behind: int) -> Table | None:
        """How every row's token is drawn, those' that sit out not at all; in this step, or in the one behind it."""
        if draws is None:
            return None
        table = np.zeros((self._rows, FIELDS))
        active = lengths >= 0
        table[active, :-1], table[active, -1] = draws.filters, draws.uniforms[:, behind]
        return table

    def _is_under_way(self, inputs: StepInputs, lengths: NDArray[np.int64], table: Table | None) -> bool:
        if not self._under_way or self._tokens is None or not np.array_equal(self._under_way[0].lengths, lengths):
            return False
        expected = self._under_way[0].table
        same = expected is table if expected is None or table is None else np.array_equal(expected, table)
        return same and np.array_equal(self._tokens[lengths >= 0], inputs.input_ids)

    def _fill(self, inputs: StepInputs, lengths: NDArray[np.int64]) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still read the host's side
        ids, positions, tail = self._host.numpy().reshape(3, self._rows)
        ids[:], positions[:] = 0, np.maximum(lengths, 0)
        ids[lengths >= 0] = inputs.input_ids
        tail = tail.view(np.int32)
        tail[: self._rows], tail[self._rows] = lengths, self._launched % 2  # a run that failed did not take its turn
        self._inputs.copy_(self._host, non_blocking=True)
        if self._device.is_gpu:
            self._copied = self._device.event()
            self._copied.record()

    def _launch(self, lengths: NDArray[np.int64], table: Table | None) -> None:
        place = self._launched % 2
        if table is not None:
            if self._events[place] is not None:
                self._events[place].synchronize()  # the last but one step, over unless nobody asked for it, reads it
            self._draws.write(place, table)
        (self._greedy if table is None else self._sampled).run()
        self._launched += 1
        if self._events[place] is not None:
            self._events[place].record()
        self._under_way.append(UnderWay(lengths, place, table))

    def _launch_ahead(self, lengths: NDArray[np.int64], table: Table | None) -> None:
        """Nobody asked for this step yet, so that it cannot be is no reason to fail."""
        try:
            self._launch(lengths, table)
        except Exception as error:
            if not is_full(error):
                raise
            self._room_ahead = False
            _log.warning("steps of %d rows do not run ahead: the GPU's memory has no room for another run", self._rows)

    def _run(self) -> torch.Tensor:
        feeds = {"input_ids": self._ids, "position_ids": self._positions}
        return self._executor.run(feeds, StepTensors(self._lengths, long_past=self._long_past))["logits"]

    def _run_greedy(self) -> None:
        self._logits = self._run()
        argmax(self._logits, self._best[: self._rows], values_of(self._best), self._space)
        advance(self._best, self._ids, self._positions, self._lengths, self._told, self._turn)

    def _run_sampled(self) -> None:
        self._draws.draw(self._run(), self._best, self._turn)
        advance(self._best, self._ids, self._positions, self._lengths, self._told, self._turn)


class PackedPlace:
    """Steps of several tokens per row, as many as ``tokens`` in all; the rest is padding.

    Args:
        tokens: T.
        longest: Most tokens of a row.
        wanted: R.
        rows: Cache rows.
    """

    def __init__(self, tokens: int, longest: int, wanted: int, rows: int, device: Device, executor: Executor) -> None:
        self._tokens, self._longest, self._wanted, self._rows = tokens, max(2, longest), wanted, rows
        self._executor = executor
        self._sizes = [tokens, tokens, tokens, rows, rows, rows, wanted]  # ids, positions, rows, starts, stops, past
        self._host = device.pinned(sum(self._sizes))
        self._parts = [part.numpy() for part in self._host.split(self._sizes)]
        self._inputs = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device.torch)
        self._small = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device.torch)
        self._logits: torch.Tensor | None = None
        self._best = torch.zeros(2 * wanted, dtype=torch.int64, device=device.torch)
        self._space = argmax_workspace(wanted, device.torch)
        self._taken = device.pinned(2 * wanted)
        self._told, self._numbers = self._taken.numpy(), np.arange(rows)
        self._draws = DrawTable(wanted, 1, device)
        self._greedy, self._sampled = Replay(device, self._run_greedy), Replay(device, self._run_sampled)
        self._copied = device.event()  # None on the CPU

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """float32 [R, V]."""
        self._start(inputs, self._greedy)
        assert self._logits is not None
        return self._logits[: len(inputs.logits_positions)].cpu().numpy()

    def greedy(self, inputs: StepInputs) -> ChosenTokens:
        """Each wanted position's best token."""
        self._start(inputs, self._greedy)
        return self._chosen(inputs)

    def sampled(self, inputs: StepInputs, draws: Draws) -> ChosenTokens:
        """A token of each wanted position, drawn; the padding's is not."""
        table = np.zeros((self._wanted, FIELDS))
        table[: len(draws.filters), :-1], table[: len(draws.filters), -1] = draws.filters, draws.uniforms[:, 0]
        self._draws.write(0, table)  # nothing is under way: whoever ran this waited for the results
        self._start(inputs, self._sampled)
        return self._chosen(inputs)

    def _chosen(self, inputs: StepInputs) -> ChosenTokens:
        self._taken.copy_(self._best)
        tokens, count = self._told, len(inputs.logits_positions)
        return ChosenTokens(tokens[:count].copy(), tokens[self._wanted :].view(np.float32)[:count].copy())

    def _start(self, inputs: StepInputs, replay: Replay) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # where nothing is wanted nobody waited: the last copy may still read this
        ids, positions, rows, starts, stops, past, wanted = self._parts
        count, lengths = len(inputs.input_ids), inputs.query_lengths
        ids[:count], ids[count:] = inputs.input_ids, 0
        positions[:count], positions[count:] = inputs.position_ids, 0
        rows[:count], rows[count:] = self._numbers.repeat(lengths), SITS_OUT
        lengths.cumsum(out=stops)
        np.subtract(stops, lengths, out=starts)
        past[:] = inputs.past_lengths
        wanted[:], wanted[: len(inputs.logits_positions)] = 0, inputs.logits_positions
        self._inputs.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        replay.run()

    def _run(self) -> torch.Tensor:
        self._small.copy_(self._inputs)
        ids, positions, *_, wanted = self._inputs.split(self._sizes)
        _, slots, rows, starts, stops, past, _ = self._small.split(self._sizes)
        step = StepTensors(past, starts, stops, rows, slots, self._longest)
        return self._executor.run({"input_ids": ids, "position_ids": positions}, step, wanted)["logits"]

    def _run_greedy(self) -> None:
        self._logits = self._run()
        argmax(self._logits, self._best[: self._wanted], values_of(self._best), self._space)

    def _run_sampled(self) -> None:
        self._draws.draw(self._run(), self._best)


__all__ = ["DecodePlace", "PackedPlace"]
