from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from accel.errors import BundleError, RecipeError
from accel.manifest import GraphEntry, PassReport
from accel.schema import from_dict, suggest, to_dict
from accel.spec import TensorSpec


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    mode: Literal["fast", "exact"]
    inner: Inner
    window: int | None = None
    shape: tuple[int | str, ...] = ()
    pair: tuple[int, str] = (0, "")
    table: dict[str, Inner] = field(default_factory=dict)
    on: bool = False


FULL: dict[str, Any] = {
    "name": "a",
    "mode": "exact",
    "inner": {"size": 3, "ratio": 2},
    "window": 7,
    "shape": ["batch", 4],
    "pair": [1, "x"],
    "table": {"k": {"size": 1}},
    "on": True,
}


def test_reads_every_supported_type() -> None:
    outer = from_dict(Outer, FULL, "f")
    assert outer == Outer("a", "exact", Inner(3, 2.0), 7, ("batch", 4), (1, "x"), {"k": Inner(1)}, True)
    assert type(outer.inner.ratio) is float
    assert type(outer.shape) is tuple


def test_round_trip_through_json() -> None:
    outer = from_dict(Outer, FULL, "f")
    assert from_dict(Outer, json.loads(json.dumps(to_dict(outer))), "f") == outer
    graph = GraphEntry(
        "g.onnx",
        20,
        (TensorSpec("x", "int64", ("b", 2)),),
        (),
        ("n0",),
        (PassReport("fuse", 9, 5, {"norm": 2}, ("n",)),),
    )
    assert from_dict(GraphEntry, json.loads(json.dumps(to_dict(graph))), "f") == graph


def test_defaults_are_used() -> None:
    outer = from_dict(Outer, {"name": "a", "mode": "fast", "inner": {"size": 1}}, "f")
    assert outer.window is None and outer.table == {} and outer.inner.ratio == 0.5


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"Unknown key 'windwo' \(at f\)\. Did you mean 'window'"):
        from_dict(Outer, {**FULL, "windwo": 1}, "f", error=RecipeError)


def test_missing_key_and_place() -> None:
    with pytest.raises(BundleError, match=r"Missing key 'size' \(at f: inner\)"):
        from_dict(Outer, {**FULL, "inner": {}}, "f")


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("name", 3, "f: name"),
        ("mode", "slow", "f: mode"),
        ("inner", [1], "f: inner"),
        ("inner", {"size": True}, "f: inner: size"),
        ("inner", {"size": 1.0}, "f: inner: size"),
        ("inner", {"size": 1, "ratio": "2"}, "f: inner: ratio"),
        ("inner", {"size": 1, "ratio": float("nan")}, "f: inner: ratio"),
        ("inner", {"size": 1, "ratio": True}, "f: inner: ratio"),
        ("window", "7", "f: window"),
        ("shape", "ab", "f: shape"),
        ("shape", [1, 2.5], r"f: shape\[1\]"),
        ("pair", [1], "f: pair"),
        ("table", {"k": 3}, "f: table.k"),
        ("table", {1: {"size": 1}}, "f: table"),
        ("on", 1, "f: on"),
        ("on", None, "f: on"),
    ],
)
def test_wrong_type_names_the_place(key: str, value: object, place: str) -> None:
    with pytest.raises(BundleError, match=rf"\(at {place}\)"):
        from_dict(Outer, {**FULL, key: value}, "f")


def test_top_level_must_be_a_mapping() -> None:
    with pytest.raises(BundleError, match="Expected a mapping, found 3"):
        from_dict(Outer, 3, "f")


def test_a_schema_with_an_unsupported_field_type_is_a_bug() -> None:
    with pytest.raises(TypeError, match="object"):
        to_dict(object())

    @dataclass(frozen=True)
    class Bad:
        x: bytes

    Bad.__annotations__["x"] = bytes
    with pytest.raises(TypeError, match="bytes"):
        from_dict(Bad, {"x": b""}, "f")


def test_suggest_lists_all_when_nothing_is_near() -> None:
    assert suggest("zzz", ["beta", "alpha"]) == "Known: alpha, beta"
    assert suggest("alhpa", ["beta", "alpha"]) == "Did you mean 'alpha'?"
