"""Writing bundles: nothing half made is left, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from accel.bundle import Bundle, BundleWriter
from accel.errors import BundleError, StorageError
from accel.storage import as_storage_error, replace_file
from tests.bundle_samples import manifest, write, write_files
from tests.full_disk import file_size_limit


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_exception_removes_the_sibling(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), BundleWriter(tmp_path / "out") as writer:
        write_files(writer.path)
        raise error
    assert os.listdir(tmp_path) == []


def test_leaving_without_commit_writes_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        write_files(writer.path)
    assert os.listdir(tmp_path) == []


def test_manifest_that_names_an_unwritten_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="uses 'fp32.weights'"), BundleWriter(tmp_path / "out") as writer:
        (writer.path / "g.onnx").write_bytes(b"")
        writer.commit(manifest())
    assert os.listdir(tmp_path) == []


def test_disk_full(tmp_path: Path) -> None:
    """A file-size limit fails a write half way, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        allowed = pytest.raises(StorageError, match="larger than.*allows.*nothing was left")
        with allowed, BundleWriter(tmp_path / "out") as writer:
            write_files(writer.path, b"\1" * (2 << 20))
            writer.commit(manifest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(28, "No space left on device"), "The disk is full"),
        (OSError("4096 requested and 1024 written"), "The disk is full"),
        (OSError(122, "Quota exceeded"), "quota"),
        (OSError(30, "Read-only file system"), "read-only"),
    ],
)
def test_write_errors_are_said_in_words(tmp_path: Path, error: OSError, what: str) -> None:
    with pytest.raises(StorageError, match=what) as info, BundleWriter(tmp_path / "out"):
        raise error
    assert info.value.__cause__ is error and info.value.remedy
    assert os.listdir(tmp_path) == []


def test_the_remedy_asks_for_what_the_user_gave(tmp_path: Path) -> None:
    """Nobody who gave a store has given an output path."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        said = [as_storage_error(OSError(code, "no"), tmp_path, *place) for place in ((), ("Give a store (--store)",))]
        remedies = [str(error.remedy) for error in said if error is not None]
        assert "Give an output path " in remedies[0], code
        assert "Give a store (--store) " in remedies[1] and "output" not in str(said[1]), code


def test_errors_about_other_files_pass_through(tmp_path: Path) -> None:
    error = PermissionError(13, "Permission denied", "/elsewhere/model.safetensors")
    with pytest.raises(PermissionError) as info, BundleWriter(tmp_path / "out"):
        raise error
    assert info.value is error


def test_disk_full_in_commit_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", source="old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accel.storage._fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        write(tmp_path / "out", overwrite=True, source="new")
    assert Bundle.open(tmp_path / "out", verify=True).manifest.source == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root ignores modes; /proc refuses everyone
        parent = Path("/proc/self")
    else:
        parent = tmp_path / "locked"
        parent.mkdir(mode=0o500)
    with pytest.raises(StorageError) as info, BundleWriter(parent / "out"):
        pass
    assert info.value.remedy
    with pytest.raises(StorageError), BundleWriter("/dev/null/out"):
        pass


def test_overwrite_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", source="old")
    with pytest.raises(StorageError, match="overwrite=True"):
        write(tmp_path / "out", source="new")
    assert Bundle.open(tmp_path / "out").manifest.source == "old"
    write(tmp_path / "out", overwrite=True, source="new")
    assert Bundle.open(tmp_path / "out", verify=True).manifest.source == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")  # an empty directory may be filled
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match="never deleted"):
        write(other, overwrite=True)
    (other / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(StorageError, match="never deleted"):
        write(other, overwrite=True)
    with pytest.raises(StorageError, match="is a file"):
        write(other / "thesis.txt", overwrite=True)
    assert (other / "thesis.txt").read_text() == "precious"


def test_target_that_appears_while_writing(tmp_path: Path) -> None:
    with pytest.raises(StorageError), BundleWriter(tmp_path / "out") as writer:
        write_files(writer.path)
        write(tmp_path / "out", source="other")
        writer.commit(manifest())
    assert Bundle.open(tmp_path / "out").manifest.source == "other"
    assert os.listdir(tmp_path) == ["out"]


def test_overwriting_leaves_no_moment_without_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "out")
    stop, misses = threading.Event(), list[int]()

    def read() -> None:
        while not stop.is_set():
            if not (tmp_path / "out" / "manifest.json").is_file():
                misses.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        write(tmp_path / "out", overwrite=True, source=str(i))
    stop.set()
    reader.join()
    assert not misses
    assert Bundle.open(tmp_path / "out", verify=True).manifest.source == "29"


def test_link_as_output_replaces_its_target(tmp_path: Path) -> None:
    write(tmp_path / "real", source="old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True, source="new")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "real").manifest.source == "new"


KILLED = """
import os, signal, sys
from accel.bundle import BundleWriter
with BundleWriter(sys.argv[1]) as writer:
    (writer.path / "fp32.weights").write_bytes(b"half")
    print(writer.path, flush=True)
    {end}
"""


def start(out: Path, end: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED.format(end=end), str(out)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, preexec_fn=listen_to_ctrl_c)


def listen_to_ctrl_c() -> None:
    """A test run that a shell started in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_killed_writer_leaves_a_sibling_that_the_next_removes(tmp_path: Path) -> None:
    process = start(tmp_path / "o[u]t", "os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (stale,) = os.listdir(tmp_path)
    assert stale.startswith(".o[u]t.tmp-")
    write(tmp_path / "o[u]t")
    assert os.listdir(tmp_path) == ["o[u]t"]


def test_ctrl_c_in_another_process_and_live_siblings(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "signal.pause()")
    assert process.stdout is not None
    sibling = Path(process.stdout.readline().strip())
    with BundleWriter(tmp_path / "out") as writer:  # a second writer leaves the living one's sibling alone
        assert writer.path != sibling and sibling.is_dir()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert os.listdir(tmp_path) == []


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "history.json"
    replace_file(path, b"old")
    stop, seen = threading.Event(), set[bytes]()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        replace_file(path, b"new" * 10_000)
        replace_file(path, b"old")
    stop.set()
    reader.join()
    assert seen <= {b"old", b"new" * 10_000} and b"old" in seen
    assert os.listdir(path.parent) == ["history.json"]


def test_a_small_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.json"
    replace_file(path, b"old")
    with file_size_limit(1 << 16), pytest.raises(OSError, match="too large"):
        replace_file(path, b"n" * (1 << 17))

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["history.json"]
