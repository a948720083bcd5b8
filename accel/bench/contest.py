"""Every engine on every variant of a bundle that runs here, and PyTorch beside them, measured in interleaved rounds."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accel.bench.cases import Case
from accel.bench.client import WorkerFailure, WorkerProcess
from accel.bench.machine import meminfo_bytes
from accel.bench.prepare import OPEN_LIMIT_S
from accel.bench.runner import MEMORY_SHARE, Pace, Rounds, take_turn
from accel.bench.stats import median
from accel.bundle import Bundle
from accel.engines import ENGINES, Engine
from accel.engines.choice import fastest_first
from accel.errors import AccelError
from accel.machine import has_nvidia_device
from accel.measurements import Device, Measured, graph_digest

TORCH = "torch-bundle"
COSTS = {"encoder": "geometric mean over the shapes", "decoder": "first token and those after it"}


@dataclass(frozen=True)
class Contestant:
    """An engine on a variant. Without a target (the reference engine) its figures are shown, not remembered."""

    engine: str
    variant: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.variant}"


@dataclass
class Outcome:
    """What a contest found.

    Attributes:
        groups: Name -> metric -> one figure per round; those of a group took turns. Several groups where not all fit
            into memory at once: each then holds the first contestant, and PyTorch.
        failed: Name -> reason.
    """

    groups: list[Rounds] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def rounds(self, name: str) -> Rounds | None:
        """The group that a contestant was measured in; None: it was not."""
        return next((group for group in self.groups if name in group), None)

    def medians(self, name: str) -> dict[str, float]:
        """Metric -> median ms; of a later group at the first group's pace, as the contestant of both tells it."""
        group = self.rounds(name)
        assert group is not None
        found = {metric: median(times) for metric, times in group[name].items()}
        anchor = next(other for other in self.groups[0] if other != TORCH)
        if group is self.groups[0] or anchor not in group:
            return found
        first, here = self.groups[0][anchor], group[anchor]
        return {metric: time * median(first[metric]) / median(here[metric]) for metric, time in found.items()}


def find_contestants(
    bundle: Bundle, device: Literal["auto", "cpu", "cuda"]
) -> tuple[Device, list[Contestant], dict[str, str]]:
    """Which engines run which variants here, in the order in which loading tries them.

    PyTorch's reference engine, which computes step by step to be exact, takes part where nothing else runs.

    Args:
        bundle: The bundle.
        device: ``auto``: the GPU where an engine runs on one, else the CPU.

    Returns:
        The device, the contestants, and engine -> why it runs none of them, ``variant for target`` -> what is lost.
    """
    wanted: list[Device] = ["cuda", "cpu"] if device == "auto" and has_nvidia_device() else ["cpu"]
    if device != "auto":
        wanted = [device]
    found: list[Contestant] = []
    passed_over: dict[str, str] = {}
    for place in wanted:
        for engine in (engine for engine in ENGINES if engine.device == place and engine.target):
            runs, reason = _runnable(bundle, engine)
            found += runs
            if reason is not None:
                passed_over[engine.name] = reason
        if found:
            return place, found, passed_over | _lost(bundle)
    for engine in (engine for engine in ENGINES if engine.device == wanted[-1] and not engine.target):
        if (reason := engine.probe(bundle, "auto")) is None:
            found.append(Contestant(engine.name, "auto", ""))
        else:
            passed_over[engine.name] = reason
    return wanted[-1], found, passed_over | _lost(bundle)


def _lost(bundle: Bundle) -> dict[str, str]:
    """``variant for target`` of each graph that files are lost of -> which, and what mends it."""
    reasons = {key: bundle.lost_reason(*key) for key in bundle.lost}
    return {f"{variant} for {target}": reason for (variant, target), reason in reasons.items() if reason is not None}


def _runnable(bundle: Bundle, engine: Engine) -> tuple[list[Contestant], str | None]:
    """The variants that an engine runs; where there is none, why."""
    variants = [name for name, variant in bundle.manifest.variants.items() if engine.target in variant.graphs]
    first = engine.pick(bundle, "auto")
    found, reasons = [], []
    for variant in sorted(variants, key=lambda name: name != first):
        try:
            reason = engine.probe(bundle, variant)
        except AccelError as error:
            reason = str(error)
        if reason is None:
            found.append(Contestant(engine.name, variant, engine.target))
        else:
            reasons.append(reason)
    if found:
        return found, None
    return [], reasons[0] if reasons else engine.probe(bundle, "auto") or "the bundle has no graph for it"


