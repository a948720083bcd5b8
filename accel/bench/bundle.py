"""``accel bench``: one bundle, measured beside eager PyTorch on its own weights."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accel.bench.cases import Case
from accel.bench.contest import COSTS, TORCH, Arena, Contestant, Outcome, choose, find_contestants, rows_of
from accel.bench.limits import Limits, measure_limits, work_of
from accel.bench.machine import describe_machine, today
from accel.bench.roofline import ENGINE, Roofline, measure_roofline
from accel.bench.stats import Ratio, median, paired_ratio
from accel.bundle import Bundle
from accel.engines import check_device, refuse_without_gpu
from accel.errors import EngineError, EngineUnavailableError, InputError, StorageError
from accel.machine import available_cores
from accel.manifest import Manifest
from accel.measurements import Device, Measured, remember
from accel.spec import ArchSpec

EAGER = "eager PyTorch"
MINIMUM_ROUNDS = 3  # fewer are no ground for a choice that lasts


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
        engines: Every engine on every variant that runs here; the rows are those of the chosen one.
        chosen: What ``accel.load`` takes unasked: ``engine variant``.
        passed_over: Engine, ``engine variant``, or ``variant for target`` -> why it was not measured.
        roofline: Where the ``cuda`` engine's time goes and how near the GPU's limits it is, if it ran here.
        no_roofline: Why that could not be measured, though the engine ran; the rest stands all the same.
        elsewhere: Variant that no engine runs here -> the targets of its graphs.
        remembered: Whether ``accel.load`` knows this from now on; if not, ``unremembered`` says why.
    """

    bundle: str
    rounds: int
    threads: int
    rows: tuple[BenchRow, ...]
    comparison: str
    limits: Limits | None
    machine: dict[str, Any]
    engines: tuple[Measured, ...] = ()
    chosen: str = ""
    passed_over: dict[str, str] = field(default_factory=dict)
    remembered: bool = False
    unremembered: str = ""
    roofline: Roofline | None = None
    elsewhere: dict[str, str] = field(default_factory=dict)
    no_roofline: str = ""

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
        if self.comparison != EAGER:
            lines.append(f"Not compared with PyTorch: {self.comparison}")
        if self.limits:
            read, gemm = self.limits.read_bytes_s / 1e9, self.limits.gemm_flops_s / 1e9
            lines.append(f"Limits of this machine: reading {read:.1f} GB/s, fp32 matrix product {gemm:.0f} GFLOP/s")
        if self.roofline:
            lines += ["", str(self.roofline)]
        if self.no_roofline:
            lines.append(f"No roofline of {ENGINE}: {self.no_roofline}")
        return "\n".join([*lines, *self._engine_lines()])

    def _engine_lines(self) -> list[str]:
        if not self.engines:
            return []
        metrics = [row.metric for row in self.rows]
        width = max(10, *(len(metric) + 2 for metric in metrics))
        lines = ["", f"{'Engines, medians in ms':34}" + "".join(f"{metric:>{width}}" for metric in metrics)]
        for row in self.engines:
            name = f"{row.engine} {row.variant}"
            times = "".join(f"{row.times[metric]:{width}.2f}" for metric in metrics)
            lines.append(f"{name:34}{times}{'  <' if name == self.chosen else ''}")
        lines += [f"Not measured: {name}: {reason}" for name, reason in self.passed_over.items()]
        lines += [f"Not measured: {name}: it has graphs for {targets}" for name, targets in self.elsewhere.items()]
        known = f"From now on accel.load takes {self.chosen} here"
        return [*lines, known if self.remembered else f"Not remembered for accel.load: {self.unremembered}"]


