"""Hashes are computed once per state of a file, and never served for another."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from accel.errors import EngineStoreError
from accel.store import hashing
from accel.store.hashing import HashCache, cache_folder
from tests.store.samples import start


@pytest.fixture
def cache(tmp_path: Path) -> HashCache:
    return HashCache(tmp_path / "hashes")


def settled(path: Path, content: bytes = b"weights") -> Path:
    """A file old enough for its hash to be kept."""
    path.write_bytes(content)
    time.sleep(2 * hashing.FRESH_SECONDS)
    return path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    found: list[Path] = []
    real = hashing._hash

    def spy(path: Path) -> str:
        found.append(path)
        return real(path)

    monkeypatch.setattr(hashing, "_hash", spy)
    return found


def test_the_cache_answers_until_the_file_changes(tmp_path: Path, cache: HashCache, computed: list[Path]) -> None:
    path = settled(tmp_path / "w")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [cache.sha256(path), HashCache(cache.folder).sha256(path)] == [expected] * 2
    assert len(computed) == 1
    times = path.stat()
    path.write_bytes(b"WEIGHTS")  # as long as before, and its mtime set back
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.sha256(path) == hashlib.sha256(b"WEIGHTS").hexdigest()
    other = settled(tmp_path / "other", b"another")
    os.replace(other, path)
    assert cache.sha256(path) == hashlib.sha256(b"another").hexdigest()


def test_the_hash_of_a_file_just_written_is_not_kept(tmp_path: Path, cache: HashCache, computed: list[Path]) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"1")
    cache.sha256(path)
    cache.sha256(path)
    assert len(computed) == 2


def test_a_gigabyte_is_fast_when_warm(tmp_path: Path, cache: HashCache, computed: list[Path]) -> None:
    path = tmp_path / "w"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    time.sleep(2 * hashing.FRESH_SECONDS)
    cold = cache.sha256(path)
    started = time.perf_counter()
    assert cache.sha256(path) == cold
    assert time.perf_counter() - started < 0.2
    assert len(computed) == 1


def test_a_file_that_changes_while_it_is_hashed(
    tmp_path: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settled(tmp_path / "w")
    real, changes = hashing._hash, [b"second", b"the third"]

    def change(path: Path) -> str:
        digest = real(path)
        if changes:
            path.write_bytes(changes.pop(0))
        return digest

    monkeypatch.setattr(hashing, "_hash", change)
    assert cache.sha256(path) == hashlib.sha256(b"the third").hexdigest()
    changes.extend(os.urandom(8 + i) for i in range(hashing.ATTEMPTS))
    with pytest.raises(EngineStoreError, match="keeps changing"):
        cache.sha256(path)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"path": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_entry_costs_one_hash(tmp_path: Path, cache: HashCache, damage: bytes, computed: list[Path]) -> None:
    path = settled(tmp_path / "w")
    digest = cache.sha256(path)
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(damage)
    assert [cache.sha256(path), cache.sha256(path)] == [digest] * 2
    assert len(computed) == 2


def test_where_nothing_can_be_kept(tmp_path: Path, computed: list[Path]) -> None:
    (tmp_path / "file").touch()
    cache, path = HashCache(tmp_path / "file" / "hashes"), settled(tmp_path / "w")
    assert cache.sha256(path) == cache.sha256(path) == hashlib.sha256(b"weights").hexdigest()
    assert len(computed) == 2


def test_many_at_once(tmp_path: Path, cache: HashCache) -> None:
    files = {f"f{i}": settled(tmp_path / f"f{i}", bytes([i])) for i in range(3)}
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(cache.combined(files))) for _ in range(8)]
    for thread in threads:
        thread.start()
    code = "import sys; from accel.store import HashCache; print(HashCache(sys.argv[1]).sha256(sys.argv[2]))"
    code = code.replace("(sys.argv[1])", "(__import__('pathlib').Path(sys.argv[1]))")
    outputs = [start(code, cache.folder, files["f1"]).communicate()[0].strip() for _ in range(2)]
    for thread in threads:
        thread.join()
    assert outputs == [hashlib.sha256(b"\1").hexdigest()] * 2
    assert len(found) == 8 and len(set(found)) == 1


def test_combined_depends_on_names_and_contents_only(tmp_path: Path, cache: HashCache) -> None:
    one, two = settled(tmp_path / "1", b"1"), settled(tmp_path / "2", b"2")
    digest = cache.combined({"a": one, "b": two})
    assert cache.combined({"b": two, "a": one}) == digest
    assert cache.combined({"a": two, "b": one}) != digest
    assert cache.combined({"a": one}) != digest


def test_a_file_that_is_not_there(tmp_path: Path, cache: HashCache) -> None:
    with pytest.raises(EngineStoreError, match="Cannot hash the file.*No such file"):
        cache.sha256(tmp_path / "none")


def test_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("ACCEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/accel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "accel"
