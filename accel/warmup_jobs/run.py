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
from accel.machine import available_cores, available_memory, missing_gpu
from accel.schema import to_dict
from accel.sizes import parse_size
from accel.store import EngineStore
from accel.warmup_jobs.jobs import WARMED, JobFile, Wanted, expand, read_jobs
from accel.warmup_jobs.lines import Engine, digest_of, line_of, status_of, why
from accel.warmup_jobs.logs import log_folder
from accel.warmup_jobs.measuring import Contest, plan_contests
from accel.warmup_jobs.plan import Planner, variant_memory
from accel.warmup_jobs.process import Child
from accel.warmup_jobs.report import WarmupReport
from accel.warmup_jobs.scheduler import Limits, Outcome, Task, run_tasks

Graph = tuple[str, str | None, str | None]  # bundle, variant, target; None: TensorRT, for which most are
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
    machine with a GPU its engines are also loaded, warmed up and timed, and then each bundle is measured on every
    engine that runs it there, as ``accel bench`` does: ``accel.load`` takes the fastest from then on. Ctrl-C and
    SIGTERM stop the builds and end in a report, too.

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
    job.engines = [Engine(planned) for planned in Planner(place).plan(wanted)]
    job.contests = job.plan_contests(plan=True)
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
class _Job:
    """One job on its way."""

    store: EngineStore
    url: str | None
    limits: Limits
    show: bool
    engines: list[Engine] = field(default_factory=list)
    contests: list[Contest] = field(default_factory=list)
    logs: Path = Path()
    begun: list[Task] = field(default_factory=list)
    interrupted: bool = False
    gpu: str | None = field(default_factory=lambda: current_sm())
    absent: str | None = field(default_factory=lambda: missing_gpu())  # why there is no GPU, for what needs no SM

    def run(self, wanted: Sequence[Wanted], stopped: Callable[[], bool]) -> None:
        """Variants, then builds, then runs, then contests."""
        added = self._add_variants(stopped)
        planner = Planner(self.store, verify="://" not in self.store.url)
        self.engines = [Engine(planned) for planned in planner.plan(wanted)]
        for engine in self.engines:
            task = engine.variant = added.get(self._graph(engine, engine.planned.variant))
            if engine.planned.missing is not None:
                failed = task is not None and task.outcome is not None and task.outcome.error is not None
                engine.stopped = not failed
                if task is not None and failed:
                    engine.failure, engine.log = why(task), task.log
        self._build(stopped)
        self._run_engines(stopped)
        self._measure(stopped)
        self.interrupted = stopped()

    def say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

    @staticmethod
    def _graph(engine: Engine, variant: str | None) -> Graph:
        wanted = engine.planned.wanted
        return wanted.bundle, variant, wanted.target if wanted.target in WARMED else None

    def _add_variants(self, stopped: Callable[[], bool]) -> dict[Graph, Task]:
        """Adds each missing precision once; returns the tasks that did it, or failed to."""
        missing = [self._graph(engine, engine.planned.missing) for engine in self.engines]
        tasks: dict[Graph, Task] = {}
        for bundle, variant, target in dict.fromkeys(missing):
            if variant is not None:
                request = {"do": "variant", "bundle": bundle, "variant": variant, "target": target}
                name = " ".join(filter(None, (Path(bundle).name, variant, target)))
                tasks[bundle, variant, target] = self._task(name, variant_memory(bundle), request)
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
        there = [engine for engine in self.engines if status_of(engine) in ("hit", "built")]
        removed = removed_engines(self.store, [digest for engine in there if (digest := digest_of(engine))])
        for engine in there:
            if digest_of(engine) in removed:
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

    def _runs_here(self, engine: Engine) -> bool:
        """Whether it is for this machine's GPU."""
        wanted = engine.planned.wanted
        return self.absent is None if wanted.target in WARMED else self.gpu is not None and wanted.sm == self.gpu

    def _run_engines(self, stopped: Callable[[], bool]) -> None:
        """Loads, warms up and times this GPU's engines, one at a time: they share its memory and its clock."""
        runs = {}
        for engine in self.engines:
            if self._runs_here(engine) and status_of(engine) in ("hit", "built"):
                wanted = engine.planned.wanted
                do = "warm" if wanted.target in WARMED else "run"
                request = {"do": do, "wanted": to_dict(wanted), "variant": engine.planned.variant, "store": self.url}
                runs[engine] = self._task(f"{engine.planned.title} run", engine.planned.memory, request, True)
                engine.log = runs[engine].log
        self._run_tasks(list(runs.values()), stopped)
        for engine, task in runs.items():
            if task.outcome is None:
                engine.stopped = True
            elif task.outcome.error is not None:
                compiles = engine.planned.wanted.target in WARMED
                engine.failure = f"{'It' if compiles else 'It was built but'} does not run: {why(task)}"
            elif task.outcome.result is not None:
                engine.latency = task.outcome.result["latency_ms"]

    def plan_contests(self, plan: bool = False) -> list[Contest]:
        """Of all bundles; ``plan``: before anything was built."""
        return plan_contests(self.engines, self._runs_here, self.absent, self.url, plan)

    def _measure(self, stopped: Callable[[], bool]) -> None:
        """Measures the bundles that have engines here, one at a time."""
        self.contests = self.plan_contests()
        for contest in self.contests:
            if contest.status == "miss":
                request = {"do": "measure", "bundle": contest.bundle, "store": self.url}
                contest.task = self._task(f"{Path(contest.bundle).name} measure", contest.memory, request, True)
        self._run_tasks([contest.task for contest in self.contests if contest.task], stopped)

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
        """Those that say why an engine is missing, or was not measured."""
        failed = [status_of(engine) == "failed" for engine in self.engines]
        if not any([*failed, *(contest.line().status == "failed" for contest in self.contests)]):
            return set()
        return {task.log for task in self.begun if task.reasons and task.log is not None}

    def report(self, started: float, dry_run: bool) -> WarmupReport:
        lines = tuple(line_of(engine, dry_run, self.absent) for engine in self.engines)
        seconds = round(time.monotonic() - started, 3)
        measured = tuple(contest.line() for contest in self.contests)
        gpu = None if dry_run else self.gpu
        return WarmupReport(self.store.url, lines, dry_run, self.interrupted, gpu, seconds, measured)


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
