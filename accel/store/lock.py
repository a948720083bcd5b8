"""The lock under which one entry is built: on this machine, and among the machines that share an object store.

On one machine (and on shared file systems with working locks) a ``filelock`` holds: one builder at a time, and the
kernel frees what a dead process held. An object store has no such lock. There an object with owner and heartbeat
makes a second build unlikely; it cannot exclude it, e.g. when a builder is cut off from the network for longer than
``EXPIRY_SECONDS`` and goes on. At worst an engine is built twice, and the later one stands. It is never a bad one:
plans are named by their content and the manifest, one atomic put, is written last.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from accel.errors import EngineStoreError, StorageError

_log = logging.getLogger("accel")

BEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0  # without a heartbeat
SETTLE_SECONDS = 0.5  # after a take-over, for another machine that takes over at the same moment
MAX_PAUSE_SECONDS = 0.5
OnWait = Callable[[float], None]  # seconds waited so far


class Lock(Protocol):
    """Held by one process at a time."""

    def try_acquire(self) -> bool:
        """Takes the lock if it is free; does not wait."""

    def release(self) -> None:
        """Gives it back."""


class Board(Protocol):
    """The object store, as far as a lock object needs it."""

    url: str

    def read(self, name: str) -> bytes: ...
    def create(self, name: str, content: bytes) -> bool: ...
    def write(self, name: str, content: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


class LocalLock:
    """A ``filelock`` on ``path``; ``words`` translates its OSErrors. The file stays: removing it would race."""

    def __init__(self, path: Path, words: Callable[[], AbstractContextManager[None]]) -> None:
        self.path, self._words = path, words
        self._lock = FileLock(path, thread_local=False)

    def try_acquire(self) -> bool:
        with self._words():
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                return False
        return True

    def release(self) -> None:
        self._lock.release()


class RemoteLock:
    """A lock object beside the entry, taken by one process of each machine at most.

    It holds the owner and a counter. An owner of the same ``place`` is dead, for we hold that place's local lock. Any
    other is dead once its object has not changed for ``EXPIRY_SECONDS`` of our own clock, so clocks need not agree.

    Args:
        local: Excludes the processes of this machine.
        board: The object store.
        name: The object's name.
        place: Names the folder in which ``local`` lies; unique among machines.
    """

    def __init__(self, local: LocalLock, board: Board, name: str, place: str) -> None:
        self._local, self._board, self._name, self._place = local, board, name, place
        self._owner = secrets.token_hex(16)
        self._seen: tuple[bytes, float] | None = None
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def try_acquire(self) -> bool:
        if not self._local.try_acquire():
            return False
        taken = False
        try:
            taken = self._claim()
        finally:
            if not taken:
                self._local.release()
        if taken:
            self._stop = threading.Event()
            self._heart = threading.Thread(target=self._beat, name="accel-lock", daemon=True)
            self._heart.start()
        return taken

    def release(self) -> None:
        if self._heart is not None:
            self._stop.set()
            self._heart.join()
            self._heart = None
        try:
            if self._is_mine():
                self._board.remove(self._name)
        except (EngineStoreError, StorageError) as error:  # the lock runs out by itself
            _log.warning("the lock in the engine store is left to expire: %s", error)
        finally:
            self._local.release()

    def _claim(self) -> bool:
        if self._board.create(self._name, self._content(0)):
            return True
        try:
            other = self._board.read(self._name)
        except FileNotFoundError:  # released just now: the next try gets it
            return False
        if self._is_alive(other):
            return False
        _log.warning("taking over a lock in the engine store that its owner left behind: %s", _shown(other))
        self._board.write(self._name, self._content(0))
        time.sleep(SETTLE_SECONDS)
        return self._is_mine()

    def _is_alive(self, content: bytes) -> bool:
        if _field(content, "place") == self._place:
            return False
        now = time.monotonic()
        if self._seen is None or self._seen[0] != content:
            self._seen = content, now
        return now - self._seen[1] < EXPIRY_SECONDS

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            with suppress(EngineStoreError, StorageError):  # a network that is down: the next beat may pass
                if not self._is_mine():
                    _log.warning("another machine took over the lock on %s; the engine is built twice", self._name)
                    return
                self._board.write(self._name, self._content(count))

    def _is_mine(self) -> bool:
        with suppress(FileNotFoundError):
            return _field(self._board.read(self._name), "owner") == self._owner
        return False

    def _content(self, count: int) -> bytes:
        owner = {"owner": self._owner, "place": self._place, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({**owner, "beat": count}).encode()


@contextmanager
def held(lock: Lock, on_wait: OnWait | None, timeout: float | None, where: str) -> Iterator[None]:
    """Waits for the lock and holds it while the block runs.

    Args:
        lock: The lock.
        on_wait: Called before each pause with the seconds waited so far.
        timeout: Seconds; None waits as long as the holder lives.
        where: Of the error.

    Raises:
        EngineStoreError: The time is over.
    """
    started, pause = time.monotonic(), 0.02
    while not lock.try_acquire():
        waited = time.monotonic() - started
        if timeout is not None and waited >= timeout:
            what = f"Another process has held the lock on this engine for {waited:.0f} s"
            raise EngineStoreError(what, where=where, remedy="Wait for its build to end, or give a longer timeout")
        if on_wait is not None:
            on_wait(waited)
        time.sleep(pause)
        pause = min(pause * 1.5, MAX_PAUSE_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _field(content: bytes, name: str) -> Any:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return data.get(name) if isinstance(data, dict) else None


def _shown(content: bytes) -> str:
    return f"host {_field(content, 'host')!r}, process {_field(content, 'pid')!r}"


__all__ = ["LocalLock", "Lock", "OnWait", "RemoteLock", "held"]
