"""Drawn tokens beside the reference and beside the host's own sampler, which share only what they are to compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.runtime.candidates import draw
from accel.runtime.sampling import Sampler, SamplingParams

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this system")
from accel_kernels.sample import reference, sample, sample_workspace  # noqa: E402

VOCAB = 1301  # no multiple of anything
NAN, INF = float("nan"), float("inf")
LAST = float(np.nextafter(1.0, 0.0))  # the largest uniform number
Draw = tuple[float, float, float, float, float]
# temperature, top_k, top_p, min_p
FILTERS: tuple[tuple[float, int, float, float], ...] = (
    (1.0, 0, 1.0, 0.0), (0.8, 50, 1.0, 0.0), (0.8, 50, 0.95, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 0.9, 0.1),
    (100.0, 0, 0.5, 0.0), (1.3, 7, 0.5, 0.2), (1.0, 0, 0.0, 0.0), (1e-30, 0, 0.5, 0.0), (0.01, 0, 0.999, 0.0),
    (2.0, 3, 0.999999, 0.0), (1.0, 100_000, 0.7, 0.0), (1.0, 0, 1.0, 1.0), (1.7, 900, 0.4, 0.0),
    (0.01, 50, 1.0, 0.0), (0.05, 400, 0.9, 0.0),
)  # fmt: skip
ROUNDING = 1e-6  # how far weights may move a border: what a GPU's exp and sums of float32 lose
KINDS = ("flat", "peaked", "ties", "half banned", "equal", "one", "narrow", "outlier")


def scores_of(kind: str, size: int = VOCAB) -> NDArray[np.float32]:
    rng = np.random.default_rng(size)
    scores = rng.standard_normal(size)
    if kind == "peaked":
        scores *= 5
    elif kind == "ties":
        scores = np.round(3 * scores)
    elif kind == "half banned":
        scores[rng.random(size) < 0.5] = -INF
    elif kind == "equal":
        scores[:] = 1.5
    elif kind == "one":
        scores[:] = -INF
        scores[size // 2] = 3.0
    elif kind == "narrow":
        scores = 10 + 1e-5 * scores  # a handful of float32 values
    elif kind == "outlier":
        scores[size // 3] = -1e6
    return scores.astype(np.float32)


def drawn_on_host(scores: NDArray[np.float32], row: Draw) -> int:
    temperature, top_k, top_p, min_p, uniform = row
    if temperature == 0:
        return int(scores.argmax())
    params = SamplingParams(do_sample=True, temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p)
    ids, weights = Sampler(params, len(scores))._candidates(scores)
    return int(ids[draw(weights, uniform)])


def moved(row: Draw) -> Iterator[Draw]:
    """The same draw with each border where rounding may put it."""
    temperature, top_k, top_p, min_p, uniform = row
    for step in (-ROUNDING, 0.0, ROUNDING):
        for other in (-ROUNDING, 0.0, ROUNDING):
            least, share = min_p * (1 + other), min(1.0, max(0.0, top_p + other)) if top_p < 1 else 1.0
            yield temperature, top_k, share, min(least, 1.0), min(max(uniform + step, 0.0), LAST)


def drawn(logits: Any, draws: Any, span: int = 2048, **options: Any) -> tuple[Any, Any]:
    space = sample_workspace(*logits.shape, logits.device, span)
    for tensor in space:  # nothing is expected of it
        tensor.fill_(-7)
    out = torch.full((len(logits),), -1, device=logits.device)
    value = torch.full((len(logits),), NAN, device=logits.device)
    sample(logits, draws, out, value, space, span=span, **options)
    return out, value


def check(device: Any, scores: NDArray[np.float32], rows: list[Draw], span: int = 2048) -> list[int]:
    """Draws each of the rows from the same scores; equal to the host and the reference but for rounding."""
    logits = torch.from_numpy(np.tile(scores, (len(rows), 1))).to(device)
    draws = torch.tensor(rows, dtype=torch.float64, device=device)
    ids, values = drawn(logits, draws, span)
    assert torch.equal(values, logits.gather(1, ids[:, None])[:, 0])
    expected = reference(logits.cpu(), draws.cpu())[0].tolist()
    tokens = ids.tolist()
    for row, token, wanted in zip(rows, tokens, expected):
        if token != wanted or token != drawn_on_host(scores, row):
            assert token in {drawn_on_host(scores, near) for near in moved(row)}, (row, token, wanted)
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_host_and_the_reference(device: Any, kind: str) -> None:
    """Of every filter the first token, the last one, and one between."""
    uniforms = np.random.default_rng(1).random(len(FILTERS))
    rows = [(*filters, (0.0, LAST, float(uniforms[i]))[i % 3]) for i, filters in enumerate(FILTERS)]
    check(device, scores_of(kind), rows)


@pytest.mark.parametrize("size", [1, 2, 5, 129])
def test_small_vocabularies(device: Any, size: int) -> None:
    for kind in ("flat", "equal", "one"):
        check(device, scores_of(kind, size), [(*filters, 0.6) for filters in FILTERS[:8]], span=64)


@pytest.mark.parametrize("filters", [(1.0, 0, 0.9, 0.0), (1.0, 6000, 0.8, 0.0), (1.0, 9000, 1.0, 0.0)])
def test_more_than_one_program_searches(device: Any, filters: tuple[float, int, float, float]) -> None:
    """Both surveys take part: a part of the scores' range holds more than what is few."""
    for kind in ("flat", "narrow"):
        check(device, scores_of(kind, 30_011), [(*filters, 0.2), (*filters, LAST)], span=8192)


