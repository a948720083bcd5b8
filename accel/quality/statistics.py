"""The figures that a comparison rests on: paired differences with their interval, rank correlation, cosines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

MIN_BLOCKS = 5  # fewer say too little of how blocks vary
Vector = NDArray[np.float64]


def paired_difference(blocks: Sequence[Vector], level: float = 0.95) -> tuple[float, tuple[float, float] | None]:
    """Mean difference per token, and its confidence interval when tokens come in blocks that are correlated inside.

    With block i's sum of differences d_i over its n_i tokens, G blocks and N tokens in all::

        D  = sum(d_i) / N
        SE = sqrt(G / (G - 1) * sum((d_i - n_i D)^2)) / N
        interval = D ± t(G - 1) SE

    That is the variance of a ratio of two totals over sampled clusters (W. G. Cochran, Sampling Techniques, 3rd ed.
    1977, chapter 6, without the finite population's factor), which is also the cluster-robust variance of a mean
    (K.-Y. Liang and S. L. Zeger, Biometrika 73, 1986); E. Miller, "Adding Error Bars to Evals" (arXiv:2411.00640)
    recommends it, on paired differences, for language models. Blocks must be independent of each other.

    Args:
        blocks: Differences of each block's tokens, float64 [n_i], n_i >= 1.
        level: Of confidence.

    Returns:
        D, and the interval's ends; None instead of these with fewer than 5 blocks.
    """
    sums = np.array([block.sum() for block in blocks])
    counts = np.array([block.size for block in blocks], dtype=np.float64)
    total, count = counts.sum(), len(blocks)
    difference = float(sums.sum() / total)
    if count < MIN_BLOCKS:
        return difference, None
    residuals = sums - counts * difference
    error = float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / total)
    reach = t_quantile((1 + level) / 2, count - 1) * error
    return difference, (difference - reach, difference + reach)


def t_quantile(probability: float, freedom: int) -> float:
    """A quantile of Student's t distribution, by its expansion around the normal one.

    M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions, 26.7.5: within 0.001 at 97.5 % from 4 degrees
    of freedom on.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (order + 1) for order, term in enumerate(terms))


def rank_correlation(a: NDArray, b: NDArray) -> float | None:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs.

    Args:
        a, b: [N] each.

    Returns:
        None where it is not defined: fewer than two values, or all of one side equal.
    """
    if len(a) < 2:
        return None
    left, right = mean_ranks(a), mean_ranks(b)
    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum() / scale) if scale > 0 else None


def mean_ranks(values: NDArray) -> Vector:
    """Ranks from 1 on, float64 [N]; equal values get the mean of the ranks that they take together."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def cosines(a: NDArray, b: NDArray) -> Vector:
    """Cosine of each row of ``a`` to that row of ``b``, float64 [N]; two zero rows are alike, one has cosine 0."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    norms = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    found = (left * right).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    both_zero = ~left.any(axis=1) & ~right.any(axis=1)
    return np.asarray(np.where(both_zero, 1.0, found.clip(-1, 1)), dtype=np.float64)


__all__ = ["MIN_BLOCKS", "cosines", "mean_ranks", "paired_difference", "rank_correlation", "t_quantile"]
