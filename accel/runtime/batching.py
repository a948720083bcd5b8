"""Micro-batches of texts: planning, feeds, and the session they run on."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import EncoderSession
from accel.errors import EngineBrokenError, EngineError, UncoveredError
from accel.runtime.failover import Failover
from accel.runtime.results import Timings

Row = tuple[Sequence[int], Sequence[int], bool]  # ids, type ids, truncated
Feeds = dict[str, NDArray]

# Tokens per micro-batch. MiniLM's time per token is flat from about 32 tokens per run on (one thread, ONNX
# Runtime), so more rows gain nothing; fewer let the workers end at about the same time.
TOKEN_BUDGET = 384
# For engines that run padding: rows share a micro-batch when it adds at most this share of the longest row (or
# this many tokens), which costs less than the fixed part of another run. Engines with ``run_many`` get rows of
# exactly one length: they take the attention path without a mask.
PADDING_SHARE = 1 / 16
PADDING_TOKENS = 2
# Model outputs held at once: micro-batches run in waves of at most this many bytes.
WAVE_BYTES = 64 << 20


class Stopwatch:
    """Splits one call's wall time into disjoint intervals.

    The record is made when somebody asks for it: beside a small run the making would show.
    """

    __slots__ = ("_timings", "compute", "last", "prepost", "runs", "start")

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.compute = self.prepost = 0.0
        self.runs = 0
        self._timings: Timings | None = None

    def lap_prepost(self) -> None:
        """Counts the time since the last lap as pre- or post-processing."""
        now = time.perf_counter()
        self.prepost += now - self.last
        self.last = now

    def lap_compute(self, runs: int = 1) -> None:
        """Counts the time since the last lap as ``runs`` engine calls."""
        now = time.perf_counter()
        self.compute += now - self.last
        self.last = now
        self.runs += runs

    def lap_system(self) -> None:
        """Leaves the time since the last lap to the rest (``Timings.system``)."""
        self.last = time.perf_counter()

    @property
    def timings(self) -> Timings:
        """The record up to the last lap; the same object each time, so ask after the last one."""
        if self._timings is None:
            self._timings = Timings.measured(self.last - self.start, self.compute, self.prepost, steps=self.runs)
        return self._timings


class SessionGuard:
    """Counts the calls in flight, so that closing waits for them; refuses calls after close or in a fork.

    When the engine breaks, the calls in flight gather; once all of them wait or ended, so that nobody runs
    on it any more, one of them changes to the next engine, and each repeats there what did not come back.
    A run that the engine was not built for goes to the engine beside it, which has a guard of its own.
    """

    def __init__(self, failover: Failover[EncoderSession]) -> None:
        self._failover = failover
        self._session = failover.session
        self._beside: SessionGuard | None = None
        self._broken: EngineBrokenError | None = None  # how the session broke, until it is replaced
        self._lock = threading.RLock()  # entered directly: the methods of a condition are Python
        self._idle = threading.Condition(self._lock)
        self._in_flight = self._gathered = 0  # calls; and those of them that wait for the next engine
        self._closed = False
        self._pid = os.getpid()

    def __enter__(self) -> SessionGuard:
        if os.getpid() != self._pid:  # before the lock: a fork may have copied it while it was held
            remedy = "Load the bundle in each worker process, after the fork"
            raise EngineError("This process was forked after the encoder was loaded", where="Encoder", remedy=remedy)
        with self._lock:
            if self._closed:
                raise EngineError("The encoder is closed", where="Encoder", remedy="Load the bundle again")
            self._in_flight += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._closed or self._gathered:
                self._idle.notify_all()

    @property
    def side_by_side(self) -> bool:
        """Whether the engine runs several micro-batches at a time, and for the true length of their rows."""
        return hasattr(self._session, "run_many")

    def run(self, feeds: Feeds, watch: Stopwatch) -> Feeds:
        """Runs one micro-batch on all of the engine's threads.

        Args:
            feeds: Its inputs.
            watch: The call's. A change of the engine is left to the rest of its time.

        Raises:
            EngineError: The engine failed.
            UncoveredError: The engine was not built for such a run, and no other may take it.
            EngineUnavailableError: It broke, or was not built for such a run, and none is left.
        """
        while True:
            session = self._session
            try:
                if self._broken is None:
                    return session.run(feeds)
            except UncoveredError as error:
                return self._run_beside(feeds, error, watch)
            except EngineBrokenError as error:
                self._broken = error
            self._change_engine(session, watch)

    def run_many(self, feeds: list[Feeds], watch: Stopwatch) -> list[Feeds]:
        """Runs independent micro-batches, side by side where the engine can; results in order. Else as ``run``."""
        while len(feeds) > 1 and self.side_by_side:
            session: Any = self._session
            try:
                if self._broken is None:
                    return session.run_many(feeds)  # type: ignore[no-any-return]
            except EngineBrokenError as error:
                self._broken = error
            self._change_engine(session, watch)
        return [self.run(feed, watch) for feed in feeds]

    def close(self) -> None:
        """Waits for the calls in flight, then closes the session; safe to call twice."""
        if os.getpid() != self._pid:
            return  # the parent's threads do not exist here: nothing to wait for, and not ours to close
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._in_flight == 0)
        self._failover.close()

    def _run_beside(self, feeds: Feeds, error: UncoveredError, watch: Stopwatch) -> Feeds:
        watch.lap_compute(0)
        failover = self._failover.beside(error)
        with self._lock:
            if self._beside is None or self._beside._failover is not failover:  # of an engine that broke since
                self._beside = SessionGuard(failover)
            beside = self._beside
        watch.lap_system()
        with beside:
            return beside.run(feeds, watch)

    def _change_engine(self, broken: EncoderSession, watch: Stopwatch) -> None:
        """Returns once another session is in use: this call's thread opens it, or another's."""
        watch.lap_compute(0)
        with self._idle:
            self._gathered += 1
            self._idle.notify_all()
            try:
                self._idle.wait_for(lambda: self._session is not broken or self._gathered == self._in_flight)
                if self._session is broken:
                    assert self._broken is not None
                    self._session = self._failover.replace(self._broken)
                    self._broken = None
            finally:
                self._gathered -= 1
                self._idle.notify_all()
        watch.lap_system()


def plan_batches(
    lengths: Sequence[int], batch_size: int | None = None, token_budget: int | None = None, pad: bool = True
) -> list[NDArray[np.int64]]:
    """Groups texts of (nearly) equal length, longest first.

    Args:
        lengths: Tokens of each text, all at least 1.
        batch_size: Rows per micro-batch, whatever the padding; None: by the token budget.
        token_budget: Padded tokens per micro-batch; a longer text stands alone. None: ``TOKEN_BUDGET``.
        pad: Whether texts of nearly equal length may share one; False: only of equal length.

    Returns:
        Indices into ``lengths``, one int64 array per micro-batch.
    """
    count = np.asarray(lengths, np.int64)
    order = np.argsort(-count, kind="stable")
    if batch_size is not None:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    budget = TOKEN_BUDGET if token_budget is None else token_budget
    descending = count[order].tolist()
    negated = [-length for length in descending]
    batches, start = [], 0
    while start < len(order):
        longest = descending[start]
        shortest = longest - max(PADDING_TOKENS, int(longest * PADDING_SHARE)) if pad else longest
        fits = start + max(1, budget // longest)
        stop = min(fits, bisect_right(negated, -shortest, lo=start))
        batches.append(order[start:stop])
        start = stop
    return batches


def waves(
    batches: list[NDArray[np.int64]], lengths: Sequence[int], bytes_per_token: int, limit: int = WAVE_BYTES
) -> Iterator[list[NDArray[np.int64]]]:
    """Cuts the micro-batches into runs of consecutive ones whose outputs fit ``limit`` bytes."""
    wave: list[NDArray[np.int64]] = []
    held = 0
    for batch in batches:
        size = len(batch) * lengths[batch[0]] * bytes_per_token
        if wave and held + size > limit:
            yield wave
            wave, held = [], 0
        wave.append(batch)
        held += size
    if wave:
        yield wave


def build_feeds(
    rows: Sequence[Row], indices: Sequence[int], pad_token_id: int, with_type_ids: bool
) -> tuple[Feeds, NDArray[np.int64] | None]:
    """The feeds of one micro-batch, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and, if wanted, ``token_type_ids``, int64 [B, S]; and the mask again,
        or None when all of it is one.
    """
    ids = [rows[i][0] for i in indices]
    lengths = [len(row) for row in ids]
    longest = max(lengths)
    shape = (len(ids), longest)
    if min(lengths) == longest:
        feeds = {"input_ids": np.array(ids, np.int64), "attention_mask": np.ones(shape, np.int64)}
        if with_type_ids:
            feeds["token_type_ids"] = np.array([rows[i][1] for i in indices], np.int64)
        return feeds, None
    input_ids = np.full(shape, pad_token_id, np.int64)
    for target, row in zip(input_ids, ids, strict=True):
        target[: len(row)] = row
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    feeds = {"input_ids": input_ids, "attention_mask": mask}
    if with_type_ids:
        feeds["token_type_ids"] = np.zeros(shape, np.int64)
        for target, i in zip(feeds["token_type_ids"], indices, strict=True):
            target[: len(rows[i][1])] = rows[i][1]
    return feeds, mask


__all__ = ["Row", "SessionGuard", "Stopwatch", "build_feeds", "plan_batches", "waves"]
