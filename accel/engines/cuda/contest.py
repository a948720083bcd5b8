"""Which of several ways to compute the same is fastest: measured once per shape and GPU, kept beside built engines."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from accel import __version__
from accel.engines.capturing import is_disturbed
from accel.engines.cuda.device import Device, is_full
from accel.engines.cuda.recording import recording
from accel.storage import replace_file
from accel.store import cache_folder

_log = logging.getLogger("accel")
_RUNS, _REPLAYS = 8, 3  # of a way in one recording; of that
_TURNS = 3  # of each way: clocks drift by more than ways differ
_NEVER = 1e9  # microseconds of what cannot run; in the file too
_NOT_NOW = 1e8  # of what had no memory left, or could not be recorded: the process remembers it, the file does not
_TRIES = 3  # to time any way at all, before the process takes what it has
_SCHEMA = 7  # of the file; raised when times are taken in another way, or a way of the same name changes
Way = Callable[[], object]
_writing = threading.Lock()  # the file, which sessions share


class Contest:
    """Picks ways by name.

    Args:
        device: On the CPU nothing is measured: the first way wins.
        folder: Where results are kept; None: ``kernels`` in this user's cache.
    """

    def __init__(self, device: Device, folder: Path | None = None) -> None:
        self._device = device
        self._path = (folder or cache_folder() / "kernels") / f"{_slug(f'{device.title} {device.version}')}.json"
        self._lock = threading.RLock()  # a way may hold a contest of its own
        self._known: dict[str, dict[str, float]] | None = None  # key -> way -> microseconds
        self._unkept: dict[str, dict[str, float]] = {}  # likewise
        self._untimed: Counter[str] = Counter()  # key -> contests in which no way could be timed, though some may run

    def pick(self, key: str, ways: Mapping[str, Way]) -> str:
        """The fastest way's name.

        Ways that fail lose; while a run is recorded nothing can be measured, and the first one wins what is not known.

        Args:
            key: Says what is computed: of which shape and type.
            ways: The preferred one first; each writes the same result.
        """
        first = next(iter(ways))
        if len(ways) == 1 or not self._device.is_gpu:
            return first
        with self._lock:
            times = self._unkept.get(key) or self._times().get(key, {})
            lacking, again = not ways.keys() <= times.keys(), 0 < self._untimed[key] < _TRIES
            if (lacking or again) and not torch.cuda.is_current_stream_capturing():
                times = _times_of(ways, self._device.eviction())
                self._remember(key, times)
            elif lacking:
                return first
        return min(ways, key=lambda name: times[name])

    def _remember(self, key: str, times: dict[str, float]) -> None:
        """Keeps a contest's result; the process alone knows one that may turn out otherwise."""
        timed, final = min(times.values()) < _NOT_NOW, _NOT_NOW not in times.values()
        if not timed:
            _log.warning("no way to compute %s could be timed here; the first that may run is taken", key)
        if final:
            self._unkept.pop(key, None)
            self._keep(key, times)
        else:
            self._unkept[key] = times  # untimed ones too: what is recorded next must not take what cannot run
        if timed or final:
            del self._untimed[key]
        else:
            self._untimed[key] += 1

    def _times(self) -> dict[str, dict[str, float]]:
        if self._known is None:
            self._known = self._read()
        return self._known

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self._path.read_text())
            return found["microseconds"] if found.get("schema") == _SCHEMA else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # none yet, or a file that nobody can read: measured again

    def _keep(self, key: str, times: dict[str, float]) -> None:
        head = {"schema": _SCHEMA, "accelrt": __version__, "device": self._device.title}
        with _writing:
            self._known = self._read() | self._times() | {key: times}  # others may have written meanwhile
            data = json.dumps(head | {"microseconds": self._known}, indent=1)
            try:
                replace_file(self._path, data.encode())
            except OSError as error:
                _log.info("which kernels are fastest here is not kept: %s", error)


def _times_of(ways: Mapping[str, Way], before: Way) -> dict[str, float]:
    """Microseconds of one run of each way, and of what is done before it: the best of several turns.

    ``_NEVER`` where it cannot run, ``_NOT_NOW`` where it could not be timed.
    """
    times = {name: _microseconds(way, before) for name, way in ways.items()}
    for _ in range(_TURNS - 1):
        for name, way in ways.items():
            if times[name] < _NOT_NOW:
                again = _microseconds(way, before)
                times[name] = min(times[name], again) if again < _NOT_NOW else again
    return times


def _microseconds(way: Way, before: Way) -> float:
    """One turn."""
    try:
        for _ in range(2):
            way()  # compiles, and lets ways within it be measured
        torch.cuda.current_stream().synchronize()
    except Exception as error:  # a tile that does not fit this GPU; what breaks the GPU shows at the next call
        _log.debug("a way cannot run here: %s", error)
        return _NOT_NOW if is_full(error) or is_disturbed(error) else _NEVER
    try:
        return _replayed(way, before)
    except Exception as error:  # no memory, or another thread's call that no recording survives
        _log.debug("a way cannot be timed now: %s", error)
        return _NOT_NOW


def _replayed(way: Way, before: Way) -> float:
    """Microseconds of a run in a recording of several, which is replayed a few times."""
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        for _ in range(_RUNS):
            before()
            way()
    best = math.inf
    for _ in range(_REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        best = min(best, 1e3 * start.elapsed_time(stop) / _RUNS)
    return best


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".+" else "-" for letter in text)


__all__ = ["Contest"]
