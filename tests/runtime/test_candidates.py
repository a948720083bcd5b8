"""What may be drawn, beside the plain way: sorting and summing everything in double precision."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.runtime.candidates import draw, nucleus, relative_logs, top_k_ids
from accel.runtime.sampling import Sampler, SamplingParams

VOCAB = 20_011  # whole chunks and a rest


def scores_of(kind: str, size: int = VOCAB) -> NDArray[np.float32]:
    rng = np.random.default_rng(size)
    scores = rng.standard_normal(size).astype(np.float32) * 3
    if kind == "peaked":
        scores[rng.integers(0, size, 40)] += rng.exponential(4, 40).astype(np.float32) + 9
    elif kind == "ties":
        scores = np.round(scores)
    elif kind == "banned":
        scores[rng.random(size) < 0.5] = -np.inf
    elif kind == "equal":
        scores[:] = 1.5
    elif kind == "one":
        scores[:] = -np.inf
        scores[size // 2] = 3.0
    return scores


KINDS = ("flat", "peaked", "ties", "banned", "equal", "one")


def weighed(scores: NDArray[np.float32], temperature: float = 1.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    logs = relative_logs(scores, float(scores.max()), temperature)
    return logs, np.exp(logs)


def plain_nucleus(logs: NDArray[np.float32], top_p: float) -> list[int]:
    probabilities = np.exp(logs.astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(logs, kind="stable")
    kept = np.cumsum(probabilities[order]) > 1.0 - top_p
    kept[-1] = True
    return sorted(order[kept].tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 300, VOCAB])
@pytest.mark.parametrize("k", [1, 2, 50, 290])
def test_top_k(kind: str, size: int, k: int) -> None:
    scores, k = scores_of(kind, size), min(k, size)
    assert top_k_ids(scores, k).tolist() == np.flatnonzero(scores >= np.sort(scores)[-k]).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 300, VOCAB])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
def test_nucleus(kind: str, size: int, top_p: float) -> None:
    """Up to the tokens on whose side of the border rounding decides."""
    logs, weights = weighed(scores_of(kind, size))
    found, expected = nucleus(logs, weights, top_p).tolist(), plain_nucleus(logs, top_p)
    assert found == sorted(found) and len(set(found) ^ set(expected)) <= (1 if size < VOCAB else 4)
    assert found and weights[found].max() == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 63, 64, 65, VOCAB])
def test_draws(kind: str, size: int) -> None:
    _, weights = weighed(scores_of(kind, size))
    shares = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for uniform in (0.0, *np.random.default_rng(2).random(200), np.nextafter(1.0, 0.0)):
        index = draw(weights, float(uniform))
        before = shares[index - 1] if index else 0.0
        assert weights[index] > 0 and before - 1e-6 <= uniform <= shares[index] + 1e-6


def test_temperatures_beyond_what_single_precision_divides_by() -> None:
    logs, weights = weighed(scores_of("flat"), 1e-60)
    assert np.isfinite(weights).all() and weights.sum() == 1.0 and logs.max() == 0.0


def test_sampling_costs_less_than_sorting_the_vocabulary() -> None:
    """A sampled step must not wait for its sampler: a GPU makes a token in one millisecond."""
    vocab = 151_936
    scores, order = scores_of("flat", vocab), []
    sampler = Sampler(SamplingParams(do_sample=True, top_p=0.9, temperature=0.8, seed=0), vocab)

    def seconds(run: object) -> float:
        start = time.perf_counter()
        run()  # type: ignore[operator]
        return time.perf_counter() - start

    for _ in range(9):
        order.append((seconds(lambda: sampler.pick(scores, [])), seconds(lambda: np.argsort(scores, kind="stable"))))
    ours, sorting = np.median(order, axis=0)
    assert ours < sorting
