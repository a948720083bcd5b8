"""The scheduler with made-up work: what runs beside what, what is repeated, and how all is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from accel.warmup_jobs import scheduler
from accel.warmup_jobs.scheduler import Limits, Outcome, Task, run_tasks

DONE = Outcome(result={})
GB = 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(scheduler, "GRACE_SECONDS", 0.1)


@dataclass
class Made:
    """Work that takes some polls; the house notes who is in it together."""

    house: House
    name: str
    polls: int
    outcome: Outcome
    deaf: bool = False

    def poll(self) -> Outcome | None:
        self.polls -= 1
        if self.polls > 0:
            return None
        self.house.inside.remove(self.name)
        return self.outcome

    def interrupt(self) -> None:
        self.house.interrupted.append(self.name)
        if not self.deaf:
            self.polls, self.outcome = 0, Outcome(error="interrupted")

    def kill(self) -> None:
        self.house.killed.append(self.name)
        self.house.inside.remove(self.name)


@dataclass
class House:
    inside: list[str] = field(default_factory=list)
    together: list[frozenset[str]] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)

    def task(
        self, name: str, memory: int, *outcomes: Outcome, polls: int = 5, alone: bool = False, deaf: bool = False
    ) -> Task:
        left = list(outcomes or (DONE,))

        def start() -> Made:
            self.inside.append(name)
            self.together.append(frozenset(self.inside))
            return Made(self, name, polls, left.pop(0), deaf)

        return Task(name, memory, start, alone)


def run(tasks: list[Task], memory: int = 10 * GB, workers: int = 4, retries: int = 1) -> None:
    run_tasks(tasks, Limits(memory, workers, retries), lambda: False)


def test_the_budget_keeps_large_builds_apart() -> None:
    house = House()
    tasks = [house.task("a", 6 * GB, polls=9), house.task("b", 6 * GB), house.task("small", 3 * GB, polls=3)]
    run(tasks)
    assert all(task.outcome == DONE for task in tasks)
    assert {"a", "small"} in house.together
    assert not any({"a", "b"} <= names for names in house.together)


def test_larger_than_the_budget_runs_alone() -> None:
    house = House()
    tasks = [house.task("small", GB), house.task("huge", 20 * GB), house.task("last", GB)]
    run(tasks)
    assert all(task.outcome == DONE for task in tasks)
    assert [names for names in house.together if "huge" in names] == [{"huge"}]


def test_workers_and_solitude() -> None:
    house = House()
    run([house.task(name, 1) for name in "abcdef"], workers=2)
    assert max(map(len, house.together)) == 2
    house = House()
    run([house.task("a", 1), house.task("timed", 1, alone=True), house.task("b", 1)])
    assert [names for names in house.together if "timed" in names] == [{"timed"}]
    assert {"a", "b"} in house.together


def test_a_failure_is_repeated_with_its_reason() -> None:
    house = House()
    tasks = [
        house.task("flaky", 1, Outcome(error="first"), DONE),
        house.task("broken", 1, Outcome(error="one"), Outcome(error="two")),
        house.task("wrong", 1, Outcome(error="wrong input", permanent=True)),
        house.task("good", 1),
    ]
    run(tasks)
    assert [task.reasons for task in tasks] == [["first"], ["one", "two"], ["wrong input"], []]
    assert [task.outcome is not None and task.outcome.error for task in tasks] == [None, "two", "wrong input", None]
    once = House().task("once", 1, Outcome(error="no"))
    run([once], retries=0)
    assert once.reasons == ["no"]


def test_what_was_killed_is_repeated_alone() -> None:
    house = House()
    killed = house.task("fat", 1, Outcome(error="killed", killed=True), DONE, polls=2)
    run([killed, house.task("b", 1, polls=20), house.task("c", 1, polls=20)])
    assert killed.outcome == DONE
    assert [names for names in house.together if "fat" in names][-1] == {"fat"}


def after(calls: int) -> Callable[[], bool]:
    """A stop that is asked for after some rounds."""
    left = [calls]

    def stopped() -> bool:
        left[0] -= 1
        return left[0] < 0

    return stopped


def test_a_stop_interrupts_and_starts_nothing_more() -> None:
    house = House()
    tasks = [house.task(name, 1, polls=1000) for name in "abc"]
    run_tasks(tasks, Limits(GB, 2, 1), after(3))
    assert house.interrupted == ["a", "b"] and house.killed == [] and house.inside == []
    assert [task.outcome for task in tasks] == [None, None, None]


def test_a_stop_kills_what_does_not_hear_and_keeps_what_ends_well() -> None:
    house = House()
    deaf = house.task("deaf", 1, polls=10**9, deaf=True)
    ending = house.task("ending", 1, polls=5, deaf=True)
    run_tasks([deaf, ending], Limits(GB, 2, 1), after(3))
    assert house.killed == ["deaf"] and deaf.outcome is None
    assert ending.outcome == DONE


def test_no_work_outlives_an_error() -> None:
    house = House()

    def report(_: Task) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks([house.task("a", 1), house.task("b", 1, polls=99)], Limits(GB, 2, 1), lambda: False, report)
    assert house.killed == ["b"] and house.inside == []
