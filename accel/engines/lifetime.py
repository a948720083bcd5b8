"""Refuses sessions that were closed, or opened before a fork."""

from __future__ import annotations

import os

from accel.errors import EngineError

# Forks between the first process and this one. The process id would cost a call to the system in every decode step,
# 10 microseconds on cold caches.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # systems without it do not fork
    os.register_at_fork(after_in_child=_count_fork)


class Lifetime:
    """Refuses use after ``close()`` and in a forked child, where the engine's threads no longer exist."""

    def __init__(self, name: str) -> None:
        self._name, self._forks, self._closed = name, _forks, False

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that opened it: locks may be held by threads that are not here."""
        return _forks != self._forks

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
        if _forks != self._forks:
            raise EngineError(
                f"the {self._name} session was opened before a fork, which its threads did not survive",
                where=f"process {os.getpid()}",
                remedy="Load the bundle in the child process, or start children with the spawn method",
            )


__all__ = ["Lifetime"]
