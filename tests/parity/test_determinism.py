"""Engine caches are keyed by a bundle's files: one model gives the same bytes in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPORT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
import accel
from tests.parity.families import build_model
for name in {names!r}:
    accel.export(build_model(name), {folder!r} + "/" + name, show_progress=False)
"""
NAMES = ("llama", "gemma2", "modernbert")


@pytest.fixture(scope="module")
def hashes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """sha256 of every file, of one export per hash seed, each in a process of its own."""
    found = []
    for seed in ("1", "2"):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        code = EXPORT.format(root=str(ROOT), folder=str(folder), names=NAMES)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        found.append({str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["canonical.onnx", "ort-cpu.onnx", "fp32.weights", "manifest.json"])
def test_two_exports_give_the_same_bytes(name: str, file: str, hashes: list[dict[str, str]]) -> None:
    first, second = (export[f"{name}/{file}"] for export in hashes)
    assert first == second


def test_two_exports_give_the_same_files(hashes: list[dict[str, str]]) -> None:
    assert hashes[0] == hashes[1] and len(hashes[0]) >= 6 * len(NAMES) - 1
