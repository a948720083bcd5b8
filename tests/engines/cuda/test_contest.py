"""Which way is measured to be the fastest: what is kept, and what is done where nothing can be measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel.engines.cuda import contest
from accel.engines.cuda.contest import Contest
from accel.engines.cuda.device import Device

TIMES = {"first": 3.0, "second": 2.0, "third": 1.0}


class StandIn(Device):
    """Says that it is a GPU."""

    is_gpu = True
    title = "cuda (Some GPU)"

    def eviction(self) -> Callable[[], object]:
        return lambda: None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed, in order; ways return their names, and their times are ``TIMES``."""
    found: list[str] = []

    def times_of(ways: Mapping[str, Callable[[], Any]], before: Callable[[], object]) -> dict[str, float]:
        found.extend(way() for way in ways.values())
        return {name: TIMES[name] for name in ways}

    monkeypatch.setattr(contest, "_times_of", times_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def ways(*names: str) -> dict[str, Callable[[], str]]:
    return {name: lambda name=name: name for name in names}  # type: ignore[misc]


def gpu() -> Device:
    return StandIn(torch.device("cpu"))


def test_each_shape_is_measured_once_and_kept(measured: list[str], tmp_path: Path) -> None:
    first = Contest(gpu(), tmp_path)
    assert first.pick("a shape", ways("first", "second")) == "second"
    assert first.pick("a shape", ways("first", "second")) == "second" and measured == ["first", "second"]
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first", "second")) == "second" and len(measured) == 2
    assert first.pick("another", ways("first", "third")) == "third"
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["microseconds"]["a shape"] == {"first": 3.0, "second": 2.0}


def test_a_new_way_is_measured_beside_the_others(measured: list[str], tmp_path: Path) -> None:
    Contest(gpu(), tmp_path).pick("a shape", ways("first", "second"))
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first", "second", "third")) == "third"
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first", "second")) == "second", "only ways that are there"


def test_nothing_is_measured_while_a_run_is_recorded(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Contest(gpu(), tmp_path)
    known.pick("known", ways("first", "second"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert known.pick("unknown", ways("first", "second")) == "first" and len(measured) == 2
    assert known.pick("known", ways("first", "second")) == "second"


def test_one_way_and_the_cpu_need_no_measuring(measured: list[str], tmp_path: Path) -> None:
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first")) == "first"
    assert Contest(Device(torch.device("cpu")), tmp_path).pick("a shape", ways("first", "second")) == "first"
    assert not measured and not list(tmp_path.iterdir())


def test_a_damaged_file_is_measured_again(measured: list[str], tmp_path: Path) -> None:
    Contest(gpu(), tmp_path).pick("a shape", ways("first", "second"))
    next(tmp_path.iterdir()).write_text("{")
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first", "second")) == "second" and len(measured) == 4


def test_times_that_were_taken_in_another_way_do_not_count(measured: list[str], tmp_path: Path) -> None:
    Contest(gpu(), tmp_path).pick("a shape", ways("first", "second"))
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text().replace(f'"schema": {contest._SCHEMA}', '"schema": 1'))
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first", "second")) == "second" and len(measured) == 4


def test_where_every_way_failed_it_is_said(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("first", "second"):
        monkeypatch.setitem(TIMES, name, contest._NEVER)
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first", "second")) == "first"
    assert "no way to compute a shape could be timed" in caplog.text
    assert Contest(gpu(), tmp_path).pick("a shape", ways("first", "second")) == "first"
    assert measured == ["first", "second"], "what cannot run here never will: it is kept"


def test_what_was_not_timed_runs_before_what_cannot(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's capture or full memory is over some time: a few tries."""
    for name, time in (("first", contest._NEVER), ("second", contest._NOT_NOW), ("third", contest._NOT_NOW)):
        monkeypatch.setitem(TIMES, name, time)
    untimed = Contest(gpu(), tmp_path)
    for _ in range(2 * contest._TRIES):
        assert untimed.pick("a shape", ways("first", "second", "third")) == "second"
    assert len(measured) == 3 * contest._TRIES and not list(tmp_path.iterdir())

    disturbed = Contest(gpu(), tmp_path)
    assert disturbed.pick("a shape", ways("first", "second", "third")) == "second"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert disturbed.pick("a shape", ways("first", "second", "third")) == "second", "the first one cannot be recorded"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(TIMES, "second", 2.0)
    monkeypatch.setitem(TIMES, "third", 1.0)
    measured.clear()
    for _ in range(2):
        assert disturbed.pick("a shape", ways("first", "second", "third")) == "third"
    assert measured == ["first", "second", "third"]
    (path,) = tmp_path.iterdir()
    kept = {"first": contest._NEVER, "second": 2.0, "third": 1.0}
    assert json.loads(path.read_text())["microseconds"] == {"a shape": kept}


def test_sessions_keep_each_others_results(measured: list[str], tmp_path: Path) -> None:
    """Two models in threads: each read the file before the other wrote."""
    one, other = Contest(gpu(), tmp_path), Contest(gpu(), tmp_path)
    for key, made in (("a", one), ("b", other), ("c", one)):
        made.pick(key, ways("first", "second"))
    assert len(measured) == 6 and one.pick("b", ways("first", "second")) == "second" and len(measured) == 6
    (path,) = tmp_path.iterdir()
    assert list(json.loads(path.read_text())["microseconds"]) == ["a", "b", "c"]
    path.write_text(path.read_text().replace("2.0", "9.0"))
    one.pick("d", ways("first", "second"))
    assert json.loads(path.read_text())["microseconds"]["a"]["second"] == 2.0, "what it runs by stays"


def test_what_had_no_room_is_measured_by_the_next_process(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have had the memory; this process does not try again and again."""
    monkeypatch.setitem(TIMES, "third", contest._NOT_NOW)
    here = Contest(gpu(), tmp_path)
    assert here.pick("a shape", ways("third", "second")) == here.pick("a shape", ways("third", "second")) == "second"
    assert measured == ["third", "second"] and not list(tmp_path.iterdir())
    monkeypatch.setitem(TIMES, "third", 1.0)
    assert Contest(gpu(), tmp_path).pick("a shape", ways("third", "second")) == "third"


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing\nFor debugging"),
    ],
    ids=["allocator", "kernel", "another's capture"],
)
def test_a_way_that_finds_no_room(error: Exception) -> None:
    def fail() -> None:
        raise error

    assert contest._times_of({"way": fail}, lambda: None) == {"way": contest._NOT_NOW}


def test_a_way_that_fails_loses() -> None:
    def fail() -> None:
        raise RuntimeError("out of resource: shared memory")

    assert contest._times_of({"way": fail}, lambda: None) == {"way": contest._NEVER}


def turns_of(monkeypatch: pytest.MonkeyPatch, replayed: Callable[[str, int], float]) -> list[str]:
    """Lets turns be timed by a function of the way's name and the turn; returns who had one."""
    turns: list[str] = []

    def replay(way: Callable[[], str], before: Callable[[], object]) -> float:
        turns.append(way())
        return replayed(turns[-1], len(turns))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(contest, "_replayed", replay)
    return turns


def test_ways_take_turns_and_the_best_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that slow down meanwhile slow all of them; a way that cannot run takes no turn."""
    turns = turns_of(monkeypatch, lambda name, turn: turn + (0.5 if name == "slower" else 0.0))

    def broken() -> None:
        raise RuntimeError("out of resource")

    found = contest._times_of({**ways("faster"), "broken": broken, **ways("slower")}, lambda: None)
    assert turns == ["faster", "slower"] * contest._TURNS
    assert found == {"faster": 1.0, "broken": contest._NEVER, "slower": 2.5}


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_a_recording_that_fails_costs_that_way_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    """Nothing of it is kept: the next process may be able to."""

    def replayed(name: str, turn: int) -> float:
        if name == "second" and turn > 2:
            raise error("operation not permitted when a stream is capturing")
        return TIMES[name]

    turns = turns_of(monkeypatch, replayed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = Contest(gpu(), tmp_path)
    assert made.pick("a shape", ways("first", "second")) == made.pick("a shape", ways("first", "second")) == "first"
    assert turns == ["first", "second", "first", "second", "first"] and not list(tmp_path.iterdir())
