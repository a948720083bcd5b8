"""Jobs that are killed or stopped in the midst: nothing outlives them, and the next run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.store import EngineStore

pytest.importorskip("tensorrt_rtx")
ROOT = Path(accel.__file__).parents[1]
SMS = ["sm75", "sm80", "sm86", "sm89", "sm120"]


@pytest.fixture
def jobs(bundles: Path) -> Path:
    job = {"bundle": "llama", "target": "rtx", "precision": "fp16", "capacity": 32, "max_batch": 2, "sm": SMS}
    path = bundles / "jobs.yaml"
    path.write_text(json.dumps({"store": "store", "summary": "out.json", "logs": "logs", "workers": 2, "jobs": [job]}))
    return path


def start(jobs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, ROOT / "scripts" / "warmup.py", jobs, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until(holds: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def children(jobs: Path) -> list[int]:
    """Processes that build for these jobs: they have this test's cache folder in their environment."""
    mark = f"ACCEL_CACHE={os.environ['ACCEL_CACHE']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = b"accel.warmup_jobs.child" in (folder / "cmdline").read_bytes()
            if is_child and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def stored(jobs: Path) -> list[Path]:
    return list((jobs.parent / "store").rglob("*.json"))


def check_the_next_run(jobs: Path) -> None:
    """It takes what is there, builds the rest, and nothing that it finds is bad."""
    there = len(stored(jobs))
    report = accel.warmup(jobs)
    assert report.ok and report.counts()["hit"] == there
    assert report.counts().get("built", 0) == len(SMS) - there
    entries = EngineStore(jobs.parent / "store").verify()
    assert [entry.problem for entry in entries] == [None] * len(SMS)


def test_killed_and_resumed(jobs: Path) -> None:
    job = start(jobs)
    until(lambda: stored(jobs) and children(jobs))
    job.kill()
    job.wait()
    until(lambda: not children(jobs))  # they notice that nobody waits for them
    assert 1 <= len(stored(jobs)) < len(SMS) and not (jobs.parent / "out.json").exists()
    check_the_next_run(jobs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_with_a_report(number: int, jobs: Path) -> None:
    job = start(jobs)
    until(lambda: stored(jobs) and children(jobs))
    job.send_signal(number)
    assert job.wait(timeout=30) == 130
    assert children(jobs) == []
    summary = json.loads((jobs.parent / "out.json").read_text())
    assert summary["interrupted"] and not summary["ok"]
    assert summary["counts"]["built"] == len(stored(jobs)) >= 1
    assert summary["counts"]["stopped"] == len(SMS) - len(stored(jobs)) >= 1
    if number == signal.SIGINT:
        check_the_next_run(jobs)
