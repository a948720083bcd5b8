"""How many cache positions fit: bytes per token from the architecture, memory from the kernel and its cgroups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from accel.engines.session import SessionOptions
from accel.errors import CapacityError, InputError
from accel.spec import ArchSpec

DEFAULT_MAX_BATCH = 8
DEFAULT_CAPACITY = 4096  # positions; more only when asked for
_MEMORY_SHARE = 2  # the default takes at most one part in this many of what is available
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CacheShape:
    """A decoder cache's size: ``rows`` sequences of ``capacity`` positions each."""

    rows: int
    capacity: int


def bytes_per_token(arch: ArchSpec, item_bytes: int = 4) -> int:
    """Bytes that one position of one row takes in all layers' keys and values together."""
    return sum(2 * layer.kv_heads * layer.head_dim * item_bytes for layer in arch.layers)


def available_memory() -> int | None:
    """Bytes this process may still take, within its cgroups' limits; None where the kernel does not say."""
    candidates = [amount for amount in (_meminfo_available(), _cgroup_available()) if amount is not None]
    return min(candidates, default=None)


def resolve_cache(arch: ArchSpec, options: SessionOptions, item_bytes: int = 4) -> CacheShape:
    """Rows and capacity for a decoder: what the caller asked for, checked, or defaults that fit.

    The default capacity is ``arch.max_positions``, at most 4,096 and at most what half of the available
    memory holds for all rows. The cache is committed page by page as it fills, so the default costs
    little until it is used; an explicit capacity must fit when full.

    Raises:
        InputError: A capacity or max_batch below 1, or no integer.
        CapacityError: The capacity exceeds the model's positions, or the cache cannot fit in memory.
    """
    rows = check_count("max_batch", options.max_batch) or DEFAULT_MAX_BATCH
    asked = check_count("capacity", options.capacity)
    row_bytes = max(1, rows * bytes_per_token(arch, item_bytes))
    memory = available_memory()
    if asked is not None:
        _check_asked(arch, asked, rows, row_bytes, memory)
        return CacheShape(rows, asked)
    fitting = memory // _MEMORY_SHARE // row_bytes if memory is not None else DEFAULT_CAPACITY
    if fitting < 1:
        raise CapacityError(
            f"not one cache position fits: {rows} rows need {row_bytes:,} bytes each position, and half of the "
            f"{memory or 0:,} available bytes is the limit",
            where="max_batch",
            remedy="Load with a smaller max_batch, or free memory",
        )
    return CacheShape(rows, min(arch.max_positions, DEFAULT_CAPACITY, fitting))


def check_count(name: str, value: object) -> int | None:
    """An optional argument that must be an integer of at least 1.

    Raises:
        InputError: It is not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, not {value!r}", where=name)
    return value


def with_cache(options: SessionOptions, shape: CacheShape) -> SessionOptions:
    """The options with rows and capacity settled."""
    return replace(options, max_batch=shape.rows, capacity=shape.capacity)


def _check_asked(arch: ArchSpec, asked: int, rows: int, row_bytes: int, memory: int | None) -> None:
    if asked > arch.max_positions:
        raise CapacityError(
            f"capacity {asked:,} exceeds the {arch.max_positions:,} positions that the model covers",
            where="capacity",
            remedy=f"Ask for at most {arch.max_positions:,}",
        )
    if memory is not None and asked * row_bytes > memory:
        raise CapacityError(
            f"a cache of {rows} rows of {asked:,} positions takes {asked * row_bytes:,} bytes when full, "
            f"but {memory:,} are available",
            where="capacity",
            remedy=f"Ask for at most {memory // row_bytes:,} positions, or load with a smaller max_batch",
        )


def _meminfo_available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_available(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least room under any memory limit from this process's cgroup up to the root (v2, then v1)."""
    room: int | None = None
    for folder in _cgroup_folders(root, membership):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            if limit is None or usage is None or limit >= 1 << 60:  # v1 writes "no limit" as a huge number
                continue
            left = max(0, limit - usage + _reclaimable(folder))
            room = left if room is None else min(room, left)
    return room


def _cgroup_folders(root: Path, membership: Path) -> list[Path]:
    folders = [root, root / "memory"]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        current = base / path.lstrip("/")
        while current != base and base in current.parents:
            folders.append(current)
            current = current.parent
    return folders


def _reclaimable(folder: Path) -> int:
    """Page cache counts as used, but the kernel gives it back under pressure (mapped weights are such pages)."""
    try:
        fields = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", fields.get("total_inactive_file", "0")))
    except (OSError, ValueError):
        return 0


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


__all__ = ["CacheShape", "available_memory", "bytes_per_token", "check_count", "resolve_cache", "with_cache"]
