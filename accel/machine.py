"""What hardware this process may use: cores, memory, instruction sets, NVIDIA GPUs. Standard library only."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
# Instruction sets that decide which kernels run, as Linux names them on x86 and Arm.
ISA = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True)
class Cpu:
    """The processor. ``cores`` is what this process may use, ``logical`` what the machine has."""

    model: str
    architecture: str
    isa: tuple[str, ...]
    cores: int
    logical: int


@dataclass(frozen=True)
class Memory:
    """Bytes. ``limit`` is the least limit of the cgroups around this process; None: none, or unknown."""

    total: int | None
    available: int | None
    limit: int | None


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. Memory in MiB; compute capability as ``"9.0"``."""

    name: str
    driver: str
    memory_mib: int
    compute_capability: str


def probe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """Reads the processor's model and instruction sets; without /proc what ``platform`` knows."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        isa=tuple(name for name in ISA if name in flags),
        cores=available_cores(),
        logical=os.cpu_count() or 1,
    )


def probe_memory() -> Memory:
    """Reads total, available and allowed memory."""
    limits = [limit for limit, _ in _cgroup_memory(CGROUP, Path("/proc/self/cgroup"))]
    return Memory(total=_meminfo("MemTotal"), available=available_memory(), limit=min(limits, default=None))


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use: its affinity, within its cgroup's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _read_quota(cgroup)
    return min(count, max(1, -(-quota // period))) if quota > 0 and period > 0 else count


def available_memory(cgroup: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes this process may still take, within its cgroups' limits; None where the kernel does not say."""
    rooms = [room for _, room in _cgroup_memory(cgroup, membership)]
    free = _meminfo("MemAvailable")
    return min([*rooms, *([] if free is None else [free])], default=None)


def has_nvidia_device() -> bool:
    """Whether an NVIDIA driver is loaded here, by its device files: asking it would take a second."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))


def hidden_gpu() -> str | None:
    """Why this process cannot see the machine's NVIDIA GPUs; None: it can, or there is no sign of any."""
    visible, devices = os.environ.get("CUDA_VISIBLE_DEVICES"), has_nvidia_device()
    if not (devices or NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi")):
        return None
    if visible is not None and (visible.split(",")[0].strip() in ("", "NoDevFiles") or visible.strip().startswith("-")):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs of this machine: unset it to use them"
    if not devices:
        what = "there is an NVIDIA driver, but none of its device files (/dev/nvidiactl)"
        return f"{what}: start the container with its GPUs, e.g. docker run --gpus all"
    return None


def missing_gpu() -> str | None:
    """Why no engine on a GPU can run in this process, whatever is installed; None: a GPU can be seen."""
    return hidden_gpu() or (None if has_nvidia_device() else "there is no NVIDIA GPU or driver here")


def probe_gpus() -> tuple[Gpu, ...]:
    """Asks nvidia-smi; none where there is no driver."""
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout)


def gpu_models(driver: Path = NVIDIA_DRIVER) -> tuple[tuple[str, ...], str]:
    """Names of the NVIDIA GPUs, sorted, and the driver's version, from the driver's files where it has them.

    Asking nvidia-smi, which is done elsewhere (WSL), takes a second.
    """
    names = []
    try:
        version = (driver / "version").read_text()
        for path in driver.glob("gpus/*/information"):
            names += [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line[:6] == "Model:"]
    except OSError:
        version = ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", version)
    if names and found:
        return tuple(sorted(names)), found[0]
    gpus = probe_gpus()
    return tuple(sorted(gpu.name for gpu in gpus)), gpus[0].driver if gpus else ""


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Reads nvidia-smi's CSV: one line each with name, driver, MiB and compute capability."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4:
            memory = int(cells[2]) if cells[2].isdigit() else 0  # "[N/A]" where memory is shared with the CPU
            gpus.append(Gpu(cells[0], cells[1], memory, cells[3]))
    return tuple(gpus)


def _read_quota(cgroup: Path) -> tuple[int, int]:
    """CPU quota and period in microseconds (v2, then v1); 0 or less: no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return (0, 0) if quota == "max" else (int(quota), int(period))
    except (OSError, ValueError):
        pass
    return _read_int(cgroup / "cpu" / "cpu.cfs_quota_us") or 0, _read_int(cgroup / "cpu" / "cpu.cfs_period_us") or 0


def _meminfo(field: str, path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_memory(root: Path, membership: Path) -> list[tuple[int, int]]:
    """Limit and room under it, of every cgroup that limits this process's memory (v2 and v1)."""
    found = []
    files = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _cgroup_folders(root, membership):
        for limit_name, usage_name in files:
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            if limit is not None and usage is not None and limit < 1 << 60:  # v1 writes "no limit" as a huge number
                found.append((limit, max(0, limit - usage + _reclaimable(folder))))
    return found


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
    except (OSError, ValueError):  # absent, or "max"
        return None


__all__ = [
    "Cpu",
    "Gpu",
    "Memory",
    "available_cores",
    "available_memory",
    "gpu_models",
    "has_nvidia_device",
    "hidden_gpu",
    "missing_gpu",
    "parse_gpus",
    "probe_cpu",
    "probe_gpus",
    "probe_memory",
]
