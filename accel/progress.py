"""What is told of long work, a line for each phase, where no bar is shown: to the logger ``accel.progress``.

A program that configures logging hears it at level info; commands send it to stderr, see ``phases_on_stderr``.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("accel.progress")
PAUSE_SECONDS = 30.0  # between two lines about one phase


class PhaseLog:
    """Logs each phase as it begins, and now and then how far it is."""

    def __init__(self) -> None:
        self._name, self._total, self._done = "", 0, 0
        self._told = time.monotonic()

    def start(self, name: str, total: int | None = None) -> None:
        """A phase begins.

        Args:
            total: How much there is to do; None: not known.
        """
        self._name, self._total, self._done = name, total or 0, 0
        self._told = time.monotonic()
        LOGGER.info("%s", name)

    def advance(self, count: int) -> None:
        """So much more of the total is done."""
        self._done += count
        if self._total:
            self.tell(f"{min(100, 100 * self._done // self._total)} %")

    def tell(self, text: str) -> None:
        """How far the phase is; most of what is told is not said, a line in half a minute is enough."""
        if time.monotonic() - self._told >= PAUSE_SECONDS:
            self._told = time.monotonic()
            LOGGER.info("%s: %s", self._name, text)


@contextmanager
def phases_on_stderr() -> Iterator[None]:
    """Meanwhile phases are lines on stderr, unless it is a terminal, which shows bars, or somebody listens already."""
    if sys.stderr.isatty() or (LOGGER.isEnabledFor(logging.INFO) and LOGGER.hasHandlers()):
        yield
        return
    handler, before = logging.StreamHandler(sys.stderr), (LOGGER.level, LOGGER.propagate)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # a library that gives the root logger a handler meanwhile would say each line again
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]


__all__ = ["LOGGER", "PhaseLog", "phases_on_stderr"]
