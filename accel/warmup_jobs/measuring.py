"""Which bundles of a job are measured on this machine, as ``accel bench`` does, so that loading takes the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.bundle import Bundle
from accel.engines import ENGINES
from accel.errors import AccelError, StorageError
from accel.measurements import Measured, current, recall
from accel.warmup_jobs.lines import Engine, status_of, why
from accel.warmup_jobs.report import MeasuredLine, MeasuredStatus
from accel.warmup_jobs.scheduler import Task

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 32, 7  # as accel bench has them unasked
FOREIGN = "the job names no engine that is there for the GPU of this machine"


@dataclass(eq=False)
class Contest:
    """A bundle whose engines are to be measured, or why they are not.

    Attributes:
        bundle: Its path.
        status: ``hit``: known already. ``miss``: to be measured. ``skipped``: not here.
        reason: Why it is skipped.
        known: Name -> ms of what is known.
        memory: Bytes that an engine is expected to take.
        task: What measures it, once it was begun.
    """

    bundle: str
    status: MeasuredStatus
    reason: str | None = None
    known: dict[str, float] | None = None
    memory: int = 0
    task: Task | None = None

    def line(self) -> MeasuredLine:
        """What the report says of it."""
        task = self.task
        if task is None:
            return MeasuredLine(self.bundle, self.status, self.reason, engines=self.known or {})
        log = str(task.log) if task.log is not None and task.log.exists() else None
        if task.outcome is None:
            return MeasuredLine(self.bundle, "stopped", "the job was stopped", log=log)
        if task.outcome.result is None:
            return MeasuredLine(self.bundle, "failed", why(task), log=log)
        result = task.outcome.result
        return MeasuredLine(
            self.bundle, "measured", None, result["chosen"], result["engines"], result["passed_over"],
            round(task.seconds, 3), log,
        )  # fmt: skip


def plan_contests(
    engines: Sequence[Engine], runs_here: Callable[[Engine], bool], absent: str | None, store: str | None, plan: bool
) -> list[Contest]:
    """One for each bundle of a job, in its order.

    What was measured before is not measured again, unless an engine that the job names was not, or is new.

    Args:
        engines: The job's.
        runs_here: Whether an engine is for this machine's GPU.
        absent: Why this process sees no GPU; None: it sees one.
        store: Where what was measured is kept.
        plan: Whether the engines are what is planned; else what became of them.
    """
    found = []
    for path in dict.fromkeys(engine.planned.wanted.bundle for engine in engines):
        own = [engine for engine in engines if engine.planned.wanted.bundle == path]
        states = {engine: engine.planned.state if plan else status_of(engine) for engine in own}
        able = [engine for engine in own if states[engine] in ("hit", "miss", "built") and runs_here(engine)]
        if absent is not None or not able:
            found.append(Contest(path, "skipped", absent or FOREIGN))
            continue
        memory = max(engine.planned.memory for engine in able)
        known = _known(path, able, store) if all(states[engine] == "hit" for engine in able) else None
        found.append(Contest(path, "miss" if known is None else "hit", known=known, memory=memory))
    return found


def _known(path: str, engines: Sequence[Engine], store: str | None) -> dict[str, float] | None:
    """What is known of a bundle here, if each of the engines was measured."""
    try:
        bundle = Bundle.open(path)
        found = recall(bundle, "cuda", None, store)
    except AccelError:  # who measures it says so
        return None
    targets = {engine.name: engine.target for engine in ENGINES if engine.device == "cuda"}
    left = None if found is None else current(found, bundle, targets)
    costs = _costs(left.rows if left is not None else ())
    wanted = {f"{engine.planned.wanted.target} {engine.planned.variant}" for engine in engines}
    return costs if wanted <= costs.keys() else None


def measure_bundle(path: str, store: str | None) -> dict[str, Any]:
    """Measures every engine that can run a bundle on this machine's GPU, and has ``accel.load`` know it.

    Args:
        path: The bundle.
        store: Where engines, and what is measured, are kept.

    Returns:
        Plain data: what is ``chosen``, ``engines``: name -> ms, and what was ``passed_over``, with the reason.

    Raises:
        EngineUnavailableError: No engine runs it here.
        EngineError: All failed.
        StorageError: What was measured could not be kept.
    """
    from accel.bench import SHAPES
    from accel.bench.bundle import bench_bundle

    arch = Bundle.open(path).manifest.arch
    prompt, new = decoder_sizes(arch.max_positions)
    report = bench_bundle(Path(path), ROUNDS, None, SHAPES, prompt, new, False, False, "cuda", store, _say)
    if not report.remembered:
        raise StorageError(report.unremembered, where=path, remedy="Set ACCEL_CACHE to a path that can be written")
    return {"chosen": report.chosen, "engines": _costs(report.engines), "passed_over": report.passed_over}


def decoder_sizes(positions: int) -> tuple[int, int]:
    """Tokens of a prompt and those after the first: as ``accel bench`` has them, of a short cache what fits."""
    new = min(NEW_TOKENS, max(1, positions // 4))
    return max(1, min(PROMPT_TOKENS, positions - new - 1)), new


def _costs(rows: Sequence[Measured]) -> dict[str, float]:
    return {f"{row.engine} {row.variant}": round(row.cost, 4) for row in rows}


def _say(line: str) -> None:
    print(line, flush=True)  # into the log


__all__ = ["Contest", "decoder_sizes", "measure_bundle", "plan_contests"]
