"""Lines about long work where no bar is shown."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accel import progress
from accel.exporter.progress import ExportProgress
from accel.progress import LOGGER, PhaseLog, phases_on_stderr


def test_a_phase_and_its_share(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line as it begins, and then one in half a minute at most."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, LOGGER.name), ExportProgress(show=False) as shown:
        shown.stage("Quantising", 1000)
        for now[0] in range(0, 95, 5):
            shown.advance(10)
        shown.stage("Hashing")
        shown.advance(10)
    assert caplog.messages == ["Quantising", "Quantising: 7 %", "Quantising: 13 %", "Quantising: 19 %", "Hashing"]


def test_commands_send_phases_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with phases_on_stderr():
        PhaseLog().start("Lowering")
    PhaseLog().start("nobody listens")
    captured = capsys.readouterr()
    assert captured.err[8:] == " Lowering\n" and captured.out == ""
    assert not LOGGER.handlers and LOGGER.level == logging.NOTSET


def test_each_line_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a library configures logging while a command runs."""
    monkeypatch.setattr(logging.root, "handlers", [])
    with phases_on_stderr():
        logging.basicConfig()
        PhaseLog().start("Lowering")
    assert capsys.readouterr().err.count("Lowering") == 1 and LOGGER.propagate


def test_bars_need_no_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with phases_on_stderr():
        PhaseLog().start("Lowering")
    assert capsys.readouterr().err == ""


def test_a_log_of_quantize_says_what_it_does(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """In CI, with stdout kept for the answer."""
    bundle = shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle")
    command = [sys.executable, "-m", "accel", "quantize", bundle, "--variant", "fp16", "--target", "tensorrt", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "Lowering to TensorRT, fp16\n" in done.stderr and "Checking parity\n" in done.stderr
    assert done.stdout.startswith("{") and "Lowering" not in done.stdout
