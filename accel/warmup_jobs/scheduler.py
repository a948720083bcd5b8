"""Runs tasks side by side within a memory budget, tries failed ones again, and stops them all when asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POLL_SECONDS = 0.05
GRACE_SECONDS = 15.0  # for a build to reach its next step and end


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        result: What it made; None if it failed.
        error: Why it failed, in words.
        permanent: Whether the next attempt would fail alike.
        killed: Whether somebody killed it, as the kernel does when memory runs out.
    """

    result: dict[str, Any] | None = None
    error: str | None = None
    permanent: bool = False
    killed: bool = False


class Work(Protocol):
    """An attempt under way, in a process of its own."""

    def poll(self) -> Outcome | None:
        """How it ended; None: it runs."""

    def interrupt(self) -> None:
        """Asks it to end soon."""

    def kill(self) -> None:
        """Ends it now, and waits until it is gone."""


@dataclass(eq=False)
class Task:
    """Something to be done.

    Attributes:
        name: For people.
        memory: Bytes that it is expected to take.
        start: Begins an attempt.
        alone: Whether nothing may run beside it.
        log: What its attempts print.
        reasons: Why earlier attempts failed.
        outcome: Of the last attempt; None: it never ended.
        seconds: That the last attempt took.
    """

    name: str
    memory: int
    start: Callable[[], Work]
    alone: bool = False
    log: Path | None = None
    reasons: list[str] = field(default_factory=list)
    outcome: Outcome | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Bytes that all running tasks take together, how many run at a time, and how often a failed one is repeated."""

    memory: int
    workers: int
    retries: int


def run_tasks(
    tasks: Sequence[Task], limits: Limits, stopped: Callable[[], bool], report: Callable[[Task], None] | None = None
) -> None:
    """Runs all tasks, in their order as far as the limits allow; each one's outcome stands in it afterwards.

    A task that is larger than the memory runs alone. One that was killed is repeated alone, for memory may have been
    the reason.

    Args:
        tasks: To be run.
        limits: For all of them.
        stopped: Whether to stop; asked again and again. What runs then is interrupted, and killed if it goes on.
        report: Called whenever an attempt has ended.
    """
    waiting, running = list(tasks), dict[Task, tuple[Work, float]]()
    try:
        while (waiting or running) and not stopped():
            for task in [task for task in waiting if _may_start(task, running, limits)]:
                if _may_start(task, running, limits):  # what was started just now counts too
                    waiting.remove(task)
                    task.outcome = None
                    running[task] = task.start(), time.monotonic()
            for task in _ended(running):
                if report is not None:
                    report(task)
                if _again(task, limits.retries):
                    waiting.append(task)
            time.sleep(POLL_SECONDS)
        _stop(running)
    finally:
        for work, _ in running.values():
            work.kill()


def _may_start(task: Task, running: dict[Task, tuple[Work, float]], limits: Limits) -> bool:
    if not running:
        return True
    if task.alone or any(other.alone for other in running) or len(running) >= limits.workers:
        return False
    return sum(other.memory for other in running) + task.memory <= limits.memory


def _ended(running: dict[Task, tuple[Work, float]]) -> list[Task]:
    """Takes out the tasks whose attempt has ended, and notes how."""
    ended = []
    for task, (work, started) in list(running.items()):
        outcome = work.poll()
        if outcome is not None:
            task.outcome, task.seconds = outcome, time.monotonic() - started
            if outcome.error is not None:
                task.reasons.append(outcome.error)
            del running[task]
            ended.append(task)
    return ended


def _again(task: Task, retries: int) -> bool:
    outcome = task.outcome
    if outcome is None or outcome.error is None or outcome.permanent or len(task.reasons) > retries:
        return False
    task.alone = task.alone or outcome.killed
    return True


def _stop(running: dict[Task, tuple[Work, float]]) -> None:
    """Interrupts what runs and waits for it a while; what ends well all the same counts."""
    for work, _ in running.values():
        work.interrupt()
    end = time.monotonic() + GRACE_SECONDS
    while running and time.monotonic() < end:
        for task in _ended(running):
            if task.outcome is not None and task.outcome.error is not None:
                task.outcome = None
        time.sleep(POLL_SECONDS)


__all__ = ["Limits", "Outcome", "Task", "Work", "run_tasks"]
