"""Exports that end half way, as whole processes: the exit code, one clear error, and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import accel

ROOT = Path(accel.__file__).parents[1]


def start(source: Path, out: Path, file_limit: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a run that a shell started in the background ignores it
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, "-m", "accel", "export", source, out]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=limit)


def wait_for_half_an_export(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the temporary sibling holds its first file."""
    deadline = time.monotonic() + 120
    while not any(path.is_file() for path in folder.glob(".out.tmp-*/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm(tiny_decoder_source: Path, tmp_path: Path, number: int, code: int) -> None:
    process = start(tiny_decoder_source, tmp_path / "out")
    wait_for_half_an_export(process, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors and errors.endswith("\nInterrupted.\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_kill_leaves_no_bundle_and_the_next_export_cleans_up(tiny_decoder_source: Path, tmp_path: Path) -> None:
    process = start(tiny_decoder_source, tmp_path / "out")
    wait_for_half_an_export(process, tmp_path)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    accel.export(tiny_decoder_source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_no_space_for_the_weights(tiny_decoder_source: Path, tmp_path: Path) -> None:
    process = start(tiny_decoder_source, tmp_path / "out", file_limit=100_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert "larger than this process or file system allows" in errors
    assert "nothing was left behind" in errors
    assert os.listdir(tmp_path) == []
