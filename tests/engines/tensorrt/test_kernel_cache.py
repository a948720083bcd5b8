"""The folder of compiled kernels: bounded, least recently used first, never what somebody uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from accel.engines.tensorrt import kernel_cache
from accel.engines.tensorrt.kernel_cache import KERNELS_BYTES, KernelFile, kernels_path, prune
from tests.store.samples import key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files of 100 bytes, ``0`` the oldest."""
    for index in range(5):
        path = tmp_path / str(index)
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + index, 1000 + index))
    return tmp_path


def test_engines_and_gpus_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    made = key(sm=("sm86", "sm89"))
    paths = {kernels_path(made, "sm86"), kernels_path(made, "sm89"), kernels_path(key(capacity=64), "sm86")}
    assert len(paths) == 3 and {path.parent for path in paths} == {tmp_path / "kernels"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize(
    ("limit", "left"), [(500, "01234"), (499, "1234"), (300, "234"), (299, "34"), (100, "4"), (0, "")]
)
def test_the_oldest_go_first(folder: Path, limit: int, left: str) -> None:
    prune(folder, folder / "own", limit)
    assert names(folder) == list(left)


def test_the_one_that_opens_stays_and_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "KERNELS_BYTES", 200)
    KernelFile(folder / "0").close()
    assert names(folder) == ["0", "4"] and KERNELS_BYTES >= 1 << 30
    KernelFile(folder / "new").close()
    assert names(folder) == ["0", "4"]


def test_reading_is_using(folder: Path) -> None:
    file = KernelFile(folder / "1")
    assert file.read() == bytes(100)
    file.close()
    prune(folder, folder / "own", 100)
    assert names(folder) == ["1"]


def test_what_is_in_use_stays(folder: Path) -> None:
    """Also after it was written anew, and in another process; until it is closed."""
    code = (
        "import sys; from pathlib import Path; from accel.engines.tensorrt.kernel_cache import KernelFile\n"
        "file = KernelFile(Path(sys.argv[1])); file.read(); print('open', flush=True); sys.stdin.read()"
    )
    read, written = KernelFile(folder / "0"), KernelFile(folder / "5")
    assert read.read() is not None and written.read() is None
    written.write(b"new" * 50)
    os.utime(folder / "5", (1, 1))
    command = [sys.executable, "-c", code, str(folder / "2")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == b"open\n"
        prune(folder, folder / "own", 0)
        assert names(folder) == ["0", "2", "5"]
        other.stdin.close()
    written.write(b"again")
    prune(folder, folder / "own", 0)
    assert names(folder) == ["0", "5"]
    for file in (read, written):
        file.close()
        file.close()
    prune(folder, folder / "own", 0)
    assert names(folder) == []


def test_somebody_else_cleans(folder: Path) -> None:
    with FileLock(folder / ".lock"):
        prune(folder, folder / "own", 0)
    assert len(names(folder)) == 5


def test_a_folder_that_cannot_be_cleaned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(kernel_cache, "KERNELS_BYTES", 0)
    monkeypatch.setattr(Path, "unlink", refuse)
    file = KernelFile(folder / "3")
    assert "old compiled kernels are not removed" in caplog.text and file.read() == bytes(100)
    file.close()
    prune(folder / "absent", folder / "absent" / "x")
