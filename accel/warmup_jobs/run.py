"""``accel.warmup``: plan, add variants, build what is missing, run what this machine's GPU can run, report."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.engine_build import removed_engines
from accel.engines.kv_cache import check_count
from accel.engines.tensorrt.lookup import open_store
from accel.engines.tensorrt.packages import current_sm
from accel.errors import InputError, RecipeError
from accel.machine import available_cores, available_memory
from accel.schema import to_dict
from accel.sizes import parse_size
from accel.store import EngineStore
from accel.warmup_jobs.jobs import JobFile, Wanted, expand, read_jobs
from accel.warmup_jobs.logs import log_folder
from accel.warmup_jobs.plan import PlannedEngine, Planner, variant_memory
from accel.warmup_jobs.process import Child
from accel.warmup_jobs.report import EngineLine, Status, WarmupReport
from accel.warmup_jobs.scheduler import Limits, Outcome, Task, run_tasks

UNKNOWN_MEMORY = 8 << 30  # where the system does not say what is free


def warmup(
    jobs: str | Path | Mapping[str, Any],
    *,
    store: str | Path | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    memory: int | str | None = None,
    retries: int = 1,
    show_progress: bool | None = None,
) -> WarmupReport:
    """Sees to it that the store has every engine of a job.

    Missing precisions are added to their bundles first. Engines are built in child processes: a crash of the native
    library costs one engine. Whatever is built stays, so a job that was stopped or killed goes on where it was. On a
    machine with a GPU its engines are also loaded, warmed up and timed. Ctrl-C and SIGTERM stop the builds and end in
    a report, too.

    Args:
        jobs: A YAML file, or what it would hold; see ``JobFile``.
        store: Where engines are kept: a directory or URL; None: as the job says, else ``ACCEL_STORE``, else this
            user's cache.
        dry_run: Plan only.
        workers: Most builds at a time; None: as the job says, else one per core.
        memory: What all builds together may take, e.g. ``16GB``; None: as the job says, else what is free.
        retries: How often a failed build is repeated, unless the next attempt would fail alike.
        show_progress: Write the plan and each finished engine to stderr; None: when it is a terminal.

    Returns:
        A line for each engine. What fails is in there, too.

    Raises:
        RecipeError: The job has an unknown key or a wrong value.
        InputError: It asks for nothing, or an argument is out of range.
        EngineStoreError, DependencyError: The store cannot be opened.
        SummaryError: The summary cannot be written, found before anything is built; it has the report.
        StorageError: The logs' folder cannot be written.
    """
    started = time.monotonic()
    file, folder = read_jobs(jobs)
    limits = _limits(file, workers, memory, retries)
    url = _store_url(store, file, folder)
    place, wanted = open_store(url, **_limited(file)), expand(file, folder)
    show = sys.stderr.isatty() if show_progress is None else show_progress
    job = _Job(place, url, limits, show)
    job.engines = [_Engine(planned) for planned in Planner(place).plan(wanted)]
    planned = job.report(started, dry_run=True)
    if file.summary is not None:  # what cannot be written is found before hours of building
        planned.write(folder / file.summary)
    if not dry_run:
        job.say(str(planned))
        chosen = None if file.logs is None else folder / file.logs
        with log_folder(chosen, job.telling_logs) as job.logs, _stop_signals() as stopped:
            job.run(wanted, stopped)
    report = job.report(started, dry_run)
    if file.summary is not None:
        report.write(folder / file.summary)
    return report


@dataclass(eq=False)
class _Engine:
    """An engine of the job and what was done for it; ``latency`` is there once it ran."""

    planned: PlannedEngine
    variant: Task | None = None
    build: Task | None = None
    log: Path | None = None
    latency: dict[str, float] | None = None
    failure: str | None = None  # of its variant, or of its run
    stopped: bool = False  # before its variant was added


@dataclass(eq=False)
class _Job:
    """One job on its way."""

    store: EngineStore
    url: str | None
    limits: Limits
    show: bool
    engines: list[_Engine] = field(default_factory=list)
    logs: Path = Path()
    begun: list[Task] = field(default_factory=list)
    interrupted: bool = False
    gpu: str | None = None

    def run(self, wanted: Sequence[Wanted], stopped: Callable[[], bool]) -> None:
        """Variants, then builds, then runs."""
        added = self._add_variants(stopped)
        planner = Planner(self.store, verify="://" not in self.store.url)
        self.engines = [_Engine(planned) for planned in planner.plan(wanted)]
        for engine in self.engines:
            task = engine.variant = added.get((engine.planned.wanted.bundle, engine.planned.variant))
            if engine.planned.missing is not None:
                failed = task is not None and task.outcome is not None and task.outcome.error is not None
                engine.stopped = not failed
                if task is not None and failed:
                    engine.failure, engine.log = _why(task), task.log
        self._build(stopped)
        self.gpu = current_sm()
        if self.gpu is not None:
            self._run_engines(stopped)
        self.interrupted = stopped()

    def say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

    def _add_variants(self, stopped: Callable[[], bool]) -> dict[tuple[str, str | None], Task]:
        """Adds each missing precision once; returns the tasks that did it, or failed to."""
        missing = [(engine.planned.wanted.bundle, engine.planned.missing) for engine in self.engines]
        tasks: dict[tuple[str, str | None], Task] = {}
        for bundle, variant in dict.fromkeys(missing):
            if variant is not None:
                request = {"do": "variant", "bundle": bundle, "variant": variant}
                name = f"{Path(bundle).name} {variant}"
                tasks[bundle, variant] = self._task(name, variant_memory(bundle), request)
        self._run_tasks(list(tasks.values()), stopped)
        return tasks

    def _build(self, stopped: Callable[[], bool]) -> None:
        for engine in self.engines:
            planned = engine.planned
            if planned.state == "miss" and planned.missing is None:
                request = {"do": "build", "wanted": to_dict(planned.wanted), "store": self.url,
                           "max_bytes": self.store.max_bytes}  # fmt: skip
                engine.build = self._task(planned.title, planned.memory, request, planned.alone)
                engine.log = engine.build.log
        self._run_tasks([engine.build for engine in self.engines if engine.build], stopped)
        if stopped():
            self._count_stored()
        if self.store.max_bytes is not None:
            self._note_removed(self.store.max_bytes)

    def _note_removed(self, max_bytes: int) -> None:
        """A store whose limit is less than what the job needs drops the first engines for the last."""
        there = [engine for engine in self.engines if _status(engine) in ("hit", "built")]
        removed = removed_engines(self.store, [digest for engine in there if (digest := _digest(engine))])
        for engine in there:
            if _digest(engine) in removed:
                limit = f"{max_bytes / 1e6:.0f} MB"
                engine.failure = f"It was removed for later engines: the store may hold {limit}, the job needs more"

    def _count_stored(self) -> None:
        """A child that is stopped right behind its last step has no time to say that its engine is in the store."""
        stored = {entry.digest: entry for entry in self.store.entries() if entry.manifest is not None}
        for engine in self.engines:
            entry = stored.get(engine.planned.digest or "")
            if engine.build is not None and engine.build.outcome is None and entry is not None:
                assert entry.manifest is not None
                result = {"built": True, "digest": entry.digest, "bytes": entry.manifest.size}
                engine.build.outcome = Outcome(result=result)

    def _run_engines(self, stopped: Callable[[], bool]) -> None:
        """Loads, warms up and times this GPU's engines, one at a time: they share its memory and its clock."""
        runs = {}
        for engine in self.engines:
            if engine.planned.wanted.sm == self.gpu and _status(engine) in ("hit", "built"):
                request = {"do": "run", "wanted": to_dict(engine.planned.wanted), "store": self.url}
                runs[engine] = self._task(f"{engine.planned.title} run", engine.planned.memory, request, True)
                engine.log = runs[engine].log
        self._run_tasks(list(runs.values()), stopped)
        for engine, task in runs.items():
            if task.outcome is None:
                engine.stopped = True
            elif task.outcome.error is not None:
                engine.failure = f"It was built but does not run: {_why(task)}"
            elif task.outcome.result is not None:
                engine.latency = task.outcome.result["latency_ms"]

    def _task(self, name: str, memory: int, request: dict[str, Any], alone: bool = False) -> Task:
        file = re.sub(r"[^\w.+]+", "-", name)  # what a person reads has brackets and commas
        log = self.logs / f"{len(self.begun) + 1:03}-{file[:150]}.log"
        self.begun.append(Task(name, memory, lambda: Child(request, log), alone, log))
        return self.begun[-1]

    def _run_tasks(self, tasks: Sequence[Task], stopped: Callable[[], bool]) -> None:
        """Runs them and tells of each attempt; what became of the engines stands in the report alone."""

        def tell(task: Task) -> None:
            ended = sum(one.outcome is not None for one in tasks)
            error = task.outcome.error if task.outcome is not None else None
            failed = f", failed: {error}" if error else ""
            self.say(f"[{ended}/{len(tasks)}] {task.name}: {task.seconds:.1f} s{failed}")

        run_tasks(tasks, self.limits, stopped, tell)

    def telling_logs(self) -> set[Path]:
        """Those that say why an engine is missing."""
        if not any(_status(engine) == "failed" for engine in self.engines):
            return set()
        return {task.log for task in self.begun if task.reasons and task.log is not None}

    def report(self, started: float, dry_run: bool) -> WarmupReport:
        lines = tuple(_line(engine, dry_run) for engine in self.engines)
        seconds = round(time.monotonic() - started, 3)
        return WarmupReport(self.store.url, lines, dry_run, self.interrupted, self.gpu, seconds)


