"""A key changes with each of its fields and with nothing else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from accel.errors import EngineStoreError, InputError
from accel.schema import to_dict
from accel.store import EngineKey, engine_identity
from accel.store.key import read_key
from tests.store.samples import GRAPH, WEIGHTS, key

CHANGES: dict[str, Any] = {
    "graph": "0" * 64,
    "weights": "0" * 64,
    "target": "tensorrt",
    "library_version": "1.7.1.117",
    "sm": ("sm86",),
    "variant": "bf16",
    "passes": "2",
    "optimization_level": 4,
    "capacity": 1024,
    "profiles": {"prefill": {"input_ids": ((1, 1), (1, 64), (4, 129)), "past": ((1,), (2,), (3,))}, "decode": {}},
    "gpu": "NVIDIA L4",
    "cuda": "13.0",
    "workspace_bytes": 1 << 30,
    "refittable": True,
    "flags": {"tf32": False, "depth": 2},
    "plugins": {"p": "c" * 64},
}
IN_IDENTITY = {"graph", "weights", "target", "library_version", "variant"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineKey)])
def test_every_field_counts(name: str) -> None:
    changed = key(**{name: CHANGES[name]})
    assert changed.digest != key().digest
    assert (changed.identity != key().identity) == (name in IN_IDENTITY)


def test_flags_of_equal_value_and_other_type_differ() -> None:
    assert key(flags={"a": 1}).digest != key(flags={"a": True}).digest


def test_order_does_not_count() -> None:
    profiles = {"decode": {}, "prefill": dict(reversed(key().profiles["prefill"].items()))}
    other = key(
        profiles=profiles,
        sm=("sm89", "sm86", "sm89"),
        flags={"depth": 2, "tf32": True},
        plugins={"q": "d" * 64, "p": "c" * 64},
    )
    assert other.digest == key().digest and other == key() and hash(other) == hash(key())


def test_json_and_back() -> None:
    for each in [key(), key(**CHANGES), key(profiles={}, capacity=None)]:
        again = read_key(json.loads(json.dumps(to_dict(each))), "here", EngineStoreError)
        assert again == each and again.digest == each.digest


def test_the_digest_is_the_same_in_every_process_and_release() -> None:
    """Stores outlive processes: a change of this number makes every engine in them unreachable."""
    assert key().digest == "25ca4ad891232a74eb381dc235a9665aa4cfc2504c6e874424c75cb8f3bf5a68"
    assert key().identity == engine_identity(GRAPH, WEIGHTS, "rtx", "1.7.1.116", "fp16")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"graph": "abc"}, "no sha256"),
        ({"weights": "A" * 64}, "no sha256"),
        ({"plugins": {"p": ""}}, "no sha256.*p"),
        ({"sm": ()}, "No SM"),
        ({"sm": ("SM89",)}, "names no SM"),
        ({"profiles": {"p": {"x": ((1,), (1, 2), (3,))}}}, "one rank.*'p'.*'x'"),
    ],
)
def test_malformed_fields(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        key(**changes)


def test_malformed_json() -> None:
    for change in ({"graph": "x"}, {"graph": 1}, {"unknown": 1}):
        with pytest.raises(EngineStoreError):
            read_key({**to_dict(key()), **change}, "here", EngineStoreError)
