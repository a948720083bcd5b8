"""A step as two, one after the other: what a chunk's tokens need at once is halved."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import ChosenTokens, Draws, StepInputs

Left = TypeVar("Left", NDArray[np.float32], ChosenTokens)  # by a step: logits, or tokens


def halves(inputs: StepInputs) -> tuple[StepInputs, StepInputs]:
    """The first half of a step's tokens, and the others, which find the first ones in the cache.

    A row whose tokens are cut through takes part in both.

    Args:
        inputs: At least two tokens; its wanted positions ascend.
    """
    middle = len(inputs.input_ids) // 2
    starts = inputs.query_lengths.cumsum() - inputs.query_lengths
    first = np.clip(middle - starts, 0, inputs.query_lengths).astype(np.int32)
    ids, positions, wanted = inputs.input_ids, inputs.position_ids, inputs.logits_positions
    later = inputs.query_lengths - first, inputs.past_lengths + first
    return (
        StepInputs(ids[:middle], positions[:middle], first, inputs.past_lengths, wanted[wanted < middle]),
        StepInputs(ids[middle:], positions[middle:], *later, wanted[wanted >= middle] - middle),
    )


def halved_draws(draws: Draws, first: int) -> tuple[Draws, Draws]:
    """Those of the first ``first`` wanted positions, and of the others."""
    return (
        Draws(draws.filters[:first], draws.uniforms[:first]),
        Draws(draws.filters[first:], draws.uniforms[first:]),
    )


def joined(first: Left, second: Left) -> Left:
    """What both halves left, in the order of their wanted positions."""
    if isinstance(first, ChosenTokens):
        tokens, logits = np.concatenate([first.tokens, second.tokens]), np.concatenate([first.logits, second.logits])
        return ChosenTokens(tokens, logits)
    return np.concatenate([first, second])


__all__ = ["Left", "halved_draws", "halves", "joined"]