def _status(engine: _Engine) -> Status:
    if engine.planned.state == "failed" or engine.failure is not None:
        return "failed"
    if engine.stopped:
        return "stopped"
    if engine.planned.state == "hit":
        return "hit"
    outcome = engine.build.outcome if engine.build is not None else None
    if outcome is None:
        return "stopped"
    if outcome.result is None:
        return "failed"
    return "built" if outcome.result["built"] else "hit"  # hit: another process built it meanwhile


def _line(engine: _Engine, dry_run: bool) -> EngineLine:
    planned, task = engine.planned, engine.build
    wanted = planned.wanted
    result = (task.outcome.result if task is not None and task.outcome is not None else None) or {}
    status: Status = planned.state if dry_run else _status(engine)
    reasons = {
        "failed": engine.failure or (_why(task) if task else planned.reason),
        "stopped": "the job was stopped",
        "miss": planned.reason,
    }
    missed = planned.state == "miss"
    return EngineLine(
        wanted.bundle, wanted.target, wanted.sm, planned.variant or wanted.precision, wanted.capacity, wanted.max_batch,
        status,
        reason=reasons.get(status),
        digest=_digest(engine),
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
        note=planned.note,
        choices=wanted.choices,
    )  # fmt: skip


def _digest(engine: _Engine) -> str | None:
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


