"""What a warm-up did, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accel.errors import StorageError
from accel.schema import to_dict

Status = Literal["hit", "miss", "built", "failed", "stopped"]
MeasuredStatus = Literal["hit", "miss", "measured", "skipped", "failed", "stopped"]


@dataclass(frozen=True)
class EngineLine:
    """One engine.

    Attributes:
        bundle, target, sm, precision, capacity, max_batch: What was asked for.
        status: ``hit``: the store had it. ``built``: now. ``failed``: see ``reason``. ``stopped``: the job was stopped
            before it was done. ``miss``: in a plan, to be built.
        reason: Why it failed, or is no hit.
        digest: Its name in the store.
        bytes: Size of its plan.
        seconds: That building it took, start of the process included.
        attempts: Builds that were begun.
        retried: Why earlier attempts failed.
        variant_attempts, variant_retried: The same of adding its precision to the bundle; 0: it was there.
        estimated_bytes, estimated_seconds: Memory and time that a build is expected to take; None: not known.
        latency_ms: Median time of a call by profile, of ``cuda`` and ``ort-cuda`` by what was sent; None if not run.
        log: What the build printed.
        note: What of the job was not used for this engine.
        choices: Capacity, rows, profiles and what else was asked for, in words.
    """

    bundle: str
    target: str
    sm: str
    precision: str
    capacity: int | None
    max_batch: int | None
    status: Status
    reason: str | None = None
    digest: str | None = None
    bytes: int | None = None
    seconds: float | None = None
    attempts: int = 0
    retried: tuple[str, ...] = ()
    variant_attempts: int = 0
    variant_retried: tuple[str, ...] = ()
    estimated_bytes: int | None = None
    estimated_seconds: float | None = None
    latency_ms: dict[str, float] | None = None
    log: str | None = None
    note: str | None = None
    choices: str = ""

    def text(self) -> str:
        """One line."""
        name = " ".join((Path(self.bundle).name, self.target, self.sm, self.precision, self.choices)).rstrip()
        parts = [self.reason]
        if self.status == "miss":
            seconds = None if self.estimated_seconds is None else f"some {max(1, round(self.estimated_seconds))} s"
            parts += [f"{(self.estimated_bytes or 0) / 1e9:.1f} GB of memory", seconds]
        if self.status in ("hit", "built") and self.bytes is not None:
            parts.append(f"{self.bytes / 1e6:.1f} MB")
        parts += [f"{self.seconds:.1f} s" if self.seconds is not None else None]
        parts += [f"{self.precision} added at attempt {self.variant_attempts}" if self.variant_attempts > 1 else None]
        parts += [f"attempt {self.attempts}" if self.attempts > 1 else None]
        parts += [f"{profile} {value:.2f} ms" for profile, value in (self.latency_ms or {}).items()]
        parts += [self.note]
        parts += [f"log: {self.log}" if self.status == "failed" and self.log else None]
        return f"{self.status:8}{name}: {', '.join(filter(None, parts))}"


@dataclass(frozen=True)
class MeasuredLine:
    """A bundle whose engines were measured on this machine's GPU, for ``accel.load`` to take the fastest.

    Attributes:
        bundle: Its path.
        status: ``measured``: now. ``hit``: before. ``miss``: in a plan, to be measured. ``skipped``: there is nothing
            to measure here. ``failed``, ``stopped``: see ``reason``.
        reason: Why it was not measured.
        chosen: What ``accel.load`` takes from now on: ``engine variant``.
        engines: ``engine variant`` -> ms that engines are compared by, as ``accel bench`` has it.
        passed_over: Engine, or what of it -> why it was not measured.
        seconds: That it took.
        log: What it printed.
    """

    bundle: str
    status: MeasuredStatus
    reason: str | None = None
    chosen: str | None = None
    engines: dict[str, float] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    log: str | None = None

    def text(self) -> str:
        """A line, and one for each engine that was passed over."""
        name, costs = Path(self.bundle).name, ", ".join(f"{engine} {ms:.3g} ms" for engine, ms in self.engines.items())
        if self.status == "miss":
            return f"To be measured here, for accel.load: {name}"
        if self.status == "hit":
            return f"Measured here before: {name}: {costs}"
        if self.status == "measured":
            lines = [f"Measured: {name}: {costs}; from now on accel.load takes {self.chosen} here"]
            return "\n".join(lines + [f"Not measured: {name} {key}: {said}" for key, said in self.passed_over.items()])
        return f"Not measured: {name}: {self.reason}{f', log: {self.log}' if self.log else ''}"


@dataclass(frozen=True)
class WarmupReport:
    """What a warm-up did, or would do.

    Attributes:
        store: Where the engines are.
        engines: In the job's order.
        dry_run: Whether this is a plan.
        interrupted: Whether Ctrl-C or SIGTERM stopped it.
        gpu: SM of this machine's GPU, whose engines were also run; None: it has none.
        seconds: Of everything.
        measured: One for each bundle.
    """

    store: str
    engines: tuple[EngineLine, ...]
    dry_run: bool = False
    interrupted: bool = False
    gpu: str | None = None
    seconds: float = 0.0
    measured: tuple[MeasuredLine, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all engines are there, and measuring did not fail; of a plan: whether all are or can be built."""
        if any(line.status in ("failed", "stopped") for line in self.measured):
            return False
        return all(line.status in ("hit", "built", *(["miss"] if self.dry_run else [])) for line in self.engines)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the fields, ``ok``, and how many engines there are of each status."""
        return {**to_dict(self), "ok": self.ok, "counts": self.counts()}

    def counts(self) -> dict[str, int]:
        """How many engines there are of each status."""
        found = [line.status for line in self.engines]
        return {status: found.count(status) for status in dict.fromkeys(found)}

    def write(self, path: Path) -> None:
        """Writes ``to_json`` to a file.

        Raises:
            SummaryError: It cannot be written.
        """
        from accel.builder.files import write_atomically

        try:
            write_atomically(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())
        except StorageError as error:
            raise SummaryError(self, path, error) from error

    def __str__(self) -> str:
        lines = [*(line.text() for line in self.engines), *self._measured_lines()]
        counts = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        lines.append(f"{counts}; {self.seconds:.1f} s; store {self.store}")
        if self.interrupted:
            lines.append("Stopped before it was done; the same job goes on from here.")
        if not self.dry_run and self.gpu is None and any(line.target in ("tensorrt", "rtx") for line in self.engines):
            lines.append("Engines were not run: there is no GPU here.")
        return "\n".join(lines)

    def _measured_lines(self) -> list[str]:
        """Bundles that are skipped for one reason share a line."""
        found = [line.text() for line in self.measured if line.status != "skipped"]
        skipped = [line for line in self.measured if line.status == "skipped"]
        for reason in dict.fromkeys(line.reason for line in skipped):
            names = dict.fromkeys(Path(line.bundle).name for line in skipped if line.reason == reason)
            found.append(f"Not measured for accel.load: {', '.join(names)}: {reason}")
        return found


class SummaryError(StorageError):
    """The summary of a job cannot be written.

    Attributes:
        report: What it would have said: the plan, or what was done.
    """

    def __init__(self, report: WarmupReport, path: Path, cause: StorageError) -> None:
        what = f"The job's summary cannot be written: {cause.what}"
        remedy = "Give 'summary' in the jobs file another path, or leave it out"
        super().__init__(what, where=f"summary: {path}", remedy=remedy)
        self.report = report


__all__ = ["EngineLine", "MeasuredLine", "MeasuredStatus", "Status", "SummaryError", "WarmupReport"]
