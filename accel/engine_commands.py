"""What the subcommands for TensorRT engines do, given their parsed options. Returns the exit code."""

from __future__ import annotations

import json
from argparse import Namespace

import accel
from accel.errors import AccelError


def warmup(options: Namespace) -> int:
    """Builds what a jobs file asks for; 1 when an engine is missing in the end, 130 when it was stopped."""
    from accel.warmup_jobs import SummaryError

    names = ("store", "dry_run", "workers", "memory", "retries")
    choices = {name: getattr(options, name) for name in names}
    try:
        report = accel.warmup(options.jobs, **choices, show_progress=None if options.json else True)
    except SummaryError as error:  # the report was made: whoever waited for it reads it all the same
        if options.json:
            print(json.dumps({**error.report.to_json(), "ok": False, "error": as_json(error)}))
            return 1
        print(error.report, flush=True)
        raise
    print(json.dumps(report.to_json()) if options.json else report)
    if report.interrupted:
        return 130
    return 0 if report.ok else 1


def as_json(error: AccelError) -> dict[str, str | None]:
    """An error as the ``error`` of a JSON object."""
    return {"type": type(error).__name__, "what": error.what, "where": error.where, "remedy": error.remedy}


__all__ = ["warmup"]