def _why(task: Task) -> str:
    return task.reasons[-1] if task.reasons else "no reason given"


def _limits(file: JobFile, workers: int | None, memory: int | str | None, retries: int) -> Limits:
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise InputError(f"retries must be 0 or more, not {retries!r}", where="retries", remedy="Give a whole number")
    count = check_count("workers", workers if workers is not None else file.workers) or available_cores()
    size = memory if memory is not None else file.memory
    if size is not None:
        return Limits(parse_size(size, "memory", least=1, error=RecipeError), count, retries)
    return Limits(available_memory() or UNKNOWN_MEMORY, count, retries)


def _limited(file: JobFile) -> dict[str, int]:
    """What the file says of the store's size; what it does not say, the environment may."""
    given = file.max_bytes
    return {} if given is None else {"max_bytes": parse_size(given, "max_bytes", error=RecipeError)}


def _store_url(store: str | Path | None, file: JobFile, folder: Path) -> str | None:
    """The store as child processes are told of it; None: the default one."""
    if store is not None or file.store is None:
        url = None if store is None else str(store)
    else:
        url = file.store if "://" in file.store else str(folder / file.store)
    if url is not None and url.startswith("memory://"):
        what = "A store in memory is seen by one process alone, and engines are built in others"
        raise InputError(what, where="store", remedy="Give a directory or another URL")
    return url


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C or SIGTERM came. The second Ctrl-C is a KeyboardInterrupt. Main thread only."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def handle(number: int, _: object) -> None:
        if came.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


__all__ = ["warmup"]
