"""Which tokens may be drawn, and the draw, without sorting or summing a vocabulary in double precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CHUNK = 64  # scores of which one maximum is kept
_SMALL = 4096  # up to here the plain way is as fast
_BINS, _PER_NAT = 256, 8.0  # of relative log weights: down to exp(-32)
# What float32 can divide by: near the one all but the best token weigh nothing, near the other all weigh the same.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e38


def usable_temperature(temperature: float) -> float:
    """The temperature, or the nearest one that float32 can divide by."""
    return min(max(temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE)


def relative_logs(scores: NDArray[np.float32], best: float, temperature: float) -> NDArray[np.float32]:
    """(scores - best) / temperature, float32 [V]: logarithms of weights, the best token's 0."""
    logs = np.subtract(scores, np.float32(best))
    return np.divide(logs, np.float32(usable_temperature(temperature)), out=logs)


def top_k_ids(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The k largest scores' indices, ascending; ties with the k-th too. 0 < k <= V."""
    whole = len(scores) // _CHUNK
    if len(scores) > _SMALL and k <= whole:
        # k chunks reach the k-th largest of their maxima: so do at least k scores.
        maxima = scores[: whole * _CHUNK].reshape(whole, _CHUNK).max(1)
        near = np.flatnonzero(scores >= np.partition(maxima, -k)[-k])
        return near[top_k_ids(scores[near], k)] if len(near) < len(scores) else _top_k_plainly(scores, k)
    return _top_k_plainly(scores, k)


def _top_k_plainly(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def nucleus(logs: NDArray[np.float32], weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of what is left when the least probable tokens go that sum to 1 - top_p at most.

    At least one is left; of equals those of lower indices go first.

    Args:
        logs: Of the weights, at most 0.
        weights: exp(logs).
        top_p: In [0, 1).
    """
    total = float(weights.sum(dtype=np.float64))
    spared = (1.0 - top_p) * total
    # Of n tokens none at or below spared / n can be left, as all of them together stay within it.
    likely = np.flatnonzero(weights > spared / len(weights))
    if not len(likely):
        likely = np.flatnonzero(logs == 0.0)[-1:]
    logs, weights = logs[likely], weights[likely]
    tail = max(0.0, total - float(weights.sum(dtype=np.float64)))
    return likely[_above_border(logs, weights, spared - tail)]


def _above_border(logs: NDArray[np.float32], weights: NDArray[np.float32], spared: float) -> NDArray[np.int64]:
    """Indices, ascending, of what is left when the lightest go that sum to ``spared`` at most; at least one.

    Sorts only within one bin of weights, that in which the border lies.
    """
    depth = np.minimum(logs * -_PER_NAT, _BINS - 1).astype(np.intp)
    reaching = np.cumsum(np.bincount(depth, weights, minlength=_BINS)[::-1])[::-1]  # from the last bin up to each
    border = max(int(np.count_nonzero(reaching > spared)) - 1, 0)
    within = np.flatnonzero(depth == border)
    order = within[np.argsort(logs[within], kind="stable")]
    below = reaching[border + 1] if border + 1 < _BINS else 0.0
    kept = below + np.cumsum(weights[order], dtype=np.float64) > spared
    kept[-1:] = True
    taken = depth < border
    taken[order[kept]] = True
    return np.flatnonzero(taken)


def draw(weights: NDArray[np.float32], uniform: float) -> int:
    """The index whose share of the weights' sum a number of [0, 1) falls on."""
    padded = np.zeros(-(-len(weights) // _CHUNK) * _CHUNK, np.float32)
    padded[: len(weights)] = weights
    ends = np.cumsum(padded.reshape(-1, _CHUNK).sum(1), dtype=np.float64)
    target = min(uniform * ends[-1], np.nextafter(ends[-1], 0.0))  # rounding may push it onto the end
    chunk = int(np.searchsorted(ends, target, side="right"))
    own = weights[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    before = ends[chunk - 1] if chunk else 0.0
    place = int(np.searchsorted(before + np.cumsum(own, dtype=np.float64), target, side="right"))
    return chunk * _CHUNK + min(place, int(np.flatnonzero(own)[-1]))


__all__ = ["draw", "nucleus", "relative_logs", "top_k_ids", "usable_temperature"]