def test_of_a_cold_row_only_what_weighs_anything_is_listed(device: Any) -> None:
    """One program searches the list: of a cold row's top_k it would be nearly the vocabulary."""
    size = 30_011
    scores = 3 * np.random.default_rng(0).standard_normal(size).astype(np.float32)
    rows: list[Draw] = [(0.01, 50, 1.0, 0.0, 0.5), (0.05, 200, 1.0, 0.0, 0.5), (0.8, 50, 1.0, 0.0, 0.5)]
    check(device, scores, rows)
    logits = torch.from_numpy(np.tile(scores, (len(rows), 1))).to(device)
    draws = torch.tensor(rows, dtype=torch.float64, device=device)
    space = sample_workspace(*logits.shape, logits.device)
    out, value = torch.empty(len(rows), dtype=torch.int64, device=device), torch.empty(len(rows), device=device)
    sample(logits, draws, out, value, space)
    assert (space.cursors[:, 0] <= 4096).all() and (space.cursors[:, 0] > 0).all(), space.cursors


def test_many_draws_and_rows(device: Any) -> None:
    """As many tokens equal the host's as are drawn, but where rounding decides, and 33 rows are one call."""
    calls = 1 if torch.device(device).type == "cpu" else 100
    rng, scores = np.random.default_rng(3), scores_of("flat", 700)
    differing = 0
    for _ in range(calls):
        rows: list[Draw] = [(1.2, 300, 0.9, 0.01, float(uniform)) for uniform in rng.random(33)]
        tokens = check(device, scores, rows)
        differing += sum(token != drawn_on_host(scores, row) for row, token in zip(rows, tokens))
    assert differing <= 1 + calls * 33 // 1000  # some 300 tokens have 300 borders of 1e-6 each


def test_rows_that_are_not_drawn(device: Any) -> None:
    """Greedy ones take the first best token beside drawn ones; NaN and infinity are found, whatever was asked."""
    logits = torch.from_numpy(np.stack([scores_of("ties")] * 7)).to(device)
    logits[2, 1200], logits[3, 7], logits[4, 9], logits[5] = NAN, INF, -NAN, -INF
    rows: list[Draw] = [(0.0, 0, 1.0, 0.0, 0.4), (0.9, 40, 0.9, 0.1, 0.4)] * 3 + [(0.0, 0, 1.0, 0.0, LAST)]
    draws = torch.tensor(rows, dtype=torch.float64, device=device)
    ids, values = drawn(logits, draws)
    expected, chosen = reference(logits.cpu(), draws.cpu())
    assert ids.tolist() == expected.tolist() and ids[2:6].tolist() == [1200, 7, 9, 0]
    assert torch.equal(values.cpu().nan_to_num(nan=123.0), chosen.nan_to_num(nan=123.0))
    assert ids[0] == ids[6] == int(scores_of("ties").argmax())


def test_two_draws_by_turns(device: Any) -> None:
    """The host writes one while the other one holds."""
    logits = torch.from_numpy(scores_of("flat")[None]).to(device)
    pinned = torch.device(device).type == "cuda"
    draws = torch.tensor([[[1.0, 0, 1, 0, 0.1]], [[1.0, 0, 1, 0, 0.9]]], dtype=torch.float64, pin_memory=pinned)
    found = []
    for turn in (0, 1):
        which = torch.tensor([turn], dtype=torch.int32, device=device)
        found.append(int(drawn(logits, draws, turn=which)[0]))
        assert found[-1] == int(reference(logits.cpu(), draws, turn=which)[0])
    assert found[0] < found[1]


def test_equals_in_several_chunks(device: Any) -> None:
    """Of equals on the nucleus' border those of the highest ids stay, wherever they stand."""
    scores = np.zeros(400, np.float32)
    scores[[3, 130, 390]] = 2.0  # e^2 of 397 + 3 e^2 each
    total = 397 + 3 * np.exp(2.0)
    top_p = float((3 * np.exp(2.0) + 99.5) / total)  # 100 of the zeros stay
    tokens = check(device, scores, [(1.0, 0, top_p, 0.0, uniform) for uniform in (0.0, 0.07, 0.19, 0.5, LAST)], 64)
    assert tokens[0] == 3 and tokens[1] == 130 and tokens[-1] == 399
    assert all(token >= 299 for token in tokens[2:])
