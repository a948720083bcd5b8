"""Drives one worker process: asks over pipes, with a time limit, and keeps it stopped in between."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

# The package's root goes last on the path: a peer's environment has its own packages and only lacks accel.
BOOT = "import sys; sys.path.append(sys.argv[1]); from accel.bench.worker import main; main(sys.argv[2:])"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class WorkerFailure(Exception):
    """A worker answered with an error, died, or ran past its time; the message is the reason."""

    def __init__(self, reason: str, unsupported: bool = False) -> None:
        super().__init__(reason)
        self.unsupported = unsupported


class WorkerProcess:
    """One peer in its own process and environment.

    After every answer the process is stopped (SIGSTOP) and continued for the next request: spinning thread pools of
    an idle peer cannot take time from the one being measured.
    """

    def __init__(self, python: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), "-c", BOOT, str(PACKAGE_ROOT), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, op: str, *, limit_s: float = 600.0, **fields: Any) -> dict[str, Any]:
        """Sends one request and returns its answer.

        Raises:
            WorkerFailure: The peer failed, died or took longer than ``limit_s`` (it is killed then).
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._resume()
        try:
            self._process.stdin.write((json.dumps({"op": op, **fields}) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailure(self._last_words()) from None
        with selectors.DefaultSelector() as selector:  # select() itself takes no file descriptor above 1023
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(limit_s)
        if not ready:
            self.close()
            raise WorkerFailure(f"{op} took longer than {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailure(self._last_words())
        self._process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailure(answer["error"], answer.get("unsupported", False))
        return answer

    def cpu_seconds(self) -> float:
        """CPU time the process has used so far, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process; harmless when it has ended already."""
        if self._process.poll() is None:
            self._process.kill()  # works on a stopped process, and nothing is left to tidy up
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _resume(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def _last_words(self) -> str:
        deadline = time.monotonic() + 5.0
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self._log.flush()
        lines = [line for line in self._log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        return f"the process ended (status {self._process.poll()}): {lines[-1][:300] if lines else 'no message'}"
