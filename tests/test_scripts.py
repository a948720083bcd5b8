from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("target", "driver", "packages"),
    [
        ("rtx", None, "tensorrt-rtx-cu13>=1.7 cuda-python>=12.8"),
        ("rtx", "580.65.06", "tensorrt-rtx-cu13>=1.7 cuda-python>=12.8"),
        ("rtx", "570.133.20", "tensorrt-rtx-cu12>=1.7 cuda-python>=12.8,<13"),
        ("tensorrt", "580.65.06", "tensorrt>=10.15.1 cuda-python>=12.8"),
        ("tensorrt", "570.133.20", "tensorrt-cu12>=10.15.1 cuda-python>=12.8,<13"),
        ("tensorrt", None, None),
        ("trt", "580.65.06", None),
    ],
)
def test_verifying_tensorrt_takes_what_fits_the_driver(
    target: str, driver: str | None, packages: str | None, tmp_path: Path
) -> None:
    """Stand-ins for nvidia-smi, the installation and the interpreter say what they are asked."""
    script = checkout(tmp_path).with_name("verify_tensorrt.sh")
    answer = f"echo {driver}" if driver else "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9"
    stand_ins = {
        tmp_path / "bin" / "nvidia-smi": answer,
        tmp_path / "scripts" / "install.sh": 'echo "install $*"',
        tmp_path / ".venv" / "bin" / "python": 'echo "run $*"; exit 7',
    }
    for path, body in stand_ins.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script, target], capture_output=True, text=True, env=environment)
    if packages is not None:
        installed, ran = done.stdout.splitlines()
        assert installed == f"install export gguf accelerate {packages}"
        assert (ran, done.returncode) == (f"run scripts/verify_tensorrt.py --target {target}", 7)
    else:  # nothing was installed
        said = ("nvidia-smi finds none here", 2) if target == "tensorrt" else ("usage: ", 64)
        assert said[0] in done.stderr and done.returncode == said[1] and done.stdout == ""


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
