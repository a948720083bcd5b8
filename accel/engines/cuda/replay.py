"""Runs recorded as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import ismethod
from typing import Any
from weakref import WeakMethod

import torch

from accel.engines.cuda.device import Device, first_line
from accel.engines.cuda.recording import recording

_log = logging.getLogger("accel")
_LATER = (16, 256, 4096)  # calls until what could not be recorded is tried again, each time


class Replay:
    """Calls a function that works on fixed places; from some call on, a recording of it.

    Args:
        device: On the CPU nothing is recorded.
        run: Reads and writes the same memory whenever it is called.
        after: Calls before it is recorded: the first one compiles.
    """

    def __init__(self, device: Device, run: Callable[[], None], after: int = 1) -> None:
        # Whose method it is owns this: held both ways, its memory would be freed only when Python looks for cycles.
        self._run = WeakMethod(run) if ismethod(run) else lambda: run
        self._device, self._left = device, after
        self._later = iter(_LATER)
        self._graph: Any = None
        self.failure: str | None = None  # why it runs without a recording

    def run(self) -> None:
        """Calls the function, or replays it."""
        if self._graph is None and self._left <= 0 and self._device.is_gpu and self.failure is None:
            self.record()
        if self._graph is not None:
            self._graph.replay()
            return
        self._call()
        self._left -= 1

    def record(self) -> None:
        """Records the function, which ran before, without running it; a failure is logged, and calls go on."""
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, self._device.shared_pool()):
                self._call()
        except RuntimeError as error:
            self._put_off(error)
            return
        self._graph = graph

    def _put_off(self, error: RuntimeError) -> None:
        # A recording takes memory beside what runs take: raised, its lack would fail a request that runs without one.
        # Other threads' calls end recordings too: ONNX Runtime's, which wait for the whole device.
        said, calls = first_line(error), next(self._later, None)
        if calls is None:
            self.failure = said
            _log.warning("a run could not be recorded as a CUDA graph and goes on without: %s", said)
        else:
            self._left = calls
            _log.warning("a run goes on without a CUDA graph for %d calls, then it is recorded: %s", calls, said)
        self._device.synchronize()
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            self._device.pool = None  # what was recorded half way may hold on to it, or have been its only user

    def _call(self) -> None:
        run = self._run()
        assert run is not None, "its owner calls it"
        run()


__all__ = ["Replay"]
