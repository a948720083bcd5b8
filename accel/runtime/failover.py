"""The session in use, the change to the next engine when it breaks, and the engine beside it for what it cannot run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from accel.engines.session import DecoderSession, EncoderSession, EngineInfo, Fallback
from accel.errors import AccelError, CapacityError, EngineBrokenError, UncoveredError

SessionT = TypeVar("SessionT", EncoderSession, DecoderSession)
_log = logging.getLogger(__name__)


class Opened(Protocol):
    """What opening a session yields: see ``accel.engines.OpenedSession``."""

    @property
    def session(self) -> Any: ...

    @property
    def fallbacks(self) -> Sequence[Fallback]: ...

    def open_next(self, error: EngineBrokenError) -> Opened: ...

    def open_beside(self, error: UncoveredError) -> Opened: ...


class Failover(Generic[SessionT]):
    """Holds the session in use. One thread at a time replaces or closes it; any thread may look.

    Args:
        opened: The first session. It is closed when it breaks, or with ``close``.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened  # replaced as a whole: who looks sees the one or the other
        self._running = True
        self._lost: AccelError | None = None
        self._beside: Failover[SessionT] | None = None
        self._no_beside: AccelError | None = None
        self._opening = threading.Lock()

    @property
    def session(self) -> SessionT:
        """The session in use; a closed one once no engine is left."""
        session: SessionT = self._opened.session
        return session

    @property
    def engine(self) -> EngineInfo:
        """What runs."""
        info: EngineInfo = self._opened.session.info
        return info

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Engines that were passed over, broke, or do not take every run, and why."""
        beside = self._beside
        return tuple(self._opened.fallbacks) if beside is None else beside.fallbacks

    def beside(self, error: UncoveredError) -> Failover[SessionT]:
        """The engine for runs that the session in use was not built for; the first such run opens it.

        Raises:
            UncoveredError: ``error``, when there must be no other engine (``strict``, or one asked for by name).
            EngineUnavailableError: No other engine can run the bundle. Later calls raise the same.
        """
        with self._opening:
            if self._no_beside is not None:
                raise self._no_beside.with_traceback(None)
            if self._beside is None:
                try:
                    self._beside = Failover(self._opened.open_beside(error))
                except UncoveredError:
                    raise
                except AccelError as lost:
                    self._no_beside = lost
                    raise
            return self._beside

    def replace(self, error: EngineBrokenError) -> SessionT:
        """Closes the broken session and opens the next engine's. May take seconds; interrupted, it can be called again.

        Raises:
            EngineBrokenError: ``error``, when there must be no other engine (``strict``, or one asked for by name).
            EngineUnavailableError: No engine is left. Later calls raise the same.
        """
        if self._lost is not None:
            raise self._lost.with_traceback(None)  # raised many times: tracebacks would pile up
        try:
            self.close()
        except Exception as failure:  # its device may be gone: there is nothing more to free
            _log.warning("closing %s after it broke failed: %s", self.engine.name, failure)
        try:
            self._opened = self._opened.open_next(error)
        except AccelError as lost:
            self._lost = lost
            raise
        self._running, self._no_beside = True, None
        return self.session

    def close(self) -> None:
        """Closes the session in use, and the one beside it. Safe to call twice."""
        beside, self._beside = self._beside, None
        try:
            if beside is not None:
                beside.close()
        finally:
            if self._running:
                self._running = False
                self._opened.session.close()


def too_long(needed: int, held: int) -> CapacityError:
    """The error of a sequence of ``needed`` positions that an engine with ``held`` ones cannot take over."""
    return CapacityError(
        f"the sequence may need {needed:,} positions, but the engine that took over from a broken one holds {held:,}",
        where="decoder step",
        remedy="Ask for fewer new tokens, or load the bundle again",
    )


__all__ = ["Failover", "Opened", "too_long"]
