"""The one progress display of an export: its stages, and a bar for the bytes written."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from accel.progress import PhaseLog


class ExportProgress:
    """Shows stages on a terminal, logs them always, see ``PhaseLog``.

    Args:
        show: None: only when stderr is a terminal.
    """

    def __init__(self, show: bool | None = None) -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._lines = PhaseLog()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._show:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.BarColumn(),
                progress.TaskProgressColumn(show_speed=False), progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = progress.Progress(*columns, console=Console(stderr=True, force_terminal=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """Starts a stage; ``total`` is in bytes, tokens or nodes, None: unknown."""
        self._lines.start(name, total)
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total)

    def advance(self, count: int) -> None:
        """Moves the stage's bar by ``count`` of them."""
        self._lines.advance(count)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count)


__all__ = ["ExportProgress"]
