"""Runs recorded as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from accel.engines.cuda.device import Device, first_line

_log = logging.getLogger("accel")


class Replay:
    """Calls a function that works on fixed places; from some call on, a recording of it.

    Args:
        device: On the CPU nothing is recorded.
        run: Reads and writes the same memory whenever it is called.
        after: Calls before it is recorded: the first one compiles.
    """

    def __init__(self, device: Device, run: Callable[[], None], after: int = 1) -> None:
        self._device, self._run, self._left = device, run, after
        self._graph: Any = None
        self.failure: str | None = None  # why it runs without a recording

    def run(self) -> None:
        """Calls the function, or replays it."""
        if self._graph is None and self._left <= 0 and self._device.is_gpu and self.failure is None:
            self.record()
        if self._graph is not None:
            self._graph.replay()
            return
        self._left -= 1
        self._run()

    def record(self) -> None:
        """Records the function, which ran before, without running it; a failure is logged, and calls go on."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device.torch)
        try:
            # A recording that fails leaves its own stream current, hence the first context.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._device.shared_pool()),
            ):
                self._run()
        except RuntimeError as error:
            self.failure = first_line(error)
            _log.warning("a run could not be recorded as a CUDA graph and goes on without: %s", self.failure)
            torch.cuda.synchronize(self._device.torch)
            self._device.pool = None  # what was recorded half way holds on to it
            return
        self._graph = graph


__all__ = ["Replay"]
