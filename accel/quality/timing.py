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

    The prefill reaches from the call to its first token; a step is what the tokens after it take, by their number.

    Args:
        decoder: The model.
        ids: int64 [N], N >= 1: text, repeated to 128 tokens if it is shorter.
    """
    room = min(decoder.capacity, decoder.arch.max_positions)
    length = max(1, min(PROMPT, room // 2))
    steps = min(STEPS, room - length)
    prompt = np.resize(ids, length)
    options: Any = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": [], "num_return_sequences": 1}

    def call() -> tuple[Timings, Timings]:
        with decoder.stream(prompt, max_new_tokens=1 + steps, min_new_tokens=0, **options) as stream:
            next(stream)
            first = stream.timings
            for _ in range(steps):
                next(stream)
            return first, _minus(stream.timings, first)

    rounds = _repeat(call)
    phases = [_phase(f"prefill of {length} tokens", [first for first, _ in rounds], 1)]
    return (*phases, _phase("decode step", [rest for _, rest in rounds], steps)) if steps else tuple(phases)


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
    """The median of each share, divided by ``parts``."""
    compute, prepost, system = (
        median(getattr(timings, share) for timings in calls) / parts for share in ("compute", "prepost", "system")
    )
    return PhaseTimings(name, compute, prepost, system, len(calls))


__all__ = ["ROUNDS", "time_call", "time_decoder", "time_encoder"]
