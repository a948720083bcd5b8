"""What the measurements were made on, and how much memory is there."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.machine import available_cores, probe_cpu


def describe_machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GB (1e9 bytes), kernel and Python."""
    return {
        "cpu": probe_cpu().model,
        "cores": available_cores(),
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


@dataclass(frozen=True)
class Resident:
    """Resident bytes: all of them, and those that belong to no file (file pages can be dropped and read again)."""

    total: int
    anonymous: int


def tree_resident(root: int) -> Resident:
    """Resident memory of a process and all its descendants, summed (pages they share count once for each)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rsplit(") ", 1)[1].split()
            except (OSError, IndexError):  # it ended meanwhile
                continue
            parents[int(entry.name)] = int(fields[1])
    total = anonymous = 0
    pending = [root]
    while pending:
        pid = pending.pop()
        status = process_status(pid)
        total += status.get("VmRSS", 0)
        anonymous += status.get("RssAnon", 0)
        pending += [child for child, parent in parents.items() if parent == pid]
    return Resident(total, anonymous)


def process_status(pid: int | str = "self") -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes by name; empty when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
