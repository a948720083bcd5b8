"""Many processes that want one engine, and processes that are killed at any moment."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from accel.errors import EngineStoreError
from accel.store import EngineStore, lock
from accel.store.lock import LocalLock
from tests.store.samples import Files, Place, key, start

BUILD = """
import json, sys, time
from pathlib import Path
from accel.store import EngineStore
from tests.store.samples import key
url, cache, options, log = sys.argv[1:]
store = EngineStore(url, cache=Path(cache), options=json.loads(options))
def build():
    with open(log, "a") as stream:
        stream.write("built\\n")
    time.sleep(0.5)
    return b"plan" * 250_000, {}
print("ready", flush=True)
sys.stdin.readline()
waits = []
engine = store.get_or_build(key(), build, on_wait=waits.append)
assert bytes(engine.plan()) == b"plan" * 250_000
print("built" if engine.built else "waited" if waits else "found", flush=True)
"""

# Puts two engines in turn, so that it is killed while it makes, replaces and clears away.
WRITE = """
import sys
from accel.store import EngineStore, folder
from tests.store.samples import key
folder.CHUNK = 1 << 16
store = EngineStore(sys.argv[1])
print("ready", flush=True)
number = int(sys.argv[2])
while True:
    number += 1
    store.put(key(capacity=number % 2), bytes([number % 251]) * 1_000_000, {"number": number})
"""

# Dies at the n-th of the calls that change the disk.
DIE = """
import os, signal, sys
from accel.store import EngineStore, folder
from tests.store.samples import key
folder.CHUNK = 1 << 18
left = int(sys.argv[2])
def deadly(name):
    real = getattr(os, name)
    def call(*arguments, **options):
        global left
        if name == "write" and arguments[0] < 3:
            return real(*arguments)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)
for name in ("write", "fsync", "replace", "open", "unlink", "mkdir"):
    deadly(name)
EngineStore(sys.argv[1]).put(key(), b"new" * 400_000, {})
"""

STUCK = """
import json, os, signal, sys
from pathlib import Path
from accel.store import EngineStore
from tests.store.samples import key
store = EngineStore(sys.argv[1], cache=Path(sys.argv[2]), options=json.loads(sys.argv[3]))
store.get_or_build(key(), lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def race(place: Place, caches: list[Path], log: Path) -> list[str]:
    """What each process says; all start at the same moment."""
    processes = [start(BUILD, place.url, cache, json.dumps(place.options), log) for cache in caches]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0].strip() for process in processes]


def test_sixteen_processes_build_once(local: Place, tmp_path: Path) -> None:
    said = race(local, [local.cache] * 16, tmp_path / "log")
    assert said.count("built") == 1 and len(said) == 16 and set(said) <= {"built", "waited", "found"}
    assert (tmp_path / "log").read_text() == "built\n"


def test_processes_of_two_machines_build_once_in_an_object_store(bucket: Place, tmp_path: Path) -> None:
    """Two machines differ in their cache folder, and with it in their locks."""
    said = race(bucket, [bucket.cache, tmp_path / "second"] * 2, tmp_path / "log")
    assert said.count("built") == 1 and len(said) == 4 and set(said) <= {"built", "waited", "found"}
    assert Files(bucket).named(".lock") == []


def test_sixteen_threads_build_once(place: Place) -> None:
    built, engines = [], []

    def build() -> tuple[bytes, dict[str, Any]]:
        built.append(1)
        time.sleep(0.1)
        return b"plan", {}

    def want() -> None:
        engines.append(bytes(place.open().get_or_build(key(), build).plan()))

    threads = [threading.Thread(target=want) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and engines == [b"plan"] * 16


def test_waiting_is_told_and_ends(local: Place) -> None:
    store, waited = local.open(), list[float]()
    held = store._folder.lock(f"{key().identity}/{key().digest}")
    assert held.try_acquire()
    with pytest.raises(EngineStoreError, match="held the lock on this engine for .* s"):
        store.get_or_build(key(), lambda: (b"p", {}), on_wait=waited.append, timeout=0.3)
    assert waited == sorted(waited) and waited[-1] <= 0.3
    held.release()
    assert store.get_or_build(key(), lambda: (b"p", {}), timeout=0.3).built


def check_consistent(store: EngineStore) -> None:
    """No entry is bad, and each holds the plan that its facts tell of."""
    assert [entry.problem for entry in store.verify() if entry.problem] == []
    for capacity in (0, 1):
        with_engine = store.get(key(capacity=capacity))
        if with_engine is not None:
            with with_engine as engine:
                number = engine.manifest.facts["number"]
                assert number % 2 == capacity
                assert engine.plan() == bytes([number % 251]) * 1_000_000


def test_a_writer_killed_at_random_moments(local: Place) -> None:
    store, moments = local.open(), random.Random(3)
    numbers: list[int] = []
    for _ in range(20):
        process = start(WRITE, local.url, numbers[-1] if numbers else 0)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.06))
        process.kill()
        process.communicate()
        check_consistent(store)
        numbers.append(max((entry.manifest.facts["number"] for entry in store.entries() if entry.manifest), default=0))
    assert numbers == sorted(numbers) and numbers[-1] >= 5  # it was killed at work, and what stood stayed
    for capacity in (0, 1):
        assert store.get_or_build(key(capacity=capacity), lambda: (b"n", {})).manifest.facts
    store.put(key(capacity=2), b"next")
    assert list(Path(local.url).rglob(".tmp-*")) == [] and len(Files(local).named(".plan")) == 3


