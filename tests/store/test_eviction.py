"""The limit on a store's size: the least recently used go, those in use stay."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from accel.errors import EngineStoreError
from accel.store import EngineStore, StoredEngine, remote
from tests.store.samples import Files, Place, key, start

PLAN = b"p" * 100_000
ROOM_FOR_TWO = 250_000

HOLD = """
import sys, time
from accel.store import EngineStore
from tests.store.samples import key
engine = EngineStore(sys.argv[1]).get(key(capacity=0))
print("open", flush=True)
sys.stdin.readline()
"""


def put(store: EngineStore, *capacities: int) -> None:
    for capacity in capacities:
        store.put(key(capacity=capacity), PLAN)
        time.sleep(0.01)  # times that differ


def use(store: EngineStore, capacity: int) -> StoredEngine:
    engine = store.get(key(capacity=capacity))
    assert engine is not None
    return engine


def kept(store: EngineStore) -> set[int | None]:
    assert all(entry.problem is None for entry in store.verify())
    return {entry.manifest.key.capacity for entry in store.entries() if entry.manifest}


def test_the_least_recently_used_goes(place: Place) -> None:
    store = place.open(max_bytes=ROOM_FOR_TWO)
    put(store, 0, 1)
    use(store, 0).close()
    time.sleep(0.01)
    put(store, 2)
    assert kept(store) == {0, 2}
    assert [entry.manifest and entry.manifest.key.capacity for entry in store.entries()] == [0, 2]
    if not place.is_local:
        assert len(list(place.cache.rglob("*.plan"))) <= 2


def test_what_is_in_use_stays(place: Place) -> None:
    store = place.open()
    put(store, 0, 1, 2)
    with use(store, 0) as engine:
        plan = engine.plan()
        assert [record.digest for record in store.prune(ROOM_FOR_TWO)] == [key(capacity=1).digest]
        assert len(store.prune(0)) == 1 and kept(store) == {0}
        with pytest.raises(EngineStoreError, match="in use"):
            store.remove(key(capacity=0).digest)
    assert len(store.prune(0)) == 1 and kept(store) == set()
    assert plan == PLAN  # what was mapped outlives its entry
    assert store.prune(0) == [] and Files(place).named(".used") == []


def test_the_engine_just_built_stays_though_it_exceeds_the_limit(place: Place) -> None:
    store = place.open(max_bytes=10)
    put(store, 0)
    assert store.get_or_build(key(capacity=1), lambda: (PLAN, {})).plan() == PLAN
    assert kept(store) == {1}


@pytest.mark.parametrize("kind", ["memory", "bucket"])
def test_copies_of_a_remote_store_are_limited_where_it_is_only_read(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place: Place = request.getfixturevalue(kind)
    put(place.open(), 0, 1, 2, 3)
    reader = place.open(cache=tmp_path / "reader", max_bytes=ROOM_FOR_TWO)
    with use(reader, 0) as engine:
        for capacity in (1, 2, 3):
            use(reader, capacity).close()
            time.sleep(0.01)
        copies = {path.name.partition("-")[0] for path in (tmp_path / "reader").rglob("*.plan")}
        assert copies == {key(capacity=0).digest, key(capacity=3).digest}  # the one in use, and the latest
        assert engine.plan() == PLAN
    assert kept(place.open()) == {0, 1, 2, 3}


def test_marks_of_other_processes_count_while_they_live(local: Place) -> None:
    store = local.open()
    put(store, 0, 1)
    process = start(HOLD, local.url)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    store.prune(0)
    assert kept(store) == {0}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store.prune(0)
    assert kept(store) == set()


def test_a_forked_child_does_not_drop_its_parents_mark(local: Place) -> None:
    store = local.open()
    put(store, 0)
    engine = use(store, 0)
    child = os.fork()
    if child == 0:
        engine.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert store.prune(0) == []
    engine.close()
    assert len(store.prune(0)) == 1


def test_leftovers_go_with_the_next_writer(local: Place) -> None:
    store = local.open()
    put(store, 0, 1)
    folder = Path(local.url) / key().identity
    (folder / ".tmp-dead").write_bytes(b"half")
    (folder / f"{key(capacity=1).digest}.json").unlink()
    put(store, 2)
    assert not (folder / ".tmp-dead").exists() and len(list(folder.glob("*.plan"))) == 2
    assert kept(store) == {0, 2}


def test_leftovers_in_an_object_store_go_once_they_are_old(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store, files = bucket.open(), Files(bucket)
    put(store, 0)
    files.remove(".json")
    store.prune()
    assert len(files.named(".plan")) == 1 and kept(store) == set()  # its writer may be about to write the manifest
    monkeypatch.setattr(remote, "LEFTOVER_SECONDS", -5.0)
    store.prune()
    assert files.named(".plan") == []


def test_times_of_use_of_entries_that_are_gone_go(bucket: Place) -> None:
    store, files = bucket.open(), Files(bucket)
    put(store, 0)
    files.remove(".json")
    files.remove(".plan")
    store.prune()
    assert files.named(".used") == []


def test_a_newer_accels_entry_is_not_swept(local: Place) -> None:
    store, files = local.open(), Files(local)
    put(store, 0)
    files.alter(".json", lambda content: content.replace(b'"schema_version": 1', b'"schema_version": 9'))
    store.prune()
    assert len(files.named(".plan")) == 1
