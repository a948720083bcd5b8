"""What is told of the work."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """``accel.exporter.progress.ExportProgress`` and the like."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; ``total`` in bytes, tokens or steps, None: unknown."""

    def advance(self, count: int) -> None:
        """So many of them are done."""


class Silent:
    """Tells nobody."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""


__all__ = ["Progress", "Silent"]
