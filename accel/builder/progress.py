"""A build's progress: nested phases as bars, the time left from earlier builds, and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accel.engines.tensorrt.adapter import Flavour
from accel.storage import replace_file


@dataclass(frozen=True)
class Phase:
    """One phase of a build.

    Attributes:
        name: As the library calls it.
        depth: 0 for the outermost.
        done, total: Its steps.
    """

    name: str
    depth: int
    done: int
    total: int


@dataclass
class BuildHistory:
    """Seconds of earlier builds by key, in a JSON file. A damaged file counts as an empty one.

    Args:
        path: None: nothing is remembered.
    """

    path: Path | None = None
    _seconds: dict[str, float] | None = field(default=None, repr=False)

    def estimate(self, key: str) -> float | None:
        """Seconds of the last build of this key; None without one."""
        return self._load().get(key)

    def note(self, key: str, seconds: float) -> None:
        """Remembers a build. Not being able to is no error: it costs an estimate."""
        if self.path is None:
            return
        self._seconds = None  # others write it too
        known = {**self._load(), key: seconds}
        with contextlib.suppress(OSError):
            replace_file(self.path, json.dumps(known, indent=1, sort_keys=True).encode())

    def _load(self) -> dict[str, float]:
        if self._seconds is None:
            try:
                data = json.loads(self.path.read_bytes()) if self.path is not None else {}
                self._seconds = {str(key): float(value) for key, value in data.items()}
            except (OSError, ValueError, TypeError, AttributeError):
                self._seconds = {}
        return self._seconds


class BuildProgress:
    """Follows one build. A context manager.

    Ctrl-C while the library builds only sets a flag: the library is asked to stop at its next step, and
    ``KeyboardInterrupt`` is raised by ``check`` once it has returned. A second one is raised at once.

    Args:
        title: What is built.
        show: Bars on stderr; None: when it is a terminal.
        expected: Seconds that it will take, if that is known.
        notify: Called with the phase at every step.
    """

    def __init__(
        self,
        title: str,
        show: bool | None = None,
        expected: float | None = None,
        notify: Callable[[Phase], None] | None = None,
    ) -> None:
        self.title, self._expected, self._notify = title, expected, notify
        self._show = sys.stderr.isatty() if show is None else show
        self._started = time.monotonic()
        self._phases: dict[str, Phase] = {}
        self._tasks: dict[str, Any] = {}
        self._bars: Any = None
        self._cancelled = False
        self._failure: BaseException | None = None
        self._handler: Any = None

    def __enter__(self) -> Self:
        if self._show:
            self._bars = _bars()
            self._bars.start()
        self._handler = _on_interrupt(self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _restore_interrupt(self._handler)
        if self._bars is not None:
            self._bars.stop()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float | None:
        """Seconds that are left by the earlier build's time; None without one."""
        return None if self._expected is None else max(0.0, self._expected - self.seconds)

    def cancel(self) -> None:
        """Asks the library to stop at its next step."""
        self._cancelled = True

    def check(self) -> None:
        """Raises what the build was stopped for: KeyboardInterrupt, or what ``notify`` raised."""
        if self._failure is not None:
            raise self._failure
        if self._cancelled:
            raise KeyboardInterrupt

    def monitor(self, flavour: Flavour) -> Any:
        """An ``IProgressMonitor`` that reports here. Keep it alive while building."""
        base: Any = flavour.trt.IProgressMonitor
        progress = self

        class Monitor(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                progress._guarded(progress._start, name, parent, steps)

            def step_complete(self, name: str, step: int) -> bool:
                progress._guarded(progress._step, name, step)
                return not progress._cancelled

            def phase_finish(self, name: str) -> None:
                progress._guarded(progress._finish, name)

        return Monitor()

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls back from native code, where an exception would end the process."""
        try:
            function(*arguments)
        except BaseException as error:
            self._failure, self._cancelled = error, True

    def _interrupt(self) -> None:
        if self._cancelled:
            raise KeyboardInterrupt
        self._cancelled = True

    def _start(self, name: str, parent: str | None, steps: int) -> None:
        depth = self._phases[parent].depth + 1 if parent in self._phases else 0
        self._report(Phase(name, depth, 0, steps))

    def _step(self, name: str, step: int) -> None:
        before = self._phases.get(name, Phase(name, 0, 0, step + 1))
        self._report(Phase(name, before.depth, step + 1, before.total))

    def _finish(self, name: str) -> None:
        self._phases.pop(name, None)
        task = self._tasks.pop(name, None)
        if self._bars is not None and task is not None:
            self._bars.remove_task(task)

    def _report(self, phase: Phase) -> None:
        self._phases[phase.name] = phase
        if self._notify is not None:
            self._notify(phase)
        if self._bars is None:
            return
        left = "" if self.left is None or phase.depth else f"about {self.left:.0f} s left"
        label = f"{'  ' * phase.depth}{phase.name if phase.depth else f'{self.title}: {phase.name}'}"
        if phase.name not in self._tasks:
            self._tasks[phase.name] = self._bars.add_task(label, total=phase.total, left=left)
        self._bars.update(self._tasks[phase.name], completed=phase.done, left=left)


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, force_terminal=True)
    return Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)


def _on_interrupt(function: Callable[[], None]) -> Any:
    """Calls ``function`` at Ctrl-C, in the main thread; elsewhere signals cannot be caught."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGINT, lambda number, frame: function())


def _restore_interrupt(handler: Any) -> None:
    import signal

    if handler is not None:
        signal.signal(signal.SIGINT, handler)


__all__ = ["BuildHistory", "BuildProgress", "Phase"]