def bench_bundle(
    path: Path,
    rounds: int,
    threads: int | None,
    shapes: Sequence[tuple[int, int]],
    prompt_tokens: int,
    new_tokens: int,
    compare: bool,
    with_limits: bool | None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    store: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    batch: int = 1,
) -> BenchReport:
    """See ``accel.bench.bench``; ``say`` takes lines while it is at work."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    check_device(device)
    threads = threads or available_cores()
    cases = cases_of(manifest.arch, shapes, prompt_tokens, new_tokens, batch)
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}", where="rounds", remedy="Leave it out for 7")
    place, contestants, passed_over = find_contestants(bundle, device)
    if not contestants:
        refuse_without_gpu(bundle, device)
        reasons = "; ".join(f"{engine}: {reason}" for engine, reason in passed_over.items())
        what = f"no engine can run this bundle here ({reasons})"
        raise EngineUnavailableError(what, where=str(path), remedy="Mend one of the reasons; accel doctor helps")
    if with_limits and place == "cpu":
        say("measuring what this machine allows")
    limits = measure_limits(threads) if with_limits and place == "cpu" else None
    comparison = _comparison(compare)
    with tempfile.TemporaryDirectory() as logs:
        arena = Arena(path, threads, cases, rounds, Path(logs), store, say)
        outcome = arena.run(contestants, with_torch=comparison == EAGER)
    comparison = outcome.failed.pop(TORCH, comparison)
    passed_over |= outcome.failed
    engines = rows_of(bundle, contestants, outcome, cases)
    if not engines:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items())
        raise EngineError(f"The bundle could not be measured: {reasons}", where=str(path))
    best = choose(bundle, engines)
    chosen = f"{best.engine} {best.variant}"
    rows = tuple(_row(manifest, case, metric, chosen, outcome, limits) for case in cases for metric in case.metrics)
    unremembered = _remember(bundle, place, threads, engines, rounds, passed_over, store)
    roofline, no_roofline = _roofline(bundle, engines, cases, store, say) if with_limits is not False else (None, "")
    return BenchReport(
        path.resolve().name, rounds, threads, rows, comparison, limits, describe_machine(),
        tuple(engines), chosen, passed_over, unremembered is None, unremembered or "", roofline,
        _elsewhere(bundle, contestants), no_roofline,
    )  # fmt: skip


def _elsewhere(bundle: Bundle, contestants: Sequence[Contestant]) -> dict[str, str]:
    """Variants that nothing here runs -> the targets of their graphs."""
    ran = {"fp32", *(one.variant for one in contestants)}  # fp32 is what PyTorch runs, where nothing else does
    variants = bundle.manifest.variants.items()
    return {name: ", ".join(sorted(entry.graphs)) for name, entry in variants if name not in ran and entry.graphs}


def _roofline(
    bundle: Bundle, engines: Sequence[Measured], cases: Sequence[Case], store: str | None, say: Callable[[str], None]
) -> tuple[Roofline | None, str]:
    """Of the fastest variant that the ``cuda`` engine ran, and why there is none, though it ran."""
    ran = [row for row in engines if row.engine == ENGINE]
    if not ran:
        return None, ""
    say("measuring what this GPU allows")
    try:
        return measure_roofline(bundle, min(ran, key=lambda row: row.cost).variant, cases, store), ""
    except Exception as error:  # memory ran out, a kernel does not compile: minutes of figures stand all the same
        return None, str(error).partition("\n")[0]


def _comparison(compare: bool) -> str:
    """``eager PyTorch``, or why it is not measured."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not compare:
        return "not asked for"
    return f"{' and '.join(missing)} not installed" if missing else EAGER


def _remember(
    bundle: Bundle,
    device: Device,
    threads: int,
    rows: Sequence[Measured],
    rounds: int,
    passed_over: dict[str, str],
    store: str | None,
) -> str | None:
    """Keeps the rows for ``accel.load``; returns why not."""
    if rounds < MINIMUM_ROUNDS:
        return f"{rounds} rounds are too few to choose by, {MINIMUM_ROUNDS} are needed"
    known = [row for row in rows if row.graph and row.cost > 0]
    if not known:
        return "only the reference engine runs"
    cost = COSTS[bundle.manifest.arch.kind]
    try:
        remember(
            bundle, device, threads, known,
            cost=cost, rounds=rounds, date=today(), passed_over=passed_over, store=store,
        )  # fmt: skip
    except StorageError as error:
        return str(error)
    return None


def cases_of(
    arch: ArchSpec, shapes: Sequence[tuple[int, int]], prompt_tokens: int, new_tokens: int, batch: int = 1
) -> tuple[Case, ...]:
    """The cases that suit the model; ``batch``: of a decoder's, see ``Case``.

    Raises:
        InputError: Nothing fits, or a size is not positive.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}", where="batch", remedy="1 leaves the batch out")
    if arch.kind == "decoder":
        if min(prompt_tokens, new_tokens) < 1 or prompt_tokens + new_tokens + 1 > arch.max_positions:
            what = f"{prompt_tokens} and {new_tokens + 1} new tokens do not fit {arch.max_positions} positions"
            raise InputError(what, where="prompt_tokens, new_tokens", remedy="Ask for fewer, at least one of each")
        name = f"{prompt_tokens}+{new_tokens} tokens"
        return (Case(name, "decoder", batch=batch, prompt=prompt_tokens, new=new_tokens),)
    fitting = [(batch, seq) for batch, seq in shapes if batch >= 1 and 1 <= seq <= arch.max_positions]
    if not fitting:
        what = f"no shape of {list(shapes)} fits {arch.max_positions} positions"
        raise InputError(what, where="shapes", remedy="Give (batch, sequence) pairs of positive numbers")
    return tuple(Case(f"forward {batch}x{seq}", "encoder", batch=batch, seq=seq) for batch, seq in fitting)


def _row(manifest: Manifest, case: Case, metric: str, chosen: str, outcome: Outcome, limits: Limits | None) -> BenchRow:
    group = outcome.rounds(chosen)
    assert group is not None
    ours, theirs = group[chosen][metric], group.get(TORCH, {}).get(metric)
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
