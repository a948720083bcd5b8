"""Threads of runs that replay CUDA graphs: ONNX Runtime keeps those by thread, and captures anew in another one."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Lock, Thread, local
from typing import Any, TypeVar

from accel.errors import EngineError

OWN_THREADS = 2  # the loader's and a server's
Left = TypeVar("Left")
_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class RunThreads:
    """Where runs happen: the first threads that ask run by themselves, all others' runs are in one thread of our own.

    What ONNX Runtime makes for a thread stays as long as the session, so a thread that has ended keeps its place: load
    and serve in threads that stay. A change of threads takes time: 0.1 to 0.4 ms for a token of 1.7 to 2.5 on hosts
    of H100s and H200s, and about 1 ms for a prompt of 128 on one of them.
    """

    def __init__(self) -> None:
        self._lock, self._here = Lock(), local()
        self._own: list[set[int]] = []  # the graphs of each thread that runs by itself
        self._shared: set[int] = set()
        self._one: OneThread | None = None

    def graphs(self) -> set[int]:
        """Those that a run finds which this thread asks for; whoever captures another one adds it."""
        found: set[int] | None = getattr(self._here, "graphs", None)
        if found is None:
            with self._lock:
                found = self._shared
                if len(self._own) < OWN_THREADS:
                    found = set()
                    self._own.append(found)
            self._here.graphs = found
        return found

    def forget(self) -> None:
        """All graphs are gone."""
        for graphs in (*self._own, self._shared):
            graphs.clear()

    def call(self, function: Callable[..., Left], *arguments: Any) -> Left:
        """What the function returns, or raises, in this thread or ours; see ``OneThread.call``."""
        if self.graphs() is not self._shared:
            return function(*arguments)
        with self._lock:
            one = self._one = self._one or OneThread()
        return one.call(function, *arguments)

    def close(self) -> None:
        """Ends our thread. Safe to call twice."""
        with self._lock:
            if self._one is not None:
                self._one.close()


class OneThread:
    """Calls everything in one thread of its own, whoever asks, one after the other.

    It serves as long as anybody may ask: a pool of ``concurrent.futures`` ends with the main thread, when other threads
    of a program may still be at work.
    """

    def __init__(self) -> None:
        self._lock, self._calls = Lock(), SimpleQueue[_Call | None]()
        self._thread = Thread(target=_serve, args=(self._calls,), name="accel-ort-cuda", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._calls.put, None)
        self._end.atexit = False

    def call(self, function: Callable[..., Left], *arguments: Any) -> Left:
        """What the function returns, or raises. Whoever is interrupted meanwhile still waits until it is done.

        Raises:
            EngineError: It was closed.
        """
        future: Future[Left] = Future()
        with self._lock:
            if not self._end.alive:
                raise EngineError("the decoder session is closed", remedy="Load the bundle again")
            self._calls.put((future, function, arguments))
        try:
            return future.result()
        finally:
            wait([future])  # what it reads must stay as it is
            del future  # it holds an error, whose frames hold it

    def close(self) -> None:
        """Ends the thread. Safe to call twice."""
        with self._lock:
            self._end()
        self._thread.join()


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    for call in iter(calls.get, None):
        future, function, arguments = call
        del call
        try:
            found = function(*arguments)
        except BaseException as error:  # the caller's, whatever it is
            del function, arguments  # before the caller goes on, who may want their memory
            traceback.clear_frames(error.__traceback__)
            future.set_exception(error)
        else:
            del function, arguments
            future.set_result(found)
            del found
        del future  # until the next one comes nothing is held


__all__ = ["OWN_THREADS", "OneThread", "RunThreads"]
