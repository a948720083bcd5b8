"""What a warm-up did, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accel.errors import StorageError
from accel.schema import to_dict

Status = Literal["hit", "miss", "built", "failed", "stopped"]


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
        latency_ms: Median time of a call by profile; None if it was not run.
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
class WarmupReport:
    """What a warm-up did, or would do.

    Attributes:
        store: Where the engines are.
        engines: In the job's order.
        dry_run: Whether this is a plan.
        interrupted: Whether Ctrl-C or SIGTERM stopped it.
        gpu: SM of this machine's GPU, whose engines were also run; None: it has none.
        seconds: Of everything.
    """

    store: str
    engines: tuple[EngineLine, ...]
    dry_run: bool = False
    interrupted: bool = False
    gpu: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether all engines are there; of a plan: whether all are or can be built."""
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
        lines = [line.text() for line in self.engines]
        counts = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        lines.append(f"{counts}; {self.seconds:.1f} s; store {self.store}")
        if self.interrupted:
            lines.append("Stopped before it was done; the same job goes on from here.")
        if not self.dry_run and self.gpu is None:
            lines.append("Engines were not run: there is no GPU here.")
        return "\n".join(lines)


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


__all__ = ["EngineLine", "Status", "SummaryError", "WarmupReport"]
