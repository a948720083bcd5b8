"""What the measurements were made on, and how much memory is there."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GB (1e9 bytes), kernel and Python."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(meminfo_bytes("MemTotal") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def today() -> str:
    """The date, ISO format, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def meminfo_bytes(field: str) -> int:
    """A field of /proc/meminfo in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def use_cores(count: int) -> None:
    """Keeps this process, and those it starts, on the first ``count`` cores it may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > count:
        os.sched_setaffinity(0, allowed[:count])


def tree_rss_bytes(root: int) -> int:
    """Resident bytes of a process and all its descendants, summed (pages they share count once for each)."""
    page = os.sysconf("SC_PAGE_SIZE")
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rsplit(") ", 1)[1].split()
            except (OSError, IndexError):  # it ended meanwhile
                continue
            parents[int(entry.name)], resident[int(entry.name)] = int(fields[1]), int(fields[21]) * page
    total, pending = 0, [root]
    while pending:
        pid = pending.pop()
        total += resident.get(pid, 0)
        pending += [child for child, parent in parents.items() if parent == pid]
    return total


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
