"""A thread for runs that replay CUDA graphs: ONNX Runtime keeps those by thread, and captures anew in another one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

Left = TypeVar("Left")


class OneThread:
    """Calls everything in one thread of its own, whoever asks, one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="accel-ort-cuda")

    def call(self, function: Callable[..., Left], *arguments: Any) -> Left:
        """What the function returns, or raises. Whoever is interrupted meanwhile still waits until it is done."""
        future = self._pool.submit(function, *arguments)
        try:
            return future.result()
        finally:
            wait([future])  # what it reads must stay as it is
            del future  # it holds an error, whose frames hold it

    def close(self) -> None:
        """Ends the thread. Safe to call twice."""
        self._pool.shutdown()


__all__ = ["OneThread"]
