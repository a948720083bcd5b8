"""What the command line starts: measuring rows, or comparing them with their references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from accel_kernels.benchmark import report
from accel_kernels.benchmark.agreement import agreements
from accel_kernels.benchmark.measure import measure
from accel_kernels.benchmark.problem import Row
from accel_kernels.benchmark.timing import measure_limits
from accel_kernels.device import INTERPRETED, capability, has_warp_jobs


def measure_rows(rows: Sequence[Row], path: Path | None) -> int:
    """Measures on the current GPU, prints the table and writes the file; 1 if anything failed."""
    device = torch.device("cuda", torch.cuda.current_device())
    limits = measure_limits(device)
    about = report.environment(device, limits)
    print(report.head(about), flush=True)
    rows, left_out = _runnable(rows, device)
    found = measure(rows, device, limits, lambda row: print(report.line(row), flush=True))
    if path is not None:
        report.write(path, about, found, left_out)
    return int(any(row.failed for row in found))


def why_not(row: Row, device: torch.device) -> str | None:
    """Why the GPU, or the interpreter, cannot run a row; None: it can."""
    here = capability(device)
    if row.needs > here:
        return f"it needs sm{row.needs[0]}{row.needs[1]}, this is sm{here[0]}{here[1]}"
    if row.warp_jobs and not has_warp_jobs(device):
        return "it needs sm90 itself, and not the interpreter"
    return None


def _runnable(rows: Sequence[Row], device: torch.device) -> tuple[list[Row], list[dict[str, str]]]:
    """The rows that can run here; and the others, which it tells, with why."""
    runnable, left_out = [], []
    for row in rows:
        why = why_not(row, device)
        if why is None:
            runnable.append(row)
            continue
        print(f"{row.kernel:17}{row.shape:62}{row.dtype:11}left out: {why}", flush=True)
        left_out.append({"kernel": row.kernel, "shape": row.shape, "dtype": row.dtype, "why": why})
    return runnable, left_out


def compare_rows(rows: Sequence[Row]) -> int:
    """Runs each row once, in the interpreter or on the current GPU, and prints its errors; 1 if one is too large."""
    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    wrong = 0
    for row in _runnable(rows, device)[0]:
        for found in agreements(row, device):
            wrong += not found.holds
            verdict = "" if found.holds else "  WRONG"
            numbers = f"error {found.error:.1e} of {found.limit:.0e}"
            print(f"{row.kernel:17}{row.shape:62}{row.dtype:11}{numbers:24}{found.way}{verdict}", flush=True)
    return int(wrong > 0)


__all__ = ["compare_rows", "measure_rows", "why_not"]
