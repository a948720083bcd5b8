"""Full and read-only disks: an error in words, a store as it was, and hits all the same."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from accel.errors import StorageError
from accel.store import EngineStore
from tests.full_disk import file_size_limit
from tests.store.samples import Files, Place, key

PLAN = b"p" * 100_000
LARGE = b"q" * (2 << 20)


def check_unchanged(place: Place, plans: int) -> None:
    store = place.open()
    assert [entry.problem for entry in store.verify()] == [None] * plans
    assert len(Files(place).named(".plan")) == plans
    for root in (Path(place.url), place.cache):
        assert list(root.rglob(".tmp-*")) == []


def test_a_full_disk(place: Place) -> None:
    store = place.open()
    store.put(key(), PLAN)
    with file_size_limit(1 << 20), pytest.raises(StorageError, match="larger than.*allows"):
        store.put(key(), LARGE)
    with file_size_limit(1 << 20), pytest.raises(StorageError, match="larger than.*allows"):
        store.get_or_build(key(capacity=1), lambda: (LARGE, {}))
    check_unchanged(place, 1)
    engine = store.get(key())
    assert engine is not None and engine.plan() == PLAN
    assert store.get_or_build(key(capacity=1), lambda: (LARGE, {})).built  # there is room again


def test_a_disk_that_fills_up_before_the_manifest(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = local.open()
    store.put(key(), PLAN)
    calls, real = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == 3:  # plan, its folder, manifest
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        store.put(key(), LARGE)
    monkeypatch.undo()
    engine = store.get(key())
    assert engine is not None and engine.plan() == PLAN
    engine.close()
    store.prune()  # the plan without a manifest goes
    check_unchanged(local, 1)


def test_no_room_for_the_copy_of_a_remote_plan(bucket: Place, tmp_path: Path) -> None:
    bucket.open().put(key(), LARGE)
    there = bucket.open(cache=tmp_path / "small")
    with file_size_limit(1 << 20), pytest.raises(StorageError, match="larger than.*allows") as info:
        there.get(key())
    assert info.value.where == str(tmp_path / "small")
    assert list((tmp_path / "small").rglob("*.plan")) == [] == list((tmp_path / "small").rglob(".tmp-*"))
    engine = there.get(key())
    assert engine is not None and engine.plan() == LARGE


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root, whom modes do not bind, is another user meanwhile."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Makes a tree read-only; for root by being somebody else meanwhile."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with as_somebody_else():
            yield
    finally:
        for path in paths:
            if path.exists():
                path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user may enter, unlike ``tmp_path``."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("locks", [True, False])
def test_a_read_only_directory_serves_hits(open_to_all: Path, locks: bool) -> None:
    root = open_to_all / "store"
    store = EngineStore(root, max_bytes=10)
    store.put(key(), PLAN)
    if not locks:
        shutil.rmtree(root / ".locks")
    with without_rights(open_to_all):
        with store.get_or_build(key(), never) as engine:
            assert engine.plan() == PLAN
        assert len(store.find(key().identity)) == len(store.verify()) == 1
        for write in (
            lambda: store.put(key(capacity=1), PLAN),
            lambda: store.get_or_build(key(capacity=1), never),
            lambda: store.remove(key().digest),
            lambda: store.prune(0),
            lambda: EngineStore(open_to_all / "new").put(key(), PLAN),
        ):
            with pytest.raises(StorageError, match="no permission to write") as info:
                write()
            assert "Give a store (--store, ACCEL_STORE) that you may write to" in str(info.value.remedy)
    check_unchanged(Place(str(root), open_to_all / "cache"), 1)


def never() -> tuple[bytes, dict[str, Any]]:
    raise AssertionError("built although nothing can be kept")


def test_a_read_only_object_store_serves_hits(memory: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.open().put(key(), PLAN)
    reader = memory.open(cache=tmp_path / "reader")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError("AccessDenied")

    fs = type(Files(memory).fs)
    for name in ("pipe_file", "put_file", "rm_file"):
        monkeypatch.setattr(fs, name, refuse)
    engine = reader.get_or_build(key(), never)
    assert engine.plan() == PLAN
    engine.close()
    with pytest.raises(StorageError, match="no permission to write"):
        reader.put(key(), PLAN)
    with pytest.raises(StorageError, match="no permission to write"):
        reader.prune(0)


def test_a_place_that_may_not_be_looked_into(open_to_all: Path) -> None:
    """Said in words too, before any work."""
    (open_to_all / "closed" / "store").mkdir(parents=True)
    store = EngineStore(open_to_all / "closed" / "store" / "engines")
    (open_to_all / "closed").chmod(0o600)
    with as_somebody_else(), pytest.raises(StorageError, match="no permission"):
        store.check_writable()
    (open_to_all / "closed").chmod(0o700)
