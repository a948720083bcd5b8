"""Progress of a build: nested bars or a callback, time left from earlier builds, and a way to stop.

The library calls the monitor from its own code, in RTX on the building thread, in TensorRT on any
(``IProgressMonitor`` in NvInfer.h). Nothing may be raised there: what a callback raises, and Ctrl-C, stop the build at
the next step, and are raised to the caller once the library has returned.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Self

from accel.errors import EngineBuildError
from accel.progress import PhaseLog


@dataclass(frozen=True)
class ProgressEvent:
    """One event.

    Attributes:
        phase: Its name, as the library calls it.
        parent: The phase that it is a part of.
        step: Steps done; ``steps``: of how many.
        seconds_left: Until the build is done, from an earlier build like it; None: there was none.
    """

    kind: Literal["start", "step", "finish"]
    phase: str
    parent: str | None
    step: int
    steps: int
    seconds_left: float | None


@dataclass
class _Phase:
    parent: str | None
    steps: int
    started: float
    counted: bool  # its seconds are kept for the next build's estimate


class BuildMonitor:
    """Hears what a build does, reports it, and can stop it.

    Args:
        report: Takes every event; None: nobody.
        history: Seconds of each phase in an earlier build like this one; None: no estimate.
    """

    def __init__(
        self, report: Callable[[ProgressEvent], None] | None = None, history: Mapping[str, float] | None = None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._report, self._history = report, dict(history or {})
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.RLock()
        self._stopped = False
        self._signal: int | None = None  # that stopped the build
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}  # that the signals had before
        self._error: BaseException | None = None
        self._signals: socket.socket | None = None

    def cancel(self) -> None:
        """Stops the build at its next step. From any thread."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether the build was stopped, or is to be."""
        return self._stopped

    def seconds_left(self) -> float | None:
        """Until the end, if this build goes as the earlier one did."""
        if not self._history:
            return None
        now = time.monotonic()
        spent = dict(self.seconds)
        running = {name: now - phase.started for name, phase in list(self._phases.items())}
        left = (seconds - running.get(name, 0.0) for name, seconds in self._history.items() if name not in spent)
        return sum(max(0.0, seconds) for seconds in left)

    def start(self, phase: str, parent: str | None, steps: int, counted: bool) -> None:
        """A phase begins. ``counted``: it is one of those that follow each other and make up the whole."""
        with self._lock:
            self._phases[phase] = _Phase(parent, steps, time.monotonic(), counted)
            self._say("start", phase, 0)

    def step(self, phase: str, done: int) -> bool:
        """Some steps are done; False: stop."""
        self._hear_signals()
        with self._lock:
            self._say("step", phase, done)
        return not self._stopped

    def finish(self, phase: str) -> None:
        """A phase ends."""
        with self._lock:
            entry = self._phases.get(phase)
            if entry is not None and entry.counted:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - entry.started
            self._say("finish", phase, entry.steps if entry is not None else 0)
            self._phases.pop(phase, None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of our own, outside the library."""
        self.start(name, None, 1, counted=True)
        try:
            yield
        finally:
            self.finish(name)
        self.raise_if_stopped()

    def raise_if_stopped(self) -> None:
        """Raises what stopped the build.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            EngineBuildError: ``cancel`` was called. Else what the callback raised.
        """
        self._hear_signals()
        if self._error is not None:
            raise self._error
        if self._signal is not None:
            self._handlers[self._signal](self._signal, None)  # raises, as it would have done outside the library
            raise KeyboardInterrupt
        if self._stopped:
            raise EngineBuildError("The build was cancelled", remedy="Start it again; nothing was left behind")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Meanwhile Ctrl-C, and SIGTERM where it is handled, stop the build in place of raising inside the library.

        Main thread only, else nothing.
        """
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
        if threading.current_thread() is not threading.main_thread() or not self._handlers:
            yield
            return
        # The handler runs only when the main thread executes Python; the socket is written at once, and can be read
        # by whatever thread the library calls us on.
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._signals = reader
        for number in self._handlers:
            signal.signal(number, lambda number, _: self._interrupt(number))
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            self._hear_signals()
            signal.set_wakeup_fd(descriptor)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._signals = None
            reader.close()
            writer.close()

    def native(self, trt: Any) -> Any:
        """The ``IProgressMonitor`` for the builder's config; keep it alive while the build runs."""
        monitor, base = self, trt.IProgressMonitor

        class Native(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                # What stands right under the library's own root makes up the whole.
                with monitor._guarded():
                    root = parent_phase is not None and monitor._is_root(parent_phase)
                    monitor.start(phase_name, parent_phase, num_steps, counted=root)

            def step_complete(self, phase_name: str, step: int) -> bool:
                going = False
                with monitor._guarded():
                    going = monitor.step(phase_name, step + 1)
                return going

            def phase_finish(self, phase_name: str) -> None:
                with monitor._guarded():
                    monitor.finish(phase_name)

        return Native()

    def _is_root(self, name: str) -> bool:
        entry = self._phases.get(name)
        return entry is not None and entry.parent is None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Keeps what is raised, and stops the build."""
        try:
            yield
        except BaseException as error:  # also KeyboardInterrupt: the library cannot take any
            self._error = self._error or error
            self.cancel()

    def _say(self, kind: Literal["start", "step", "finish"], phase: str, done: int) -> None:
        if self._report is not None:
            entry = self._phases.get(phase)
            parent, steps = (entry.parent, entry.steps) if entry is not None else (None, 0)
            self._report(ProgressEvent(kind, phase, parent, done, steps, self.seconds_left()))

    def _interrupt(self, number: int) -> None:
        self._signal = number
        self.cancel()

    def _hear_signals(self) -> None:
        if self._signals is not None:
            with suppress(BlockingIOError):
                for number in self._signals.recv(64):
                    if number in self._handlers:
                        self._interrupt(number)


class ProgressBars:
    """Reports a build as nested bars on stderr, with the time left where an earlier build tells it.

    Its main phases are also logged, see ``PhaseLog``.

    Args:
        show: None: only when stderr is a terminal.
        title: Of the uppermost bar, e.g. the target and its SMs.
    """

    def __init__(self, title: str, show: bool | None = None) -> None:
        self._title, self._lines, self._began = title, PhaseLog(), time.monotonic()
        self._show = sys.stderr.isatty() if show is None else show
        self._bars: Any = None
        self._tasks: dict[str, tuple[Any, int]] = {}  # task and depth
        self._top: Any = None

    def __enter__(self) -> Self:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.table import Column

            done = TextColumn("{task.fields[done]}", justify="right")
            columns = (TextColumn("{task.description}"), BarColumn(), done, TimeElapsedColumn())
            room = Column(min_width=len("about 59 min 59 s left"), no_wrap=True)  # long names of phases give way
            left = TextColumn("{task.fields[left]}", table_column=room)
            self._bars = Progress(*columns, left, console=Console(stderr=True, force_terminal=True), transient=True)
            self._bars.start()
            self._top = self._bars.add_task(self._title, total=None, left="", done="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: ProgressEvent) -> None:
        """Takes an event of a ``BuildMonitor``."""
        share = self._share(event.seconds_left)
        self._log(event, share)
        if self._bars is None:
            return
        if share is not None:
            self._bars.update(self._top, total=100, completed=share, done=f"{share} %")
        self._bars.update(self._top, left=_left(event.seconds_left))
        if event.kind == "start":
            depth = self._tasks[event.parent][1] + 1 if event.parent in self._tasks else 1
            name, steps = "  " * depth + event.phase, max(1, event.steps)
            task = self._bars.add_task(name, total=steps, left="", done=f"0/{steps}")
            self._tasks[event.phase] = (task, depth)
        elif event.phase in self._tasks:
            task, _ = self._tasks[event.phase]
            self._bars.update(task, completed=event.step, done=f"{event.step}/{max(1, event.steps)}")
            if event.kind == "finish":
                self._bars.remove_task(task)
                del self._tasks[event.phase]


    def _share(self, left: float | None) -> int | None:
        """Hundredths of the build that are done, by the time left; not all of them before it ends."""
        if left is None:
            return None
        spent = time.monotonic() - self._began
        return min(99, int(100 * spent / max(spent + left, 1e-9)))

    def _log(self, event: ProgressEvent, share: int | None) -> None:
        left = _left(event.seconds_left)
        if event.kind == "start" and event.parent is None:
            self._lines.start(f"{self._title}: {event.phase}{f' ({left})' if left else ''}")
        elif event.kind == "step":
            within = f"{event.phase} {event.step}/{event.steps}"
            self._lines.tell(within if share is None else f"{share} %, {left}")


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if round(seconds) < 1:  # the earlier build took no longer; this one may
        return "nearly done"
    minutes, rest = divmod(round(seconds), 60)
    return f"about {minutes} min {rest} s left" if minutes else f"about {rest} s left"


__all__ = ["BuildMonitor", "ProgressBars", "ProgressEvent"]
