"""The slot loop, the decoder's core: schedule, run, postprocess. Rows join and leave between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import ChosenTokens, DecoderSession
from accel.errors import AccelError, EngineBrokenError, EngineError, InputError
from accel.runtime.failover import too_long
from accel.runtime.sampling import score_targets
from accel.runtime.sequence import Event, Sequence
from accel.runtime.stepping import Plan, Stepper, wanted

DEFAULT_CHUNK = 256  # prompt tokens per step, all rows together
_LEAST_WIDTH = 32  # a row near its capacity may narrow the others' chunks down to this; then they take turns
_SCORE_BYTES = 64 << 20  # logits of one scoring step

Successor = Callable[[EngineBrokenError], DecoderSession]


@dataclass(frozen=True)
class SlotOptions:
    """How steps are put together.

    Attributes:
        chunk: Prompt tokens per step, all rows together; longer prompts take several steps. None: the session's
            own wish, or 256.
    """

    chunk: int | None = None


class SlotLoop:
    """Generates many sequences over the rows of one decoder session.

    ``submit`` and ``cancel`` may be called from any thread; ``step`` by one thread at a time.
    Sequences beyond the rows wait in arrival order. A step serves every active row: one token
    for those that generate, and up to ``chunk`` prompt tokens of the others, oldest first.

    When the engine breaks, all active sequences wait again, and the next step opens its successor, on
    which they go on from their tokens as from a longer prompt.

    Args:
        session: The engine's; ``successor``'s once it broke.
        options: How steps are put together.
        successor: Opens the next engine's session in place of a broken one, or raises what the sequences
            end with; may be called again after that. None: there is none.
    """

    def __init__(
        self, session: DecoderSession, options: SlotOptions | None = None, successor: Successor | None = None
    ) -> None:
        options = options or SlotOptions()
        if options.chunk is not None and options.chunk < 1:
            raise InputError(f"chunk must be at least 1, not {options.chunk}", where="chunk")
        self._asked_chunk = options.chunk
        self._inbox: deque[Sequence] = deque()  # appended by any thread
        self._waiting: list[Sequence] = []
        self._active: list[Sequence] = []  # in order of admission
        self._prefilled_last = self._ending_last = False
        self._cancelling = False
        self._successor = successor
        self._broken: EngineBrokenError | None = None  # how the session broke, until it is replaced
        self.steps = 0
        self._use(session)

    def _use(self, session: DecoderSession) -> None:
        """Starts on a session whose cache is empty."""
        self._session = session
        self._stepper = Stepper(session)
        self._chunk: int = self._asked_chunk or int(getattr(session, "chunk", DEFAULT_CHUNK))
        self._score_chunk = max(1, min(self._chunk, _SCORE_BYTES // (4 * session.vocab_size)))
        self._rows: list[Sequence | None] = [None] * session.max_batch
        self._shared: list[tuple[object, int] | None] = [None] * session.max_batch  # whose prompt stands in the row

    @property
    def has_work(self) -> bool:
        """Whether anything is running or waiting."""
        return bool(self._active or self._waiting or self._inbox)

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence; it joins at the next step with a free row."""
        self._inbox.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence at the start of the next step, with finish_reason ``cancelled``."""
        sequence.cancelled = True
        self._cancelling = True

    def step(self) -> list[Event]:
        """Schedules, runs and postprocesses one step.

        Returns:
            One event per token made and per sequence ended. A sequence that failed carries its
            error; the others are not touched by it.
        """
        started = perf_counter()
        events: list[Event] = []
        try:
            self._admit(events)
            plan = self._schedule()
            if plan:
                self._run(plan, started, events)
        except EngineBrokenError as error:
            self._requeue(error)
        return events

    def abort(self, error: AccelError) -> list[Event]:
        """Ends every sequence, running or waiting, with ``error``."""
        self._waiting += [self._inbox.popleft() for _ in range(len(self._inbox))]
        everyone = self._active + self._waiting
        self._waiting = []
        for sequence in everyone:
            self._end(sequence, error)
        return [Event(sequence, None, True) for sequence in everyone]

    # Schedule

    def _admit(self, events: list[Event]) -> None:
        """Drops cancelled sequences, then gives free rows to the waiting, or opens the engine that they wait for."""
        if not (self._inbox or self._waiting or self._cancelling):
            return
        self._cancelling = False  # before looking: one cancelled meanwhile is seen now or at the next step
        while self._inbox:
            self._waiting.append(self._inbox.popleft())
        for sequence in [s for s in (*self._active, *self._waiting) if s.cancelled]:
            if sequence.row is None:
                self._waiting.remove(sequence)
            sequence.finish_reason = "cancelled"
            self._end(sequence)
            events.append(Event(sequence, None, True))
        if self._waiting and self._broken is not None:
            self._replace_session(self._broken, events)  # a step of its own: the time is no sequence's processing
        elif self._waiting and len(self._active) < len(self._rows):
            self._fill_rows(events)

    def _fill_rows(self, events: list[Event]) -> None:
        for sequence in list(self._waiting):
            free = [row for row, holder in enumerate(self._rows) if holder is None]
            if not free:
                return
            if sequence.positions > self._session.capacity:  # it was accepted for an engine that held more
                self._waiting.remove(sequence)
                self._end(sequence, too_long(sequence.positions, self._session.capacity))
                events.append(Event(sequence, None, True))
                continue
            source = self._find_prompt(sequence)
            if source is None and self._is_being_prefilled(sequence):
                continue  # its sibling's prompt is under way: one step later it costs a copy
            row = source if source in free else free[0]
            if source is not None:
                sequence.computed = len(sequence.prompt) - 1  # the last token runs: its logits are wanted
                if source != row:
                    self._session.copy_row(source, row, sequence.computed)
            self._waiting.remove(sequence)
            self._rows[row], sequence.row = sequence, row
            self._shared[row] = (sequence.group, len(sequence.prompt)) if source is not None else None
            self._active.append(sequence)

    def _find_prompt(self, sequence: Sequence) -> int | None:
        """A row in which this sequence's prompt stands already (its sibling's, also after that one ended)."""
        if sequence.group is None or len(sequence.prompt) < 2:
            return None
        for row, shared in enumerate(self._shared):
            if shared is not None and shared[0] is sequence.group:
                return row
        return None

    def _is_being_prefilled(self, sequence: Sequence) -> bool:
        if sequence.group is None or len(sequence.prompt) < 2:
            return False
        return any(other.group is sequence.group for other in self._active)

    def _schedule(self) -> Plan:
        """Who takes part in this step."""
        active = self._active
        if len(active) == 1 and active[0].remaining == 1 and active[0].sampler is not None:
            return [(active[0], 1)]
        prefilling = [s for s in active if s.remaining > 1 or s.sampler is None]
        if not prefilling:
            plan = [(s, 1) for s in active]
        elif self._session.mixed_steps:
            plan = [(s, 1) for s in active if s.remaining == 1 and s.sampler is not None]
            plan += self._share_budget(prefilling)
        else:
            decoding = [(s, 1) for s in active if s.remaining == 1 and s.sampler is not None]
            self._prefilled_last = not decoding or not self._prefilled_last
            plan = self._share_budget(prefilling[:1]) if self._prefilled_last else decoding
        if len(plan) > 1:
            plan = self._within_capacity(plan)
            plan.sort(key=lambda entry: entry[0].row or 0)
        return plan

    def _within_capacity(self, plan: Plan) -> Plan:
        """Keeps every row's past plus the step's widest row within the capacity, as the padded attention needs."""
        widest = max(count for _, count in plan)
        room = self._session.capacity - max(s.computed for s, _ in plan)
        if widest <= room:
            return plan
        if room < _LEAST_WIDTH:
            ending = [(s, n) for s, n in plan if self._session.capacity - s.computed < widest]
            others = [entry for entry in plan if entry not in ending]
            self._ending_last = not others or not self._ending_last
            plan = ending if self._ending_last else others
            room = self._session.capacity - max(s.computed for s, _ in plan)
        return [(s, min(n, room)) for s, n in plan]

    def _share_budget(self, prefilling: list[Sequence]) -> Plan:
        """Cuts a step's prompt tokens off the oldest prompts; scored ones bring logits for each, so fewer."""
        budget, plan = self._chunk, []
        scored = self._score_chunk
        for sequence in prefilling:
            count = min(sequence.remaining, budget)
            if sequence.sampler is None:
                count = min(count, scored)
                scored -= count
            if count > 0:
                plan.append((sequence, count))
                budget -= count
        return plan

    # Failover

    def _requeue(self, error: EngineBrokenError) -> None:
        """Everyone waits again, in the order of admission: the cache is lost."""
        self._broken = error
        self._waiting = self._active + self._waiting
        self._active = []
        for sequence in self._waiting:
            sequence.restart()

    def _replace_session(self, broken: EngineBrokenError, events: list[Event]) -> None:
        """Goes on with the engine's successor, or ends everyone when there is none."""
        try:
            if self._successor is None:
                raise broken
            self._use(self._successor(broken))
        except AccelError as error:
            events += self.abort(error)
        else:
            self._broken = None

    # Run

    def _run(self, plan: Plan, started: float, events: list[Event]) -> None:
        """Runs one plan. When the engine fails, each row is tried alone, so that only the bad one ends."""
        inputs = self._stepper.build(plan)
        before = perf_counter()
        logits: NDArray[np.float32] | ChosenTokens | None = None
        try:
            logits = self._stepper.run(plan, inputs)
        except EngineBrokenError:  # no row of it can run: ``step`` turns to the next engine
            raise
        except Exception as error:
            if len(plan) == 1:
                sequence = plan[0][0]
                self._end(sequence, _as_accel_error(error))
                events.append(Event(sequence, None, True))
                return
        if logits is None:  # outside of the handler: the error holds what the step had made
            for entry in plan:
                self._run([entry], perf_counter(), events)
            return
        after = perf_counter()
        self.steps += 1
        clocks = {id(s.clock): s.clock for s, _ in plan}.values() if len(plan) > 1 else (plan[0][0].clock,)
        for clock in clocks:
            clock.prepost += before - started
            clock.compute += after - before
            clock.steps += 1
        self._postprocess(plan, logits, events, after)

    # Postprocess

    def _postprocess(
        self, plan: Plan, logits: NDArray[np.float32] | ChosenTokens, events: list[Event], now: float
    ) -> None:
        start = 0
        for sequence, count in plan:
            first, last = wanted(sequence, count)
            rows, at, token = last - first, start, None
            start += rows
            try:
                if isinstance(logits, ChosenTokens):
                    token = sequence.take(logits, at) if rows else None
                elif sequence.sampler is None:
                    self._score(sequence, logits[at:start])
                elif rows:
                    token = sequence.choose(logits[at])
                if token is not None:
                    sequence.clock.count(perf_counter())  # before it may end: its caller reads the clock then
                self._advance(sequence, count, token)
            except Exception as error:  # its own logits or text: the other sequences go on
                self._end(sequence, _as_accel_error(error))
            finished = sequence.finished
            if token is not None or finished:
                events.append(Event(sequence, token, finished))
            after = perf_counter()
            sequence.clock.prepost += after - now
            now = after

    def _advance(self, sequence: Sequence, count: int, token: int | None) -> None:
        row = sequence.row
        assert row is not None
        sequence.computed += count
        if sequence.group is not None and self._shared[row] is None and sequence.computed >= len(sequence.prompt) - 1:
            self._shared[row] = (sequence.group, len(sequence.prompt))
        if token is not None:
            sequence.append(token)
        elif sequence.sampler is None and sequence.remaining == 0:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            self._end(sequence)

    @staticmethod
    def _score(sequence: Sequence, logits: NDArray[np.float32]) -> None:
        at = sequence.computed
        targets = sequence.tokens[at + 1 : at + 1 + len(logits)]
        scores, best = score_targets(logits, targets)
        sequence.scores += scores.tolist()
        sequence.best += best.tolist()

    def _end(self, sequence: Sequence, error: AccelError | None = None) -> None:
        """Frees the row and marks the sequence finished."""
        sequence.error = error
        if sequence.row is not None:
            self._rows[sequence.row] = None
            sequence.row = None
            self._active.remove(sequence)
        sequence.end()


def _as_accel_error(error: Exception) -> AccelError:
    if isinstance(error, AccelError):
        return error
    wrapped = EngineError(f"the sequence failed: {type(error).__name__}: {error}", where="decoder step")
    wrapped.__cause__ = error
    return wrapped


__all__ = ["DEFAULT_CHUNK", "SlotLoop", "SlotOptions"]
