"""Rows of an embedding table, read from the weight file as they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from accel.errors import BundleError, EngineError
from accel.manifest import ParameterEntry


class EmbeddingRows:
    """An embedding table that stays in its file. For one thread at a time.

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
        try:
            self._stream = path.open("rb", buffering=0)
        except OSError as error:
            what = f"Cannot open the weights: {error.strerror}"
            raise BundleError(what, where=str(path), remedy="Check the file's permissions") from error

    def read(self, ids: NDArray[np.int64], target: memoryview) -> None:
        """Writes the rows of ``ids`` [T] into ``target``, the bytes of a contiguous float32 array [T, H].

        Raises:
            EngineError: An id outside the table, or reading failed.
        """
        size, stream = self._size, self._stream
        for index, row in enumerate(ids.tolist()):
            if not 0 <= row < self.count:
                raise EngineError(f"id {row} is outside the embedding of {self.count} rows", where="decoder step")
            try:
                stream.seek(self._start + row * size)
                got = stream.readinto(target[index * size : (index + 1) * size])
            except OSError as error:
                raise EngineError(f"reading the embedding failed: {error}", where="decoder step") from error
            if got != size:
                what = "the weight file has become shorter since it was opened"
                raise EngineError(what, where="decoder step", remedy="Load the bundle again")

    def close(self) -> None:
        """Closes the file. Safe to call twice."""
        self._stream.close()


__all__ = ["EmbeddingRows"]
