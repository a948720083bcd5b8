"""Engines that break at a chosen call, in a registry of their own before the real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import accel.engines as engines
from accel.bundle import Bundle
from accel.engines import Engine
from accel.engines.session import EngineInfo, SessionOptions, StepInputs
from accel.errors import EngineBrokenError

ORT = next(engine for engine in engines.ENGINES if engine.name == "ort-cpu")
TORCH = next(engine for engine in engines.ENGINES if engine.name == "torch")


@dataclass
class Breaking:
    """A real session that is lost from a chosen call on.

    Attributes:
        steps: Steps (or runs of an encoder) that succeed; None: all.
        copies: Row copies that succeed.
        at: Called at the moment of breaking.
    """

    session: Any
    info: EngineInfo
    steps: int | None = None
    copies: int | None = None
    at: Callable[[], None] = lambda: None
    capacity: int = 0
    max_batch: int = 0
    vocab_size: int = 0
    mixed_steps: bool = True
    fails_to_close: bool = False
    closed: int = 0
    broken: int = 0
    seen: list[StepInputs] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        assert not self.closed
        self._count("steps")
        copied: Any = (np.array(value) if isinstance(value, np.ndarray) else value for value in inputs)
        self.seen.append(StepInputs(*copied))
        logits: NDArray[np.float32] = self.session.step(inputs)
        return logits

    def copy_row(self, source: int, target: int, length: int) -> None:
        self._count("copies")
        self.session.copy_row(source, target, length)

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        assert not self.closed
        self._count("steps")
        found: dict[str, NDArray] = self.session.run(feeds)
        assert not self.closed, "closed during a run"
        return found

    def close(self) -> None:
        self.closed += 1
        self.session.close()
        if self.fails_to_close:
            raise RuntimeError("the driver is gone")

    def _count(self, what: str) -> None:
        with self.lock:
            left = getattr(self, what)
            if left == 0:
                self.broken += 1
            elif left is not None:
                setattr(self, what, left - 1)
        if left == 0:
            self.at()
            raise EngineBrokenError(f"{self.info.name} fell off the bus", where="device 0")


class Shelf:
    """Fake engines; ``opened`` holds their sessions in order of opening."""

    def __init__(self) -> None:
        self.opened: list[Breaking] = []
        self.asked: list[SessionOptions] = []

    def engine(self, name: str, wraps: Engine = ORT, rows: int | None = None, **how: Any) -> Engine:
        """An engine whose sessions break as ``Breaking`` says; ``capacity`` and ``rows`` replace what is asked for."""

        def open_breaking(bundle: Bundle, variant: str, options: SessionOptions) -> Any:
            self.asked.append(options)
            options = replace(options, capacity=how.get("capacity", options.capacity))
            options = replace(options, max_batch=rows or options.max_batch)
            session: Any = wraps.open(bundle, variant, options)
            sizes = {n: getattr(session, n) for n in ("capacity", "max_batch", "vocab_size") if hasattr(session, n)}
            found = Breaking(session, replace(session.info, name=name), **{**how, **sizes})
            self.opened.append(found)
            return found

        return Engine(name, "cpu", lambda bundle, variant: None, open_breaking)


def refusing(name: str, error: Exception) -> Engine:
    """An engine that cannot be opened."""

    def refuse(bundle: Bundle, variant: str, options: SessionOptions) -> Any:
        raise error

    return Engine(name, "cpu", lambda bundle, variant: None, refuse)
