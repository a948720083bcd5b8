"""What the subcommands for TensorRT engines do, given their parsed options. Returns the exit code."""

from __future__ import annotations

import json
from argparse import Namespace

import accel


def warmup(options: Namespace) -> int:
    """Builds what a jobs file asks for; 1 when an engine is missing in the end, 130 when it was stopped."""
    names = ("store", "dry_run", "workers", "memory", "retries")
    choices = {name: getattr(options, name) for name in names}
    report = accel.warmup(options.jobs, **choices, show_progress=None if options.json else True)
    print(json.dumps(report.to_json()) if options.json else report)
    if report.interrupted:
        return 130
    return 0 if report.ok else 1


__all__ = ["warmup"]
