"""CUDA graphs of runs that come again and again: captured before the first request, kept only if they are faster.

A graph holds the shapes and addresses that it was captured with, and what its context keeps for them: each has a
context of its own, which runs nothing else (a context whose shapes or profile change breaks the graphs captured
from it). The scratch memory is shared all the same.

When the session opens, every decode batch over the rows from 0 on is run ``WARM_RUNS`` times and captured
(``StepGraphs.warming``). Requests hit these: rows are given out from 0 on, and a batch starts at row 0 unless a later
start needs a smaller batch (``StepPadder``). Such a run has other addresses, so it is queued without a graph; only when
it came ``BUSY_RUNS`` times is it captured amid the requests.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from accel.engines.tensorrt.engine import LoadedEngine, ProfileContext
from accel.errors import EngineError

WARM_RUNS = 3  # before a capture: what a context does at its first runs must not be measured
BUSY_RUNS = 256  # a run that requests bring as often will come on; the capture's pause takes as long as dozens of runs
MEASURED_RUNS = 7
MAX_GRAPHS = 32  # per profile; each takes some megabytes of device memory
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    handle: Any
    context: ProfileContext  # must outlive the handle


class StepGraphs:
    """The graphs of one profile, by what tells their runs apart: shapes and addresses."""

    def __init__(self, engine: LoadedEngine, plain: ProfileContext) -> None:
        self._engine, self._device, self._plain = engine, engine.device, plain
        self._graphs: dict[Hashable, _Graph] = {}
        self._runs: Counter[Hashable] = Counter()
        self._tried: set[Hashable] = set()  # a graph that failed or was slower is not tried again
        self._scratch, self._patience = 0, BUSY_RUNS

    @contextmanager
    def warming(self) -> Iterator[None]:
        """While the block runs, captures come after ``WARM_RUNS`` runs: nobody waits for an answer."""
        self._patience = WARM_RUNS
        try:
            yield
        finally:
            self._patience = BUSY_RUNS

    @property
    def captured(self) -> list[Hashable]:
        """The runs that have a graph."""
        return list(self._graphs)

    def run(self, key: Hashable, bind: Callable[[ProfileContext], None]) -> None:
        """Queues one run. ``bind`` sets a context's shapes and addresses; they must be the same for equal keys.

        Raises:
            EngineError: The run could not be queued. A failed capture is logged, not raised.
        """
        self._forget_moved()
        if key in self._graphs:
            self._device.launch(self._graphs[key].handle)
            return
        bind(self._plain)
        self._plain.prepare()
        self._plain.enqueue()
        self._runs[key] += 1
        if self._runs[key] >= self._patience and key not in self._tried and len(self._graphs) < MAX_GRAPHS:
            self._tried.add(key)
            self._try_graph(key, bind)

    def close(self) -> None:
        """Frees the graphs."""
        graphs, self._graphs = self._graphs, {}
        for graph in graphs.values():
            self._device.destroy(graph.handle)
            graph.context.close()

    def _forget_moved(self) -> None:
        """Graphs point into the scratch memory: when another engine made it grow, they are soon captured anew."""
        scratch, _ = self._device.scratch
        if scratch != self._scratch:
            self._tried -= self._graphs.keys()
            self._runs = Counter(dict.fromkeys(self._graphs, BUSY_RUNS - WARM_RUNS))
            self.close()
            self._scratch = scratch

    def _try_graph(self, key: Hashable, bind: Callable[[ProfileContext], None]) -> None:
        """Captures the run just queued, and measures both ways: running it again changes nothing."""
        try:
            with self._engine.guard("capturing a CUDA graph"):
                graph = self._capture(bind)
                plain, captured = self._measure(self._plain.enqueue, lambda: self._device.launch(graph.handle))
        except EngineError as error:
            _log.warning("no CUDA graph for %s of %s: %s", key, self._plain.profile.name, error)
            return
        verdict = "kept" if captured < plain else "dropped"
        message = "CUDA graph of %s, %s: %.0f us, enqueued %.0f us: %s"
        _log.info(message, self._plain.profile.name, key, 1e6 * captured, 1e6 * plain, verdict)
        if captured < plain:
            self._graphs[key] = graph
        else:
            self._device.destroy(graph.handle)
            graph.context.close()

    def _capture(self, bind: Callable[[ProfileContext], None]) -> _Graph:
        context = self._engine.context(self._plain.profile, fixed=True)
        bind(context)
        context.prepare()
        context.enqueue()  # what new shapes put off happens now, not inside the capture
        self._device.synchronize()
        if not context.is_capturable():
            raise EngineError("the library says that its runs cannot be captured", where=str(self._plain.profile))
        return _Graph(self._device.capture(context.enqueue), context)

    def _measure(self, *ways: Callable[[], None]) -> list[float]:
        """Median seconds of each way, in turns."""
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(MEASURED_RUNS):
            for way, found in zip(ways, times):
                started = perf_counter()
                way()
                self._device.synchronize()
                found.append(perf_counter() - started)
        return [statistics.median(found) for found in times]


__all__ = ["BUSY_RUNS", "MAX_GRAPHS", "MEASURED_RUNS", "StepGraphs", "WARM_RUNS"]