@dataclass(frozen=True)
class Arena:
    """How contestants run: the bundle, the threads of each, the cases, the rounds, and where logs and engines are.

    ``say`` takes a line for each contestant that is ready, or failed, and for each round: a contest takes minutes.
    """

    bundle: Path
    threads: int
    cases: Sequence[Case]
    rounds: int
    logs: Path
    store: str | None
    say: Callable[[str], None] = lambda line: None

    def run(self, contestants: Sequence[Contestant], with_torch: bool) -> Outcome:
        """Measures all of them; one that fails is left out, with its reason."""
        outcome = Outcome()
        by_name = {contestant.name: contestant for contestant in contestants}
        pending = list(by_name)
        while pending:
            anchors = [pending.pop(0)] if not outcome.groups else [next(n for n in outcome.groups[0] if n != TORCH)]
            workers: dict[str, WorkerProcess] = {}
            try:
                for name in [*anchors, *([TORCH] if with_torch and TORCH not in outcome.failed else [])]:
                    self._open(workers, name, by_name, outcome)
                pending = self._fill(workers, pending, by_name, outcome)
                measured = self._measure(workers, outcome)
                if any(name != TORCH for name in measured):
                    outcome.groups.append(measured)
            finally:
                for worker in workers.values():
                    worker.close()
        return outcome

    def _fill(
        self, workers: dict[str, WorkerProcess], pending: list[str], by_name: dict[str, Contestant], outcome: Outcome
    ) -> list[str]:
        """Opens as many as fit into memory, one at least; returns the rest."""
        budget = MEMORY_SHARE * meminfo_bytes("MemAvailable") / 1e6
        used, opened = 0.0, 0
        for index, name in enumerate(pending):
            used += self._open(workers, name, by_name, outcome)
            if name in workers and opened and used > budget:
                workers.pop(name).close()
                return pending[index:]
            opened += name in workers
        return []

    def _open(
        self, workers: dict[str, WorkerProcess], name: str, by_name: dict[str, Contestant], outcome: Outcome
    ) -> float:
        """Starts one and has it answer every case once; returns its resident megabytes, 0 when it failed."""
        peer = TORCH if name == TORCH else "accel"
        arguments = [peer, "bundle", str(self.bundle), str(self.bundle), str(self.threads)]
        environment = {"OMP_NUM_THREADS": str(self.threads), "TRANSFORMERS_VERBOSITY": "error"}
        log = self.logs / f"{name.replace(' ', '_')}.log"
        worker = WorkerProcess(Path(sys.executable), arguments, environment, log)
        selection: dict[str, str | None] = {}
        if name in by_name:
            selection = {"engine": by_name[name].engine, "variant": by_name[name].variant, "store": self.store}
        started = time.monotonic()
        try:
            worker.ask("open", limit_s=OPEN_LIMIT_S, role=self.cases[0].role, selection=selection)
            for case in self.cases:
                take_turn(worker, case, Pace(1, repetitions=1, seconds=0.0))
            resident: float = worker.ask("memory")["rss"]
        except WorkerFailure as failure:
            worker.close()
            self._fail(name, failure, outcome)
            return 0.0
        except BaseException:
            worker.close()
            raise
        workers[name] = worker
        self.say(f"{_title(name)}: ready after {time.monotonic() - started:.1f} s")
        return resident

    def _fail(self, name: str, failure: WorkerFailure, outcome: Outcome) -> None:
        outcome.failed[name] = str(failure)
        self.say(f"{_title(name)}: failed: {failure}")

    def _measure(self, workers: dict[str, WorkerProcess], outcome: Outcome) -> Rounds:
        measured: Rounds = {name: {} for name in workers}
        order, started = random.Random(0), time.monotonic()
        for done in range(self.rounds):
            if not workers:  # all failed
                break
            for case in self.cases:
                for name in order.sample(sorted(workers), len(workers)):
                    try:
                        times = take_turn(workers[name], case, Pace(self.rounds))
                    except WorkerFailure as failure:
                        self._fail(name, failure, outcome)
                        workers.pop(name).close()
                        measured.pop(name)
                        continue
                    for metric, value in times.items():
                        measured[name].setdefault(metric, []).append(value)
            if measured:
                self._say_round(measured, done + 1, time.monotonic() - started)
        return measured

    def _say_round(self, measured: Rounds, done: int, seconds: float) -> None:
        """What each costs by its medians so far, and the time left."""
        medians = {_title(name): {m: median(found) for m, found in times.items()} for name, times in measured.items()}
        costs = [f"{name} {cost_of(self.cases, times):.3g} ms" for name, times in medians.items()]
        left = f"; about {seconds / done * (self.rounds - done):.0f} s left" if done < self.rounds else ""
        self.say(f"round {done} of {self.rounds}: {', '.join(costs)}{left}")


def _title(name: str) -> str:
    return "eager PyTorch" if name == TORCH else name


def rows_of(
    bundle: Bundle, contestants: Sequence[Contestant], outcome: Outcome, cases: Sequence[Case]
) -> list[Measured]:
    """One row per contestant that was measured, in order."""
    rows = []
    for contestant in contestants:
        if outcome.rounds(contestant.name) is None:
            continue
        times = outcome.medians(contestant.name)
        digest = graph_digest(bundle, contestant.variant, contestant.target) or ""
        rows.append(Measured(contestant.engine, contestant.variant, digest, cost_of(cases, times), times))
    return rows


def cost_of(cases: Sequence[Case], times: dict[str, float]) -> float:
    """What engines are compared by, in ms: see ``COSTS``."""
    if cases[0].role == "encoder":
        return math.exp(sum(math.log(times[case.name]) for case in cases) / len(cases))
    first, per_token = cases[0].metrics
    return times[first] + cases[0].new * times[per_token]


def choose(bundle: Bundle, rows: Sequence[Measured]) -> Measured:
    """The row that ``accel.load`` takes unasked, as soon as it knows these rows."""
    picks = {engine.name: engine.pick(bundle, "auto") for engine in ENGINES if engine.target}
    return fastest_first([row for row in rows if picks.get(row.engine) == row.variant] or rows)[0]


__all__ = ["COSTS", "TORCH", "Arena", "Contestant", "Outcome", "choose", "cost_of", "find_contestants", "rows_of"]
