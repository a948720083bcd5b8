from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import accel

ROOT = Path(accel.__file__).parents[1]


def checkout(folder: Path) -> Path:
    """A copy of what scripts/install.sh reads."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder / "scripts" / "install.sh"


def test_shell_scripts_parse() -> None:
    paths = [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]
    assert len(paths) >= 4
    for path in paths:
        assert subprocess.run(["bash", "-n", path]).returncode == 0, path
        assert os.access(path, os.X_OK), path


def test_install_without_a_python_says_what_to_do(tmp_path: Path) -> None:
    command = ["bash", checkout(tmp_path), "export"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": "/absent/python"})
    assert done.returncode != 0
    assert "No Python >= 3.11 with venv found" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_install_twice_does_nothing_the_second_time(tmp_path: Path) -> None:
    """A stand-in interpreter records pip's arguments."""
    script = checkout(tmp_path)
    log, python = tmp_path / "log", tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    built = tmp_path / "kernels" / "accel_cpu" / "libaccel_cpu.so"  # what installing the project compiles
    built.parent.mkdir(parents=True, exist_ok=True)
    built.touch()
    python.write_text(f'#!/bin/bash\ncase "$*" in *install*) echo "$*" >> {log};; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "ACCEL_TORCH_INDEX_URL": "https://index.example/cpu"}
    for _ in range(2):
        done = subprocess.run(["bash", script, "export", "gguf"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout
    torch, project, models = log.read_text().splitlines()
    assert torch.endswith("install --constraint constraints.txt --index-url https://index.example/cpu torch")
    assert project.endswith("install --constraint constraints.txt gguf --editable .[export]")
    assert "--no-deps" in models
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_failed_install_is_repeated(tmp_path: Path) -> None:
    script = checkout(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\ncase "$*" in *install*) exit 3;; esac\n')
    python.chmod(0o755)
    for _ in range(2):
        assert subprocess.run(["bash", script, "export"], capture_output=True).returncode == 3


def test_export_script_is_the_command() -> None:
    command = [sys.executable, ROOT / "scripts" / "export.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    assert "--no-parity" in done.stdout
