"""What a store keeps it gives back, and what was altered it refuses: in a directory, in memory, and in S3."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel.errors import DependencyError, EngineStoreError, InputError, RefusedEngineError, StorageError
from accel.store import EngineStore, HmacKey, remote
from accel.store.folder import LocalFolder, Plan
from accel.store.manifest import FIELDS, decode
from tests.store.samples import Files, Place, flip, key
from tests.store.test_signing import ed25519_pair

PLAN = bytes(range(256)) * 5000  # more than one chunk
SIGNER, STRANGER = HmacKey(b"s" * 32), HmacKey(b"t" * 32)


def never() -> tuple[bytes, dict[str, Any]]:
    raise AssertionError("built although the store has it")


def fill(place: Place, **settings: Any) -> None:
    place.open(**settings).put(key(), PLAN, {"layers": 2})


def fresh(place: Place) -> Place:
    """The same store, seen from a machine that has no copies."""
    return Place(place.url, place.cache.with_name("other"), place.options)


def test_what_is_put_is_found(place: Place) -> None:
    store = place.open()
    assert store.get(key()) is None and store.entries() == [] and store.find(key().identity) == []
    before = time.time()
    manifest = store.put(key(), PLAN, {"layers": 2, "shape": (1, 2), "ms": 0.1})
    for reader in (place.open(), fresh(place).open()):
        with reader.get(key()) or pytest.fail("not there") as engine:
            assert engine.plan() == PLAN == engine.path.read_bytes()
            assert engine.manifest == manifest and not engine.built
        assert reader.find(key().identity) == [manifest]
    assert manifest.facts == {"layers": 2, "shape": [1, 2], "ms": 0.1}
    assert manifest.key == key() and manifest.versions["rtx"] == "1.7.1.116"
    assert before <= manifest.created <= time.time()
    assert store.get(key(capacity=1)) is None


def test_a_plan_may_be_a_view_or_a_file(place: Place, tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(PLAN)
    store = place.open()
    plans: list[Plan] = [memoryview(PLAN), bytearray(PLAN), tmp_path / "plan"]
    for i, plan in enumerate(plans):
        store.put(key(capacity=i), plan)
        engine = store.get(key(capacity=i))
        assert engine is not None and engine.plan() == PLAN
    with pytest.raises(EngineStoreError, match="built plan cannot be read"):
        store.put(key(), tmp_path / "none")
    with pytest.raises(InputError, match="plan is empty"):
        store.put(key(), b"")
    with pytest.raises(InputError, match="facts are not plain JSON"):
        store.put(key(), PLAN, {"nan": float("nan")})
    assert store.get(key()) is None and len(store.verify()) == 3


def test_a_hit_builds_nothing_and_a_miss_builds_once(place: Place) -> None:
    engine = place.open().get_or_build(key(), lambda: (PLAN, {"n": 1}))
    assert engine.built and engine.plan() == PLAN
    engine = place.open().get_or_build(key(), never)
    assert not engine.built and engine.manifest.facts == {"n": 1}


def test_a_build_that_fails_leaves_nothing(place: Place) -> None:
    store = place.open()
    with pytest.raises(ZeroDivisionError):
        store.get_or_build(key(), lambda: (PLAN, {"n": 1 / 0}))
    assert store.entries() == []
    with store.get_or_build(key(), lambda: (PLAN, {})) as engine:  # the lock is free again
        assert engine.built


def test_replacing_leaves_readers_alone(place: Place) -> None:
    store = place.open()
    store.put(key(), PLAN)
    with store.get(key()) or pytest.fail("not there") as old:
        view = old.plan()
        store.put(key(), b"new")
        assert view == PLAN
        assert bytes((store.get(key()) or pytest.fail("not there")).plan()) == b"new"
    assert len(Files(place).named(".plan")) == 1
    assert [entry.problem for entry in store.verify()] == [None]


def test_find_lists_one_folder(place: Place) -> None:
    store = place.open()
    for changes in ({"capacity": 1}, {"sm": ("sm120",)}, {"weights": "0" * 64}):
        store.put(key(**changes), PLAN)
    assert {m.key.sm for m in store.find(key().identity)} == {("sm86", "sm89"), ("sm120",)}
    assert len(store.entries()) == 3


def edit(**changes: Any) -> Callable[[bytes], bytes]:
    """Changes fields as somebody would who means to, or an older accel, whose manifests have no checksum."""

    def change(content: bytes) -> bytes:
        data = {**json.loads(content), **changes}
        del data["checksum"]
        return json.dumps(data).encode()

    return change


def edit_key(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: edit(key={**json.loads(content)["key"], **changes})(content)


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated plan": (".plan", lambda content: content[:-1], "truncated: 1,279,999 bytes instead of 1,280,000"),
    "empty plan": (".plan", lambda content: b"", "truncated: 0 bytes"),
    "longer plan": (".plan", lambda content: content + b"\0", "longer than it was"),
    "flipped bit": (".plan", flip, "altered: its sha256 differs"),
    "truncated manifest": (".json", lambda content: content[:-9], "not valid JSON"),
    "empty manifest": (".json", lambda content: b"", "not valid JSON"),
    "deep manifest": (".json", lambda content: b"[" * 100_000, "not valid JSON"),
    "endless number": (".json", lambda c: c.replace(b'"layers": 2', b'"layers": 1e999'), "not valid JSON"),
    "altered facts": (".json", lambda c: c.replace(b'"layers": 2', b'"layers": 3'), "altered: its checksum differs"),
    "altered time": (".json", lambda c: c.replace(b'"created": ', b'"created": 1'), "altered: its checksum differs"),
    "doubled key": (".json", lambda c: c.replace(b"{", b'{"size": 1,', 1), "stands twice"),
    "no mapping": (".json", lambda content: b"[]", "no mapping"),
    "newer schema": (".json", edit(schema_version=2, more=1), "schema version 2"),
    "unknown field": (".json", edit(more=1), "does not know: more"),
    "missing field": (".json", lambda c: json.dumps({k: v for k, v in json.loads(c).items() if k != "size"}).encode(),
                      "lacks .*: size"),
    "negative size": (".json", edit(size=-1), "malformed"),
    "another key": (".json", edit_key(optimization_level=5), "that of another engine"),
    "malformed key": (".json", edit_key(graph="../../etc"), "no sha256"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_refused_then_built_again(local: Place, name: str) -> None:
    check_damage(local, *DAMAGE[name])


@pytest.mark.parametrize("kind", ["memory", "bucket"])
@pytest.mark.parametrize("name", ["truncated plan", "flipped bit", "truncated manifest"])
def test_damage_in_object_stores(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    check_damage(request.getfixturevalue(kind), *DAMAGE[name])


def check_damage(place: Place, ending: str, change: Callable[[bytes], bytes], match: str) -> None:
    fill(place)
    Files(place).alter(ending, change)
    there = fresh(place).open()
    with pytest.raises(RefusedEngineError, match=match) as info:
        there.get(key())
    assert info.value.where and info.value.remedy
    (entry,) = there.verify()
    assert entry.problem is not None
    assert [e.problem is None for e in there.entries()] == [ending == ".plan"]
    assert len(there.find(key().identity)) == (ending == ".plan")
    engine = there.get_or_build(key(), lambda: (b"good", {}))
    assert engine.built and engine.plan() == b"good"
    assert [entry.problem for entry in there.verify()] == [None]


def test_a_plan_that_is_gone(place: Place) -> None:
    fill(place)
    Files(place).remove(".plan")
    there = fresh(place).open()
    with pytest.raises(RefusedEngineError, match="plan is missing"):
        there.get(key())
    assert "missing" in str(there.verify()[0].problem)
    assert there.get_or_build(key(), lambda: (PLAN, {})).built


def test_a_damaged_entry_can_be_removed(place: Place) -> None:
    fill(place)
    Files(place).alter(".json", lambda content: b"junk")
    store = place.open()
    assert store.remove(key().digest) and not store.remove(key().digest)
    assert store.entries() == [] and Files(place).named(".plan") == []


def test_a_damaged_copy_is_fetched_again(bucket: Place) -> None:
    fill(bucket)
    (copy,) = bucket.cache.rglob("*.plan")
    copy.write_bytes(flip(PLAN))
    engine = bucket.open().get(key())
    assert engine is not None and engine.plan() == PLAN


def test_an_object_cut_in_transit_is_not_served(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(bucket)
    real = remote.RemoteFolder._download

    def cut(folder: remote.RemoteFolder, name: str, size: int, sha256: str) -> Any:
        get = folder._fs.get_file
        monkeypatch.setattr(folder._fs, "get_file", lambda source, target: Path(target).write_bytes(PLAN[:-1]))
        try:
            return real(folder, name, size, sha256)
        finally:
            monkeypatch.setattr(folder._fs, "get_file", get)

    monkeypatch.setattr(remote.RemoteFolder, "_download", cut)
    with pytest.raises(RefusedEngineError, match="truncated"):
        fresh(bucket).open().get(key())
    monkeypatch.setattr(remote.RemoteFolder, "_download", real)
    engine = fresh(bucket).open().get(key())
    assert engine is not None and engine.plan() == PLAN


def test_however_deep_a_manifest_is_it_is_refused() -> None:
    """At some depth it can just be read, and not be written again for its checksum."""
    rest = dict.fromkeys(FIELDS - {"schema_version", "facts"})
    for depth in range(sys.getrecursionlimit() - 250, sys.getrecursionlimit() + 10):
        head = json.dumps({"schema_version": 1, "checksum": "x", **rest})
        with pytest.raises(RefusedEngineError):
            decode(f'{head[:-1]}, "facts": {"[" * depth}{"]" * depth}}}'.encode(), "here")


def test_a_manifest_without_a_checksum_is_read(local: Place) -> None:
    """As an older accel wrote it."""
    fill(local)
    Files(local).alter(".json", edit())
    engine = local.open().get(key())
    assert engine is not None and engine.plan() == PLAN
    assert [entry.problem for entry in local.open().verify()] == [None]


def test_signed_engines(place: Place) -> None:
    fill(place, signer=SIGNER)
    with place.open(verifier=SIGNER).get(key()) or pytest.fail("not there") as engine:
        assert engine.plan() == PLAN
        with engine.path.open("r+b") as stream:  # after the check, by somebody who may write there
            stream.write(b"evil")
        with pytest.raises(RefusedEngineError, match="altered"):
            engine.plan()


def test_unsigned_and_strange_engines_are_refused(place: Place) -> None:
    fill(place)
    with pytest.raises(RefusedEngineError, match="not signed"):
        place.open(verifier=SIGNER).get(key())
    with pytest.raises(EngineStoreError, match="no key to sign"):
        place.open(verifier=SIGNER).get_or_build(key(), never)
    with pytest.raises(EngineStoreError, match="no key to sign"):
        place.open(verifier=SIGNER).put(key(), PLAN)
    assert place.open(verifier=SIGNER).find(key().identity) == []
    assert place.open(signer=SIGNER).get_or_build(key(), lambda: (PLAN, {})).built
    with pytest.raises(RefusedEngineError, match="this store trusts"):
        place.open(verifier=STRANGER).get(key())
    assert not place.open(verifier=SIGNER, signer=STRANGER).get_or_build(key(), never).built
    engine = place.open().get(key())  # who asks for no signature gets it all the same
    assert engine is not None and engine.plan() == PLAN


def test_servers_need_the_public_key_only(local: Place, tmp_path: Path) -> None:
    builder, server = ed25519_pair(tmp_path)
    _, stranger = ed25519_pair(tmp_path)
    fill(local, signer=builder)
    engine = local.open(verifier=server).get_or_build(key(), never)
    assert engine.plan() == PLAN
    with pytest.raises(RefusedEngineError, match="this store trusts"):
        local.open(verifier=stranger).get(key())


@pytest.mark.parametrize(
    "change", [edit(created=1.0), edit(facts={"layers": 3}), edit(versions={}), edit(signature=None), edit(size=3)]
)
def test_an_altered_manifest_does_not_carry_its_signature(local: Place, change: Callable[[bytes], bytes]) -> None:
    fill(local, signer=SIGNER)
    Files(local).alter(".json", change)
    with pytest.raises(RefusedEngineError, match="signature does not match|not signed"):
        local.open(verifier=SIGNER).get(key())


def test_a_plan_swapped_with_its_hash_does_not_carry_the_signature(local: Place) -> None:
    fill(local, signer=SIGNER)
    (signed,) = [json.loads(Files(local).fs.cat_file(path)) for path in Files(local).named(".json")]
    local.open().put(key(), b"evil code")
    Files(local).alter(".json", edit(signature=signed["signature"]))
    with pytest.raises(RefusedEngineError, match="does not match"):
        local.open(verifier=SIGNER).get(key())


def test_an_engine_under_anothers_name_is_refused(local: Place) -> None:
    store = local.open(signer=SIGNER)
    store.put(key(), PLAN)
    store.put(key(capacity=1), b"other")
    one, two = (Path(local.url) / key(**c).identity / f"{key(**c).digest}.json" for c in ({}, {"capacity": 1}))
    one.write_bytes(two.read_bytes())
    with pytest.raises(RefusedEngineError, match="that of another engine"):
        store.get(key())


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EngineStore(f"file://{tmp_path}/a").put(key(), PLAN)
    assert EngineStore(tmp_path / "a").get(key()) is not None
    with pytest.raises(EngineStoreError, match="cannot be opened"):
        EngineStore("nonsense://x", cache=tmp_path)
    with pytest.raises(InputError, match="-1 bytes"):
        EngineStore(tmp_path, max_bytes=-1)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DependencyError, match=r"pip install 'accelrt\[s3\]'"):
        EngineStore("s3://bucket/x", cache=tmp_path)


def test_a_store_out_of_reach(tmp_path: Path, s3: dict[str, Any]) -> None:
    gone = {**s3, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}
    gone["config_kwargs"] = {"retries": {"max_attempts": 1}, "connect_timeout": 1}
    with pytest.raises(EngineStoreError, match="cannot be read.*(?s:.*)Check the address"):
        EngineStore("s3://bucket/x", cache=tmp_path, options=gone).get(key())
    with pytest.raises((EngineStoreError, StorageError)):
        EngineStore("s3://no-such-bucket/x", cache=tmp_path, options=s3).put(key(), PLAN)
    (tmp_path / "file").touch()
    with pytest.raises(EngineStoreError, match="cannot be read"):
        EngineStore(tmp_path / "file").get(key())


def test_a_directory_needs_no_package(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("fsspec", "s3fs", "cryptography"):
        monkeypatch.setitem(sys.modules, package, None)
    store = local.open(signer=SIGNER)
    assert store.get_or_build(key(), lambda: (PLAN, {})).plan() == PLAN
    assert isinstance(store._folder, LocalFolder)
