"""The parent's side of a child process that builds or runs one engine: a crash of the library ends the child alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import accel
from accel.storage import as_storage_error
from accel.warmup_jobs.scheduler import Outcome

TAIL_BYTES = 4096
LOGS = "Give 'logs' in the jobs file a path"


class Child:
    """An attempt: ``python -m accel.warmup_jobs.child``, with everything that it prints in a log.

    It has a session of its own, so that Ctrl-C in a terminal reaches this process alone, which then interrupts its
    children one by one. The child reads its standard input and ends when that does: it never outlives this process.

    Args:
        request: What to do; plain JSON.
        log: File that its output is appended to. The child writes its result beside it, as long as it takes to read it.
    """

    def __init__(self, request: Mapping[str, Any], log: Path) -> None:
        self._result, self._log = log.with_suffix(".json"), log
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: Outcome | None = None
        try:
            self._start({**request, "result": str(self._result)})
        except OSError as error:  # a full disk, or no more processes: one attempt's trouble
            said = as_storage_error(error, log.parent, LOGS) or f"The process cannot be started: {error}"
            self._failure = Outcome(error=str(said))

    def _start(self, request: Mapping[str, Any]) -> None:
        self._result.unlink(missing_ok=True)
        root = str(Path(accel.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        with self._log.open("ab") as output:
            self._offset = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "accel.warmup_jobs.child"], stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once: poll says how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def poll(self) -> Outcome | None:
        """How it ended; None: it runs."""
        if self._process is None:
            return self._failure
        code = self._process.poll()
        if code is None:
            return None
        self._close()
        with suppress(OSError, ValueError):
            answer = json.loads(self._result.read_bytes())
            self._result.unlink()
            return Outcome(answer.get("result"), answer.get("error"), answer.get("permanent", False))
        killed = code == -signal.SIGKILL
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        hint = ", as the kernel does when memory runs out" if killed else ""
        last = self._last_line()
        return Outcome(error=f"The process {how}{hint}{f'; it last said: {last}' if last else ''}", killed=killed)

    def interrupt(self) -> None:
        """As Ctrl-C: the build ends at its next step."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends it now, and waits until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._close()
        with suppress(OSError):
            self._result.unlink()

    def _close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def _last_line(self) -> str:
        with suppress(OSError), self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._offset, size - TAIL_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
        return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


__all__ = ["Child"]
