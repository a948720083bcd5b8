"""``accel bench``: one bundle, measured beside eager PyTorch on its own weights."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel.bench.cases import Case
from accel.bench.client import WorkerFailure, WorkerProcess
from accel.bench.limits import Limits, measure_limits, work_of
from accel.bench.machine import describe_machine
from accel.bench.prepare import OPEN_LIMIT_S
from accel.bench.runner import Pace, Rounds, take_turn
from accel.bench.stats import Ratio, median, paired_ratio
from accel.bundle import Bundle
from accel.errors import EngineError, InputError
from accel.manifest import Manifest
from accel.spec import ArchSpec

OURS, TORCH = "accel", "torch-bundle"


@dataclass(frozen=True)
class BenchRow:
    """One metric: medians in ms, the paired ratio to eager PyTorch, and the machine's limit in ms (None: not known)."""

    metric: str
    accel_ms: float
    torch_ms: float | None
    ratio: Ratio | None
    limit_ms: float | None


@dataclass(frozen=True)
class BenchReport:
    """What was measured.

    Attributes:
        bundle: Name of the bundle's directory.
        rows: One per metric.
        comparison: ``eager PyTorch``, or why it was not measured.
        limits: The machine's limits, when they were measured.
        machine: CPU, cores, memory, system.
    """

    bundle: str
    rounds: int
    threads: int
    rows: tuple[BenchRow, ...]
    comparison: str
    limits: Limits | None
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.bundle} on {self.machine['cpu']}, {self.threads} threads, medians of {self.rounds} rounds"
        lines = [head, f"{'':34}{'accel ms':>10}{'PyTorch ms':>12}{'accel/PyTorch':>15}{'of the limit':>14}"]
        for row in self.rows:
            torch = f"{row.torch_ms:12.2f}" if row.torch_ms is not None else f"{'-':>12}"
            ratio = f"{row.ratio.median:15.3f}" if row.ratio else f"{'-':>15}"
            share = f"{100 * row.limit_ms / row.accel_ms:13.0f}%" if row.limit_ms else f"{'-':>14}"
            lines.append(f"{row.metric:34}{row.accel_ms:10.2f}{torch}{ratio}{share}")
        if self.comparison != "eager PyTorch":
            lines.append(f"Not compared with PyTorch: {self.comparison}")
        if self.limits:
            read, gemm = self.limits.read_bytes_s / 1e9, self.limits.gemm_flops_s / 1e9
            lines.append(f"Limits of this machine: reading {read:.1f} GB/s, fp32 matrix product {gemm:.0f} GFLOP/s")
        return "\n".join(lines)


def bench_bundle(
    path: Path,
    rounds: int,
    threads: int | None,
    shapes: Sequence[tuple[int, int]],
    prompt_tokens: int,
    new_tokens: int,
    compare: bool,
    with_limits: bool,
) -> BenchReport:
    """See ``accel.bench.bench``."""
    manifest = Bundle.open(path).manifest
    threads = threads or len(os.sched_getaffinity(0))
    cases = cases_of(manifest.arch, shapes, prompt_tokens, new_tokens)
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}", where="rounds", remedy="Leave it out for 7")
    limits = measure_limits(threads) if with_limits else None
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    comparison = "eager PyTorch"
    if missing or not compare:
        comparison = f"{' and '.join(missing)} not installed" if missing else "not asked for"
    with tempfile.TemporaryDirectory() as logs:
        workers: dict[str, WorkerProcess] = {}
        try:
            _open(workers, OURS, path, threads, cases, Path(logs))
            if comparison == "eager PyTorch":
                try:
                    _open(workers, TORCH, path, threads, cases, Path(logs))
                except WorkerFailure as failure:
                    comparison = str(failure)
            measured = _measure(workers, cases, rounds)
        except WorkerFailure as failure:
            raise EngineError(f"The bundle could not be measured: {failure}", where=str(path)) from failure
        finally:
            for worker in workers.values():
                worker.close()
    rows = tuple(_row(manifest, case, metric, measured, limits) for case in cases for metric in case.metrics)
    return BenchReport(path.resolve().name, rounds, threads, rows, comparison, limits, describe_machine())


def cases_of(
    arch: ArchSpec, shapes: Sequence[tuple[int, int]], prompt_tokens: int, new_tokens: int
) -> tuple[Case, ...]:
    """The cases that suit the model.

    Raises:
        InputError: Nothing fits, or a size is not positive.
    """
    if arch.kind == "decoder":
        if min(prompt_tokens, new_tokens) < 1 or prompt_tokens + new_tokens + 1 > arch.max_positions:
            what = f"{prompt_tokens} and {new_tokens + 1} new tokens do not fit {arch.max_positions} positions"
            raise InputError(what, where="prompt_tokens, new_tokens", remedy="Ask for fewer, at least one of each")
        return (Case(f"{prompt_tokens}+{new_tokens} tokens", "decoder", prompt=prompt_tokens, new=new_tokens),)
    fitting = [(batch, seq) for batch, seq in shapes if batch >= 1 and 1 <= seq <= arch.max_positions]
    if not fitting:
        what = f"no shape of {list(shapes)} fits {arch.max_positions} positions"
        raise InputError(what, where="shapes", remedy="Give (batch, sequence) pairs of positive numbers")
    return tuple(Case(f"forward {batch}x{seq}", "encoder", batch=batch, seq=seq) for batch, seq in fitting)


def _open(
    workers: dict[str, WorkerProcess], peer: str, path: Path, threads: int, cases: Sequence[Case], logs: Path
) -> None:
    arguments = [peer, "bundle", str(path), str(path), str(threads)]
    environment = {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    worker = WorkerProcess(Path(sys.executable), arguments, environment, logs / f"{peer}.log")
    workers[peer] = worker
    try:
        worker.ask("open", limit_s=OPEN_LIMIT_S, role=cases[0].role)
        for case in cases:
            take_turn(worker, case, Pace(1, repetitions=1, seconds=0.0))
    except WorkerFailure:
        workers.pop(peer).close()
        raise


def _measure(workers: dict[str, WorkerProcess], cases: Sequence[Case], rounds: int) -> Rounds:
    measured: Rounds = {peer: {} for peer in workers}
    for number in range(rounds):
        for case in cases:
            for peer in sorted(workers, reverse=bool(number % 2)):
                for metric, value in take_turn(workers[peer], case, Pace(rounds)).items():
                    measured[peer].setdefault(metric, []).append(value)
    return measured


def _row(manifest: Manifest, case: Case, metric: str, measured: Rounds, limits: Limits | None) -> BenchRow:
    ours, theirs = measured[OURS][metric], measured.get(TORCH, {}).get(metric)
    limit = None
    if limits is not None:
        if case.role == "encoder":
            work = work_of(manifest, case.batch, case.seq)
        elif metric.endswith("first token"):
            work = work_of(manifest, 1, case.prompt)
        else:
            work = work_of(manifest, 1, 1, past=case.prompt + case.new // 2)
        limit = 1e3 * work.seconds(limits)
    ratio = paired_ratio(ours, theirs) if theirs else None
    return BenchRow(metric, median(ours), median(theirs) if theirs else None, ratio, limit)
