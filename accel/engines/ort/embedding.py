"""Rows of an embedding table, read from the weight file as they are needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from accel.errors import BundleError, EngineError
from accel.manifest import ParameterEntry

RECENT_BYTES = 4 << 20  # of rows that are kept


class EmbeddingRows:
    """An embedding table that stays in its file; rows read lately are kept. For one thread at a time.

    Args:
        path: The weight file; it stays open.
        entry: Where the table lies in it, float32 [V, H].

    Raises:
        BundleError: The parameter is no table of float32, or its file cannot be opened.
    """

    def __init__(self, path: Path, entry: ParameterEntry) -> None:
        if entry.dtype != "float32" or len(entry.shape) != 2:
            what = f"The embedding is {entry.dtype} {list(entry.shape)}, not a float32 table"
            raise BundleError(what, where=path.name, remedy="Export the model again")
        self.count, self.width = entry.shape
        self._start, self._size = entry.offset, 4 * self.width
        self._recent: dict[int, bytes] = {}  # text repeats itself, and a call to the system costs ten times a copy
        self._most = max(1, RECENT_BYTES // self._size)
        try:
            self._stream = path.open("rb", buffering=0)
            self._file = self._stream.fileno()
        except OSError as error:
            what = f"Cannot open the weights: {error.strerror}"
            raise BundleError(what, where=str(path), remedy="Check the file's permissions") from error

    def read(self, ids: NDArray[np.int64], target: memoryview) -> None:
        """Writes the rows of ``ids`` [T] into ``target``, the bytes of a contiguous float32 array [T, H].

        Raises:
            EngineError: An id outside the table, or reading failed.
        """
        size = self._size
        for index, row in enumerate(ids.tolist()):
            self.read_row(row, target[index * size : (index + 1) * size])

    def read_row(self, row: int, target: memoryview) -> None:
        """Writes one row's bytes. Raises as ``read``."""
        kept = self._recent.get(row)
        if kept is not None:
            target[:] = kept
            return
        if not 0 <= row < self.count:
            raise EngineError(f"id {row} is outside the embedding of {self.count} rows", where="decoder step")
        try:
            got = _read_at(self._file, (target,), self._start + row * self._size)
        except OSError as error:
            raise EngineError(f"reading the embedding failed: {error}", where="decoder step") from error
        if got != self._size:
            what = "the weight file has become shorter since it was opened"
            raise EngineError(what, where="decoder step", remedy="Load the bundle again")
        if len(self._recent) >= self._most:
            self._recent.clear()
        self._recent[row] = bytes(target)

    def close(self) -> None:
        """Closes the file. Safe to call twice."""
        self._stream.close()


def _seek_and_read(file: int, targets: tuple[memoryview], offset: int) -> int:
    """``os.preadv`` for systems without it."""
    os.lseek(file, offset, os.SEEK_SET)
    data = os.read(file, len(targets[0]))
    targets[0][: len(data)] = data
    return len(data)


# One call to the system where there is such a one: beside a run each costs 10 us, caches are cold.
_read_at = getattr(os, "preadv", _seek_and_read)


__all__ = ["EmbeddingRows"]
