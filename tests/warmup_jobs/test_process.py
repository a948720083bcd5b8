"""Child processes that crash, are killed, cannot be started, or fail for good."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path

import pytest

from accel.errors import (
    BundleError,
    DependencyError,
    EngineBuildError,
    EngineProofError,
    EngineStoreError,
    InputError,
    ParityError,
    StorageError,
)
from accel.storage import as_storage_error
from accel.warmup_jobs.child import is_permanent
from accel.warmup_jobs.process import Child
from accel.warmup_jobs.scheduler import Outcome


def end_of(child: Child) -> Outcome:
    for _ in range(400):
        outcome = child.poll()
        if outcome is not None:
            return outcome
        time.sleep(0.05)
    raise AssertionError("the child goes on and on")


@pytest.mark.parametrize(
    ("command", "said", "killed"),
    [
        ("ulimit -c 0; kill -SEGV $$", "was ended by SIGSEGV; it last said: about to build", False),
        ("kill -KILL $$", "was ended by SIGKILL, as the kernel does when memory runs out; it last", True),
        ("exit 3", "ended with exit code 3; it last said: about to build", False),
    ],
)
def test_a_crash(command: str, said: str, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/bash\necho about to build\n{command}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    (tmp_path / "a.json").write_text('{"result": {"of": "an earlier attempt"}}')
    outcome = end_of(Child({}, tmp_path / "a.log"))
    assert outcome.result is None and outcome.error is not None and said in outcome.error
    assert outcome.killed == killed and not outcome.permanent
    assert (tmp_path / "a.log").read_text() == "about to build\n"


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = end_of(Child({}, tmp_path / "absent" / "a.log"))
    assert outcome.error is not None and "cannot be started" in outcome.error
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    child = Child({}, tmp_path / "a.log")
    child.interrupt()
    child.kill()
    assert "cannot be started" in str(end_of(child).error)


def test_an_error_is_answered_and_logged(tmp_path: Path) -> None:
    request = {"do": "variant", "bundle": str(tmp_path / "absent"), "variant": "fp16"}
    outcome = end_of(Child(request, tmp_path / "a.log"))
    assert outcome.permanent and "There is no bundle directory" in str(outcome.error)
    assert "Traceback" in (tmp_path / "a.log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]


def test_which_errors_stay() -> None:
    for_good = [InputError("x"), DependencyError("x"), EngineProofError("x"), BundleError("x"), ParityError("x")]
    assert all(map(is_permanent, for_good))
    assert is_permanent(EngineBuildError("cannot take the operator Foo", where="node a, layer 3"))
    read_only = as_storage_error(OSError(errno.EROFS, "read-only"), Path("/"))
    assert read_only is not None and is_permanent(read_only)
    full = as_storage_error(OSError(errno.ENOSPC, "full"), Path("/"))
    assert full is not None and not is_permanent(full)
    passing = [EngineBuildError("could not build", where="graph.onnx"), StorageError("full"), EngineStoreError("away")]
    assert not any(map(is_permanent, [*passing, MemoryError()]))
