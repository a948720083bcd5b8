"""A progress bar of the tokens that are measured."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from accel.progress import PhaseLog


class MeasureProgress:
    """Shows tokens run on a terminal; logs what is measured, see ``PhaseLog``.

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
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress

            columns = (*Progress.get_default_columns(), MofNCompleteColumn())
            self._bar = Progress(*columns, console=Console(stderr=True, force_terminal=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, name: str, tokens: int) -> None:
        """What is measured now, and on how many tokens."""
        self._lines.start(f"Measuring {name} on {tokens} tokens", tokens)
        if self._bar is not None:
            self._task = self._bar.add_task(f"Measuring {name}", total=tokens)

    def advance(self, tokens: int) -> None:
        """Tokens that were run."""
        self._lines.advance(tokens)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=tokens)


__all__ = ["MeasureProgress"]
