"""Embedding rows read from a file, and the errors of a file or a table that is not what it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from accel.engines.ort import embedding as module
from accel.engines.ort.embedding import EmbeddingRows
from accel.errors import BundleError, EngineError
from accel.manifest import ParameterEntry

TABLE = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float32)
OFFSET = 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "fp32.weights"
    file.write_bytes(b"\0" * OFFSET + TABLE.tobytes() + b"\1" * 100)
    return file


@contextmanager
def open_rows(path: Path) -> Iterator[EmbeddingRows]:
    rows = EmbeddingRows(path, ParameterEntry(path.name, OFFSET, TABLE.shape, "float32"))
    yield rows
    rows.close()
    rows.close()


def test_rows_in_any_order_and_twice(path: Path) -> None:
    ids, out = np.array([10, 0, 3, 3]), np.full((4, 6), np.nan, np.float32)
    with open_rows(path) as rows:
        rows.read(ids, out.data.cast("B"))
    np.testing.assert_array_equal(out, TABLE[ids])


def test_rows_read_lately_are_kept_up_to_a_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = module._read_at
    monkeypatch.setattr(module, "_read_at", lambda *given: reads.append(given[2]) or real(*given))
    monkeypatch.setattr(module, "RECENT_BYTES", 3 * TABLE[0].nbytes)
    ids, out = np.array([4, 5, 4, 6, 5, 7, 7, 4]), np.empty((8, 6), np.float32)
    with open_rows(path) as rows:
        rows.read(ids, out.data.cast("B"))
    np.testing.assert_array_equal(out, TABLE[ids])
    places = [(offset - OFFSET) // TABLE[0].nbytes for offset in reads]
    assert places == [4, 5, 6, 7, 4]  # the fourth row takes the place of the first three


@pytest.mark.parametrize("bad", [-1, 11])
def test_id_outside_the_table(path: Path, bad: int) -> None:
    with open_rows(path) as rows, pytest.raises(EngineError, match=f"id {bad} is outside the embedding of 11 rows"):
        rows.read(np.array([0, bad]), memoryview(bytearray(48)))


def test_file_that_became_shorter(path: Path) -> None:
    with open_rows(path) as rows, pytest.raises(EngineError, match="shorter since it was opened"):
        os.truncate(path, OFFSET + 10)
        rows.read(np.array([5]), memoryview(bytearray(24)))


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Cannot open the weights"), open_rows(tmp_path / "absent.weights"):
        pass


@pytest.mark.parametrize("entry", [(OFFSET, (66,), "float32"), (OFFSET, (11, 6), "bfloat16")])
def test_no_table(path: Path, entry: tuple) -> None:  # type: ignore[type-arg]
    with pytest.raises(BundleError, match="not a float32 table"):
        EmbeddingRows(path, ParameterEntry(path.name, *entry))


def test_reading_without_preadv(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read_at", module._seek_and_read)
    ids, out = np.array([7, 2]), np.zeros((2, 6), np.float32)
    with open_rows(path) as rows:
        rows.read(ids, out.data.cast("B"))
    np.testing.assert_array_equal(out, TABLE[ids])
