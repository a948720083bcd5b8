"""Times of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from accel_kernels.benchmark.agreement import PEER, check_way, peer_result
from accel_kernels.benchmark.problem import Operands, Row
from accel_kernels.benchmark.timing import MOST_RUNS, Limits, Timer, Times

_COMPILERS = 8  # threads; much of compiling is done outside Python


@dataclass(frozen=True)
class Measured:
    """A row's times.

    Attributes:
        launches: By launch parameters; those that cannot run here are missing.
        failed: Why, by launch parameters or ``PEER``.
        peer: Of PyTorch; None: it failed.
        limit: Seconds of the roofline.
        memory_bound: Whether it is that of the memory.
    """

    row: Row
    bytes: int
    flops: int
    limit: float
    memory_bound: bool
    launches: dict[str, Times] = field(default_factory=dict)
    peer: Times | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def launch(self) -> str | None:
        """The fastest launch parameters; None: none could run."""
        return min(self.launches, key=lambda name: self.launches[name].median, default=None)

    @property
    def times(self) -> Times | None:
        """Of the fastest."""
        return None if self.launch is None else self.launches[self.launch]

    @property
    def roofline_percent(self) -> float | None:
        """Of the GPU's limit; above 100 where operands lie in the L2, which is faster than memory."""
        return None if self.times is None else 100 * self.limit / self.times.median

    @property
    def ratio(self) -> float | None:
        """How many times as long PyTorch takes."""
        return None if self.times is None or self.peer is None else self.peer.median / self.times.median

    def as_json(self) -> dict[str, Any]:
        """What the file holds of it; times in microseconds."""
        peer = None if self.peer is None else self.peer.microseconds
        return {
            "kernel": self.row.kernel,
            "shape": self.row.shape,
            "dtype": self.row.dtype,
            "cold": self.row.cold,
            "microseconds": None if self.times is None else self.times.microseconds,
            "launch": self.launch,
            "bytes": self.bytes,
            "flops": self.flops,
            "roofline_microseconds": round(1e6 * self.limit, 3),
            "bound": "memory" if self.memory_bound else "compute",
            "roofline_percent": None if self.roofline_percent is None else round(self.roofline_percent, 1),
            "pytorch": {"ops": self.row.peer, "microseconds": peer},
            "pytorch_ratio": None if self.ratio is None else round(self.ratio, 2),
            "launches": {name: round(1e6 * times.median, 3) for name, times in self.launches.items()},
            "failed": self.failed,
        }


def measure(
    rows: Sequence[Row], device: torch.device, limits: Limits, tell: Callable[[Measured], object]
) -> list[Measured]:
    """Compiles what the rows need, compares it with PyTorch, and takes times row by row.

    Args:
        tell: Gets each row when it is done.
    """
    failures = _compile(rows, device)
    torch.cuda.empty_cache()
    timer, found = Timer(device, limits.spread), []
    for row, failed in zip(rows, failures):
        found.append(_measure_row(row, failed, timer, limits, device))
        tell(found[-1])
        torch.cuda.empty_cache()
    return found


def _compile(rows: Sequence[Row], device: torch.device) -> list[dict[str, str]]:
    """Runs every way of each row once, several threads side by side; of each row what cannot run or is wrong.

    What fails beside others (their operands take memory too) gets a second try alone.
    """

    def attempt(row: Row, way: str) -> tuple[str, str] | None:
        torch.cuda.set_device(device)
        try:
            expected = peer_result(row, device)
        except Exception as error:
            return PEER, _words(error)
        try:
            check_way(row, way, expected, device)
        except Exception as error:
            return way, _words(error)
        return None

    pairs = [(index, way) for index, row in enumerate(rows) for way in row.prepare(Operands(device)).ways]
    failures: list[dict[str, str]] = [{} for _ in rows]
    with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as pool:
        first = attempt(rows[0], pairs[0][1])  # alone: Triton builds what it starts kernels with
        found = [first, *pool.map(lambda pair: attempt(rows[pair[0]], pair[1]), pairs[1:])]
    for index, way in (pair for pair, failure in zip(pairs, found) if failure is not None):
        torch.cuda.empty_cache()
        failure = attempt(rows[index], way)
        failures[index].update([failure] if failure else [])
    return failures


def _measure_row(
    row: Row, failed: dict[str, str], timer: Timer, limits: Limits, device: torch.device
) -> Measured:
    """Times of a row's ways that did not fail before, and of PyTorch."""
    problem = row.prepare(Operands(device, spread=limits.spread, most=MOST_RUNS))
    runs = limits.runs(problem)
    times = {}
    for way, run in {**problem.ways, PEER: problem.peer}.items():
        if way in failed:
            continue
        try:
            times[way] = timer.time(run, runs)
        except Exception as error:
            failed[way] = _words(error)
    return Measured(
        row, problem.bytes, problem.flops, limits.seconds(problem), limits.is_memory_bound(problem),
        peer=times.pop(PEER, None), launches=times, failed=failed,
    )  # fmt: skip


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


__all__ = ["Measured", "measure"]
