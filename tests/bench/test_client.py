"""The worker process for real: pipes, stopping, failures. Torch's peer exports nothing, which is all that is asked."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from accel.bench.client import PACKAGE_ROOT, WorkerFailure, WorkerProcess


@pytest.fixture
def many_files() -> Iterator[None]:
    """So many open files that what is opened next gets a number above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"a process may open {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with contextlib.ExitStack() as files:
        while files.enter_context(open(os.devnull)).fileno() < 1024:
            pass
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    arguments = ["torch", "minilm", str(tmp_path), str(tmp_path), "1"]
    process = WorkerProcess(Path(sys.executable), arguments, {}, tmp_path / "worker.log")
    yield process
    process.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]


def test_worker_is_stopped_between_requests_and_answers_again(worker: WorkerProcess) -> None:
    first = worker.ask("memory")
    time.sleep(0.05)
    assert state_of(worker.pid) == "T"
    used = worker.cpu_seconds()
    time.sleep(0.1)
    assert worker.cpu_seconds() == used
    assert worker.ask("memory")["peak_rss"] >= first["peak_rss"]


@pytest.mark.usefixtures("many_files")
def test_a_driver_with_many_open_files(tmp_path: Path) -> None:
    """As a server has."""
    arguments = ["torch", "minilm", str(tmp_path), str(tmp_path), "1"]
    process = WorkerProcess(Path(sys.executable), arguments, {}, tmp_path / "log")
    assert process.ask("memory")["peak_rss"] > 0
    process.close()


def test_reason_of_an_unsupported_request_arrives(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerFailure, match="eager PyTorch exports nothing") as failure:
        worker.ask("export")
    assert failure.value.unsupported
    with pytest.raises(WorkerFailure, match="ValueError: unknown operation") as failure:
        worker.ask("guess")
    assert not failure.value.unsupported


def test_a_worker_that_dies_is_reported_with_its_last_words(worker: WorkerProcess) -> None:
    worker.ask("memory")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerFailure, match="the process ended"):
        worker.ask("memory")


def test_a_worker_that_takes_too_long_is_ended(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerFailure, match="longer than 0 s"):
        worker.ask("memory", limit_s=0)
    assert not Path(f"/proc/{worker.pid}").exists()


def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    process = WorkerProcess(Path(sys.executable), ["nobody", "minilm", "", "", "1"], {}, tmp_path / "log")
    with pytest.raises(WorkerFailure, match="KeyError: 'nobody'"):
        process.ask("memory")
    process.close()


def test_a_stopped_worker_ends_with_the_process_that_drives_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from accel.bench.client import WorkerProcess; "
        "worker = WorkerProcess(Path(sys.executable), ['torch', 'minilm', '', '', '1'], {}, Path(sys.argv[1])); "
        "worker.ask('memory'); print(worker.pid, flush=True); import os; os._exit(1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, env=environment, check=False
    )
    pid, deadline = int(done.stdout), time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and state_of(pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z"
