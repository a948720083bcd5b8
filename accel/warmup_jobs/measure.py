"""Runs every profile of an engine, so that the first request finds it warm, and times it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from accel.engines.session import StepInputs

if TYPE_CHECKING:
    from accel.builder.profiles import Profile

ROUNDS = 10


def warm_and_measure(session: Any, profiles: Sequence[Profile], rounds: int = ROUNDS) -> dict[str, float]:
    """Warms a session up, which compiles kernels, captures graphs and keeps both, then times each profile.

    Args:
        session: Of a TensorRT engine, before its first call: a decoder's caches are written to.
        profiles: The engine's; each is timed at the batch and sequence that it was tuned for.
        rounds: Calls per profile.

    Returns:
        Median milliseconds of a call, by the profile's name.

    Raises:
        EngineError: The engine failed.
    """
    session.warm_up()
    found = {}
    for profile in profiles:
        call = _call(session, profile)
        call()
        found[profile.name] = round(1000 * statistics.median(_seconds(call) for _ in range(rounds)), 3)
    return found


def _call(session: Any, profile: Profile) -> Callable[[], object]:
    rows, tokens = profile.batch.opt, profile.sequence.opt
    if not hasattr(session, "step"):
        return lambda: session.run({"input_ids": np.zeros((rows, tokens), np.int64)})
    lengths = np.zeros(session.max_batch, np.int32)
    lengths[:rows] = tokens
    positions = np.tile(np.arange(tokens), rows)
    last = np.arange(1, rows + 1) * tokens - 1
    inputs = StepInputs(np.zeros(rows * tokens, np.int64), positions, lengths, np.zeros_like(lengths), last)
    return lambda: session.step(inputs)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


__all__ = ["warm_and_measure"]
