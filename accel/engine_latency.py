"""Runs every profile of an engine on this machine's GPU, so that the first request finds it warm, and times it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from accel.engine_request import BuildRequest
from accel.engines.session import SessionOptions, StepInputs
from accel.engines.tensorrt.adapter import Flavour
from accel.engines.tensorrt.kernel_cache import kernels_path
from accel.engines.tensorrt.lookup import facts_of
from accel.engines.tensorrt.packages import current_sm
from accel.errors import DependencyError, EngineUnavailableError
from accel.store import StoredEngine

if TYPE_CHECKING:
    from accel.builder.profiles import Profile

ROUNDS = 10


def measure_engine(request: BuildRequest, engine: StoredEngine, flavour: Flavour) -> dict[str, float]:
    """Loads a stored engine, warms it up and times each of its profiles.

    Args:
        request: What the engine was built for.
        engine: From the store; open as long as this runs.

    Returns:
        Median milliseconds of a call, by the profile's name.

    Raises:
        EngineUnavailableError: There is no GPU of its SM here, or it does not load.
        DependencyError: cuda-python is missing.
        EngineError: It failed while running.
    """
    from accel.engines.tensorrt.open import open_tensorrt

    key, sm = request.key, current_sm()
    if find_spec("cuda") is None:
        raise DependencyError("cuda-python is not installed", remedy='Run: pip install "cuda-python>=12.8"')
    if sm is None or sm not in key.sm:
        remedy = "Run it on such a machine with the same store: accel warmup does"
        raise EngineUnavailableError(f"no GPU {'+'.join(key.sm)} here", where=engine.path.name, remedy=remedy)
    facts = facts_of(engine.manifest)
    options = SessionOptions(capacity=key.capacity, max_batch=request.max_batch)
    kernels = kernels_path(key, sm)  # which a session of accel.load finds
    session = open_tensorrt(request.bundle, request.variant, options, engine.plan(), facts, flavour, kernels=kernels)
    try:
        return warm_and_measure(session, request.settings.profiles)
    finally:
        session.close()


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


__all__ = ["measure_engine", "warm_and_measure"]
