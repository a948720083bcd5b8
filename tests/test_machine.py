from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from accel import machine

CPUINFO = (
    "processor : 0\nmodel name : Some CPU\nflags : fpu avx2 avx512f amx_int8 zzz\n\nprocessor : 1\nmodel name : x\n"
)


def test_cpu_from_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    cpu = machine.probe_cpu(path)
    assert (cpu.model, cpu.isa) == ("Some CPU", ("avx2", "avx512f", "amx_int8"))
    assert machine.probe_cpu(tmp_path / "absent").model


def test_affinity_limits_the_cores(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.available_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert machine.available_cores(tmp_path) == len(allowed)


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 8), ("150000 100000", 2), ("1000 100000", 1), ("junk", 8)])
def test_quota_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert machine.available_cores(tmp_path) == cores


def test_quota_of_the_older_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000")
    assert machine.available_cores(tmp_path) == 3
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert machine.available_cores(tmp_path) == 8


def write_group(folder: Path, limit: str, usage: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(usage))
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def test_the_tightest_group_limits_the_memory(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    write_group(tmp_path / "outer", "1000000", 900_000, inactive=50_000)
    write_group(tmp_path / "outer" / "inner", "max", 10)
    assert machine.available_memory(tmp_path, membership) == 150_000
    write_group(tmp_path / "outer" / "inner", "20000", 30_000)
    assert machine.available_memory(tmp_path, membership) == 0


def test_memory_without_limits_is_what_the_kernel_says(tmp_path: Path) -> None:
    available = machine.available_memory(tmp_path, tmp_path / "absent")
    assert available is not None
    total = machine.probe_memory().total
    assert total is not None
    assert 0 < available <= total


def test_gpus_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "NVIDIA H200, 570.1, 143771, 9.0\nNVIDIA GB10, 580.2, [N/A], 12.1\nnoise\n"
    assert machine.parse_gpus(text) == (
        machine.Gpu("NVIDIA H200", "570.1", 143771, "9.0"),
        machine.Gpu("NVIDIA GB10", "580.2", 0, "12.1"),
    )
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 550.5, 23034, 8.9'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert machine.probe_gpus() == (machine.Gpu("NVIDIA L4", "550.5", 23034, "8.9"),)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.probe_gpus() == ()


@pytest.mark.parametrize(
    ("there", "found"), [((), False), (("/dev/nvidiactl",), True), (("/dev/dxg",), True), (("/dev/dri",), False)]
)
def test_the_driver_s_device_files(monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], found: bool) -> None:
    """The second is Windows' under WSL. Nothing is started to find out."""
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in there)
    monkeypatch.setattr(machine.subprocess, "run", None)
    assert machine.has_nvidia_device() is found


DRIVER, TOOL, HIDDEN = "/proc/driver/nvidia", "nvidia-smi", "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("there", "visible", "reason"),
    [
        ((), None, None),
        ((), "", None),  # no sign of a GPU
        (("/dev/nvidiactl", DRIVER, TOOL), None, None),
        (("/dev/nvidiactl",), "1,0", None),
        (("/dev/dxg", TOOL), "GPU-5f1c", None),
        ((DRIVER,), None, "none of its device files .*--gpus all"),
        ((TOOL,), "0", "none of its device files"),
        (("/dev/nvidiactl",), "", "CUDA_VISIBLE_DEVICES='' hides"),
        ((DRIVER,), "-1", "CUDA_VISIBLE_DEVICES='-1' hides"),
        (("/dev/nvidiactl",), "NoDevFiles", "hides the GPUs"),
    ],
)
def test_gpus_that_this_process_cannot_see(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], visible: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in there)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv(HIDDEN, raising=False)
    if visible is not None:
        monkeypatch.setenv(HIDDEN, visible)
    found = machine.hidden_gpu()
    assert found is None if reason is None else re.search(reason, str(found))


@pytest.mark.parametrize("hidden", [None, "the GPUs are hidden"])
@pytest.mark.parametrize("devices", [True, False])
def test_a_missing_gpu(monkeypatch: pytest.MonkeyPatch, devices: bool, hidden: str | None) -> None:
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: devices)
    monkeypatch.setattr(machine, "hidden_gpu", lambda: hidden)
    expected = None if devices else "there is no NVIDIA GPU or driver here"
    assert machine.missing_gpu() == (hidden or expected)
