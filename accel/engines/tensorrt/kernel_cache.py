"""Files of the kernels that TensorRT-RTX compiled, which make the next start fast. Losing one costs time only."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from accel.storage import replace_file
from accel.store import EngineKey, cache_folder
from accel.store.plan_file import PlanFile, unused

KERNELS_BYTES = 1 << 30  # of a folder: a file stays when its engine leaves the store, and nobody else would remove it
_LOCK = ".lock"
_log = logging.getLogger(__name__)


def kernels_path(key: EngineKey, sm: str) -> Path:
    """Where one engine's kernels for one SM lie: the same for all that open it, so that nobody compiles them twice."""
    return cache_folder() / "kernels" / f"{key.digest}-{sm}.cache"


class KernelFile:
    """One engine's file, marked as in use while the engine is open. Whatever goes wrong is logged, not raised.

    Opening it first cleans its folder: least recently used files go until the rest fits ``KERNELS_BYTES``, this one and
    those that other processes use excepted.

    Args:
        path: None: no kernels are kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._mark: PlanFile | None = None
        if path is not None:
            try:
                prune(path.parent, keep=path)
            except OSError as error:
                _log.warning("old compiled kernels are not removed: %s", error)

    def read(self) -> bytes | None:
        """The file's bytes; None when there is none, or it cannot be read. The library refuses what does not fit."""
        if self._path is None:
            return None
        try:
            self._take()
            with suppress(OSError):  # a folder that is read-only
                os.utime(self._path)
            return self._path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _log.warning("compiled kernels cannot be read, they are compiled again: %s", error)
            return None

    def write(self, data: bytes) -> None:
        """Replaces the file in one step; a failure leaves the old one."""
        if self._path is None:
            return
        try:
            replace_file(self._path, data)
            self._take()
        except OSError as error:
            _log.warning("compiled kernels are not kept: %s", error)

    def close(self) -> None:
        """Takes the mark off. Safe to call twice."""
        if self._mark is not None:
            self._mark.close()
            self._mark = None

    def _take(self) -> None:
        """Marks the file that lies there now."""
        assert self._path is not None
        self.close()
        self._mark = PlanFile.open(self._path)


def prune(folder: Path, keep: Path, limit: int | None = None) -> None:
    """Removes the least recently used files that nobody uses until the rest fits; not while another process does so.

    Args:
        limit: Bytes; None: ``KERNELS_BYTES``.

    Raises:
        OSError: The folder cannot be read or written to.
    """
    from filelock import FileLock, Timeout

    files = _by_age(folder)
    if sum(size for _, size, _ in files) <= (limit := KERNELS_BYTES if limit is None else limit):
        return
    with suppress(Timeout), FileLock(folder / _LOCK, blocking=False):
        files = _by_age(folder)
        held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if held <= limit:
                return
            if path == keep:
                continue
            with unused(path) as free:
                if free:
                    path.unlink(missing_ok=True)
                    held -= size


def _by_age(folder: Path) -> list[tuple[float, int, Path]]:
    """Time of last use, size and path of each file, the oldest first; also what writers that died left behind."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            facts = path.stat()
            if path.is_file() and path.name != _LOCK:
                found.append((facts.st_mtime, facts.st_size, path))
    return sorted(found)


__all__ = ["KERNELS_BYTES", "KernelFile", "kernels_path", "prune"]
