"""Where a call's time goes, phase by phase: medians of T_c, T_p and T_s over repeated calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from accel.manifest import PhaseTimings
from accel.runtime.decoder import Decoder
from accel.runtime.encoder import Encoder
from accel.runtime.results import Timings

T = TypeVar("T")
ROUNDS = 5
PROMPT, STEPS = 128, 16  # tokens of the timed prefill, and steps after it
LENGTH, BATCHES = 128, (1, 8)  # tokens and rows of the timed forwards


def time_decoder(decoder: Decoder, ids: NDArray[np.int64]) -> tuple[PhaseTimings, ...]:
    """Times prefill and decode steps of one greedy sequence.

    The prefill is a call that makes one token; a step is what a call that makes more takes beyond that, by its steps.

    Args:
        decoder: The model.
        ids: int64 [N], N >= 1: text, repeated to 128 tokens if it is shorter.
    """
    room = min(decoder.capacity, decoder.arch.max_positions)
    length = max(1, min(PROMPT, room // 2))
    steps = min(STEPS, room - length)
    prompt = np.resize(ids, length)
    options: Any = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": [], "num_return_sequences": 1}

    def call(count: int) -> Timings:
        result: Any = decoder.generate(prompt, max_new_tokens=count, min_new_tokens=0, **options)
        timings: Timings = result.timings
        return timings

    rounds = _repeat(lambda: (call(1), call(1 + steps)))
    prefills = [first for first, _ in rounds]
    phases = [_phase(f"prefill of {length} tokens", prefills, 1)]
    if steps > 0:
        phases.append(_phase("decode step", [_minus(whole, first) for first, whole in rounds], steps))
    return tuple(phases)


def time_encoder(encoder: Encoder, ids: NDArray[np.int64]) -> tuple[PhaseTimings, ...]:
    """Times forwards of one and of eight rows.

    Args:
        encoder: The model.
        ids: int64 [N], N >= 1: text, repeated to 128 tokens if it is shorter.
    """
    length = min(LENGTH, encoder.arch.max_positions)
    row = np.resize(ids, length)
    return tuple(
        time_call(f"forward of {batch}x{length}", partial(_forward, encoder, np.tile(row, (batch, 1))))
        for batch in BATCHES
    )


def _forward(encoder: Encoder, rows: NDArray[np.int64]) -> Timings:
    return encoder(rows).timings


def time_call(name: str, call: Callable[[], Timings]) -> PhaseTimings:
    """Times any call that says where its time went."""
    return _phase(name, _repeat(call), 1)


def _repeat(call: Callable[[], T]) -> list[T]:
    call()  # the first one warms up
    return [call() for _ in range(ROUNDS)]


def _minus(whole: Timings, start: Timings) -> Timings:
    return Timings.measured(whole.total - start.total, whole.compute - start.compute, whole.prepost - start.prepost)


def _phase(name: str, calls: list[Timings], parts: int) -> PhaseTimings:
    """The median of each share, divided by ``parts``. The difference of two calls may fall below zero by noise."""
    compute, prepost, system = (
        max(0.0, median(getattr(timings, share) for timings in calls)) / parts
        for share in ("compute", "prepost", "system")
    )
    return PhaseTimings(name, compute, prepost, system, len(calls))


__all__ = ["ROUNDS", "time_call", "time_decoder", "time_encoder"]
