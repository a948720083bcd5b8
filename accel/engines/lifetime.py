"""Refuses sessions that were closed, or opened before a fork."""

from __future__ import annotations

import os

from accel.errors import EngineError


class Lifetime:
    """Refuses use after ``close()`` and in a forked child, where the engine's threads no longer exist."""

    def __init__(self, name: str) -> None:
        self._name, self._pid, self._closed = name, os.getpid(), False

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that opened it: locks may be held by threads that are not here."""
        return os.getpid() != self._pid

    def close(self) -> bool:
        """Marks it closed; whether it was open."""
        was_open, self._closed = not self._closed, True
        return was_open

    def check(self) -> None:
        """Checks that it may be used here.

        Raises:
            EngineError: closed, or opened by another process.
        """
        if self._closed:
            raise EngineError(f"the {self._name} session is closed", remedy="Load the bundle again")
        if self.forked:
            raise EngineError(
                f"the {self._name} session was opened before a fork, which its threads did not survive",
                where=f"process {os.getpid()}",
                remedy="Load the bundle in the child process, or start children with the spawn method",
            )


__all__ = ["Lifetime"]
