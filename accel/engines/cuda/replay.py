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
            self.failure = first_line(error)
            _log.warning("a run could not be recorded as a CUDA graph and goes on without: %s", self.failure)
            self._device.synchronize()
            self._device.pool = None  # what was recorded half way holds on to it
            return
        self._graph = graph

    def _call(self) -> None:
        run = self._run()
        assert run is not None, "its owner calls it"
        run()


__all__ = ["Replay"]
