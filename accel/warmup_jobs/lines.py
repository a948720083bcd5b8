"""One engine of a job on its way, and what the report says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accel.warmup_jobs.jobs import WARMED
from accel.warmup_jobs.plan import PlannedEngine
from accel.warmup_jobs.report import EngineLine, Status
from accel.warmup_jobs.scheduler import Task


@dataclass(eq=False)
class Engine:
    """An engine of the job and what was done for it; ``latency`` is there once it ran."""

    planned: PlannedEngine
    variant: Task | None = None
    build: Task | None = None
    log: Path | None = None
    latency: dict[str, float] | None = None
    failure: str | None = None  # of its variant, or of its run
    stopped: bool = False  # before its variant was added


def status_of(engine: Engine) -> Status:
    """What became of it; of ``WARMED`` targets the graph is all that is built."""
    if engine.planned.state == "failed" or engine.failure is not None:
        return "failed"
    if engine.stopped:
        return "stopped"
    if engine.planned.state == "hit":
        return "built" if engine.planned.wanted.target in WARMED and engine.variant is not None else "hit"
    outcome = engine.build.outcome if engine.build is not None else None
    if outcome is None:
        return "stopped"
    if outcome.result is None:
        return "failed"
    return "built" if outcome.result["built"] else "hit"  # hit: another process built it meanwhile


def line_of(engine: Engine, dry_run: bool, absent: str | None) -> EngineLine:
    """What the report says of it; ``absent``: why this process sees no GPU."""
    planned, task = engine.planned, engine.build
    wanted = planned.wanted
    result = (task.outcome.result if task is not None and task.outcome is not None else None) or {}
    status: Status = planned.state if dry_run else status_of(engine)
    reasons = {
        "failed": engine.failure or (why(task) if task else planned.reason),
        "stopped": "the job was stopped",
        "miss": planned.reason,
    }
    missed = planned.state == "miss"
    return EngineLine(
        wanted.bundle, wanted.target, wanted.sm, planned.variant or wanted.precision, wanted.capacity, wanted.max_batch,
        status,
        reason=reasons.get(status),
        digest=digest_of(engine),
        bytes=result.get("bytes", planned.bytes),
        seconds=round(task.seconds, 3) if result and task is not None else None,
        attempts=_attempts(task),
        retried=_retried(task),
        variant_attempts=_attempts(engine.variant),
        variant_retried=_retried(engine.variant),
        estimated_bytes=planned.memory if missed else None,
        estimated_seconds=planned.seconds if missed else None,
        latency_ms=engine.latency,
        log=str(engine.log) if engine.log is not None and engine.log.exists() else None,
        note=", ".join(filter(None, [planned.note, _warmth(engine, status, dry_run, absent)])) or None,
        choices=wanted.choices,
    )  # fmt: skip


def _warmth(engine: Engine, status: Status, dry_run: bool, absent: str | None) -> str | None:
    if engine.planned.wanted.target not in WARMED or status not in ("hit", "built", "miss"):
        return None
    if absent is not None:
        return f"not warmed up: {absent}"
    return "to be warmed up here" if dry_run else None


def digest_of(engine: Engine) -> str | None:
    """The engine's name in the store, once it is known."""
    outcome = engine.build.outcome if engine.build is not None else None
    return (outcome.result or {}).get("digest", engine.planned.digest) if outcome else engine.planned.digest


def _attempts(task: Task | None) -> int:
    """Attempts that ended."""
    return 0 if task is None else len(task.reasons) + _is_done(task)


def _retried(task: Task | None) -> tuple[str, ...]:
    """Why the attempts before the last one failed."""
    if task is None:
        return ()
    return tuple(task.reasons if _is_done(task) else task.reasons[:-1])


def _is_done(task: Task) -> bool:
    return task.outcome is not None and task.outcome.result is not None


def why(task: Task) -> str:
    """Why its last attempt failed."""
    return task.reasons[-1] if task.reasons else "no reason given"


__all__ = ["Engine", "digest_of", "line_of", "status_of", "why"]
