"""Medians, paired ratios and the bootstrap bound they are judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MIN_ROUNDS = 15
DRAWS = 10_000


@dataclass(frozen=True)
class Ratio:
    """A paired ratio over rounds: its median, the 95 % upper bound of that median, and the number of rounds."""

    median: float
    upper: float
    rounds: int


def median(values: ArrayLike) -> float:
    return float(np.median(np.asarray(values, dtype=np.float64)))


def paired_ratio(ours: ArrayLike, theirs: ArrayLike) -> Ratio:
    """Ratio of two peers measured in the same rounds: one ratio per round, so that slow rounds cancel.

    Raises:
        ValueError: The two do not have the same, positive, number of rounds.
    """
    numerator, denominator = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if numerator.shape != denominator.shape or numerator.ndim != 1 or not numerator.size:
        raise ValueError(f"rounds do not pair: {numerator.shape} and {denominator.shape}")
    ratios = numerator / denominator
    return Ratio(median(ratios), upper_bound(ratios), ratios.size)


def upper_bound(values: ArrayLike, level: float = 0.95, seed: int = 0) -> float:
    """One-sided upper confidence bound of the median: bootstrap over rounds, percentile method."""
    sample = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, sample.size, (DRAWS, sample.size))
    return float(np.quantile(np.median(sample[draws], axis=1), level))