@pytest.mark.parametrize("replaced", [False, True])
def test_a_writer_killed_at_each_of_its_steps(local: Place, replaced: bool) -> None:
    store = local.open()
    expected, seen = {b"old" * 400_000 if replaced else None, b"new" * 400_000}, set()
    for step in range(1, 40):
        store.remove(key().digest)
        if replaced:
            store.put(key(), b"old" * 400_000)
        process = start(DIE, local.url, step)
        process.communicate()
        assert [entry.problem for entry in store.verify() if entry.problem] == []
        with_engine = store.get(key())
        seen.add(bytes(with_engine.plan()) if with_engine else None)
        if with_engine is not None:
            with_engine.close()
        if process.returncode == 0:
            break
        assert store.get_or_build(key(), lambda: (b"next", {})).plan()
    assert process.returncode == 0 and step > 10 and seen == expected
    store.put(key(capacity=2), b"next")
    assert list(Path(local.url).rglob(".tmp-*")) == [] and len(Files(local).named(".plan")) == 2


class Killed(BaseException):
    """Nothing can catch it but the test."""


@pytest.mark.parametrize("replaced", [False, True])
def test_a_writer_to_an_object_store_killed_at_each_request(
    memory: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.0)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    seen = set()
    for step in range(1, 60):
        store = memory.open(cache=tmp_path / f"healthy{step}")
        store.remove(key().digest)
        if replaced:
            store.put(key(), b"old")
        done = write_and_die(memory.open(cache=tmp_path / f"dying{step}"), step)
        assert [entry.problem for entry in store.verify() if entry.problem] == []
        engine = store.get(key())
        seen.add(bytes(engine.plan()) if engine else None)
        del engine
        if done:
            break
        assert store.get_or_build(key(), lambda: (b"next", {})).plan() in (b"old", b"new", b"next")
    assert done and step > 5 and seen == {b"old" if replaced else None, b"new"}


def write_and_die(store: EngineStore, step: int) -> bool:
    """Puts an engine; from its ``step``-th request on, none gets through. True if it needed fewer."""
    folder: Any = store._folder
    left = step

    class Dying:
        def __getattr__(self, name: str) -> Any:
            real = getattr(fs, name)

            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Killed
                return real(*arguments, **options)

            return call

    process, fs, root = folder._opened
    folder._opened = process, Dying(), root
    try:
        store.put(key(), b"new")
    except Killed:
        return False
    return True


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_a_lock_left_by_a_dead_process(request: pytest.FixtureRequest, kind: str) -> None:
    place: Place = request.getfixturevalue(kind)
    process = start(STUCK, place.url, place.cache, json.dumps(place.options))
    process.communicate()
    assert process.returncode < 0
    started = time.monotonic()
    assert place.open().get_or_build(key(), lambda: (b"p", {})).built  # same machine: known to be dead
    assert time.monotonic() - started < 5


def test_lock_objects_of_dead_and_living_machines(
    memory: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 1.0)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    stem = f"{key().identity}/{key().digest}"
    first, second = (memory.open(cache=tmp_path / name)._folder for name in "ab")
    alive, other = first.lock(stem), second.lock(stem)
    assert alive.try_acquire()
    ends = time.monotonic() + 2.0
    while time.monotonic() < ends:  # it beats, so it keeps the lock
        assert not other.try_acquire()
        time.sleep(0.05)
    alive.release()
    assert other.try_acquire()
    other.release()
    assert Files(memory).named(".lock") == []
    for junk in (b'{"owner": "x", "place": "y"}', b"junk", b""):
        second.write(f"{stem}.lock", junk)
        started = time.monotonic()
        with lock.held(alive, None, 10, "here"):
            assert time.monotonic() - started > 0.9
    assert Files(memory).named(".lock") == []


def test_a_lock_that_was_taken_over_is_not_given_back_by_its_loser(
    memory: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    stem = f"{key().identity}/{key().digest}"
    slow, fast = (memory.open(cache=tmp_path / name)._folder.lock(stem) for name in "ab")
    assert slow.try_acquire()  # and beats every ten seconds only
    assert not fast.try_acquire()
    time.sleep(0.2)
    assert fast.try_acquire()
    slow.release()
    assert len(Files(memory).named(".lock")) == 1
    fast.release()
    assert Files(memory).named(".lock") == []


def test_a_local_lock_is_one_for_all(tmp_path: Path, local: Place) -> None:
    folder: Any = local.open()._folder
    one, two = (folder.lock(f"{'a' * 64}/{'b' * 64}") for _ in range(2))
    assert isinstance(one, LocalLock)
    assert one.try_acquire() and not two.try_acquire()
    one.release()
    assert two.try_acquire()
    two.release()
