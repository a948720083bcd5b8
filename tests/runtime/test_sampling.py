"""Sampling against transformers' own processors, and the draws against the distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from accel.errors import EngineError, InputError
from accel.runtime import sampling
from accel.runtime.sampling import Sampler, SamplingParams, log_softmax, score_targets, top_logprobs

VOCAB = 500


def _logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


def _reference_probabilities(
    logits: np.ndarray, history: list[int], banned: list[int], **params: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and probabilities after transformers' processors, in generate's order."""
    steps: list[Any] = []
    if params.get("repetition_penalty", 1.0) != 1.0:
        steps.append(reference.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if banned:
        steps.append(reference.MinNewTokensLengthLogitsProcessor(len(history), 1, banned))
    if params.get("temperature", 1.0) != 1.0:
        steps.append(reference.TemperatureLogitsWarper(params["temperature"]))
    if params.get("top_k"):
        steps.append(reference.TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1.0) < 1.0:
        steps.append(reference.TopPLogitsWarper(params["top_p"]))
    if params.get("min_p"):
        steps.append(reference.MinPLogitsWarper(params["min_p"]))
    scores = torch.tensor(logits)[None].clone()
    for step in steps:
        scores = step(torch.tensor([history]), scores)
    return scores[0].numpy(), scores[0].double().softmax(-1).numpy()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 7},
        {"top_k": 10_000},
        {"top_p": 0.8},
        {"top_p": 0.0},
        {"min_p": 0.05},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"temperature": 1.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(params: dict[str, Any]) -> None:
    for seed in range(8):
        logits = _logits(seed)
        history = [int(i) for i in np.argsort(logits)[-3:]] + [3, 3, 4]
        banned = [int(np.argsort(logits)[-4])] if seed % 2 else []
        _, expected = _reference_probabilities(logits, history, banned, **params)
        actual = Sampler(SamplingParams(do_sample=True, **params), VOCAB).probabilities(logits, history, banned)
        np.testing.assert_array_equal(actual > 0, expected > 0)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-12)


def test_greedy_with_penalty_and_ban_is_that_of_transformers() -> None:
    for seed in range(20):
        logits = _logits(seed)
        order = np.argsort(logits)[::-1]
        history, banned = [int(order[0]), 5], [int(order[1])]
        scores, _ = _reference_probabilities(logits, history, banned, repetition_penalty=1.5)
        picked = Sampler(SamplingParams(repetition_penalty=1.5), VOCAB).pick(logits, history, banned)
        assert picked == int(scores.argmax())
        assert picked not in banned


def test_ties_at_the_kth_token_are_kept() -> None:
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0], dtype=np.float32)
    probabilities = Sampler(SamplingParams(do_sample=True, top_k=2), 5).probabilities(logits, [])
    assert list(np.flatnonzero(probabilities)) == [1, 2, 3]


def test_equal_logits_with_an_empty_nucleus_keep_one_token() -> None:
    sampler = Sampler(SamplingParams(do_sample=True, top_p=0.0), 8)
    assert np.count_nonzero(sampler.probabilities(np.zeros(8, dtype=np.float32), [])) == 1


def test_greedy_is_argmax_and_leaves_the_logits_alone() -> None:
    logits = _logits(1)
    before = logits.copy()
    assert Sampler(SamplingParams(), VOCAB).pick(logits, [1, 2]) == int(logits.argmax())
    Sampler(SamplingParams(do_sample=True, repetition_penalty=2.0, seed=0), VOCAB).pick(logits, [1, 2], [3])
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -30.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(do_sample=True, temperature=0.8, top_k=5, seed=7), 6)
    expected = sampler.probabilities(logits, [])
    draws = 20_000
    counts = np.bincount([sampler.pick(logits, []) for _ in range(draws)], minlength=6)
    assert counts[5] == 0
    chi_square = float((((counts - draws * expected) ** 2)[:5] / (draws * expected[:5])).sum())
    assert chi_square < 18.47  # 99.9 % quantile with 4 degrees of freedom; the seed is fixed
    # Power of the check: the same counts do not fit the distribution without the temperature.
    other = np.exp(logits[:5]) / np.exp(logits[:5]).sum()
    assert float(((counts[:5] - draws * other) ** 2 / (draws * other)).sum()) > 100


def test_seed_repeats_and_streams_differ() -> None:
    params = SamplingParams(do_sample=True, seed=11)
    logits = _logits(3, scale=0.5)

    def draw(stream: int) -> list[int]:
        sampler = Sampler(params, VOCAB, stream)
        return [sampler.pick(logits, []) for _ in range(20)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    unseeded = [Sampler(SamplingParams(do_sample=True), VOCAB) for _ in range(2)]
    assert [unseeded[0].pick(logits, []) for _ in range(20)] != [unseeded[1].pick(logits, []) for _ in range(20)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (0, -1.0, float("nan"), float("inf"), 10**400, "1", True, None)],
        *[("top_k", v) for v in (-1, 1.5, float("nan"), True, "5")],
        *[("top_p", v) for v in (-0.1, 1.1, float("nan"), float("inf"), "0.9", False)],
        *[("min_p", v) for v in (-0.1, 1.1, float("nan"), "0.1")],
        *[("repetition_penalty", v) for v in (0.0, -2.0, float("nan"), float("inf"), [1.0])],
        *[("seed", v) for v in (-1, 0.5, "1", True)],
        *[("do_sample", v) for v in (1, "yes", None)],
    ],
)
def test_bad_parameter_is_named(name: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{"do_sample": True, name: value})  # type: ignore[arg-type]
    assert caught.value.where == name
    assert f"{name} must be" in str(caught.value)


def test_numpy_scalars_are_accepted() -> None:
    SamplingParams(do_sample=True, temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(1))  # type: ignore[arg-type]


def test_what_acts_on_draws_alone_is_off_by_default() -> None:
    """So that greedy parameters without any of it are not refused."""
    params = SamplingParams()
    assert {name: getattr(params, name) for name in sampling._SAMPLING_ONLY} == sampling._SAMPLING_ONLY


def test_option_without_effect_is_refused() -> None:
    with pytest.raises(InputError, match="temperature and top_p would be without effect") as caught:
        SamplingParams(temperature=0.5, top_p=0.9)
    assert "do_sample=True" in str(caught.value)


def test_resolve_puts_arguments_over_the_model_s_defaults() -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": None, "eos_token_id": 2, "seed": 4}
    assert SamplingParams.resolve(defaults, temperature=0.9, seed=None) == SamplingParams(
        do_sample=True, temperature=0.9, top_p=0.95
    )
    assert SamplingParams.resolve(defaults, do_sample=False) == SamplingParams()
    assert SamplingParams.resolve({"repetition_penalty": 1.1}) == SamplingParams(repetition_penalty=1.1)
    with pytest.raises(InputError, match="top_k would be without effect"):
        SamplingParams.resolve(defaults, do_sample=False, top_k=3)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True, top_p=0.9, seed=0)])
@pytest.mark.parametrize("fill", ["nan", "inf", "all minus inf"])
def test_broken_logits_raise(params: SamplingParams, fill: str) -> None:
    logits = _logits(0)
    if fill == "all minus inf":
        logits[:] = -np.inf
    else:
        logits[17] = float(fill)
    with pytest.raises(EngineError, match="no token can be chosen"):
        Sampler(params, VOCAB).pick(logits, [])
    with pytest.raises(EngineError):
        log_softmax(logits)


def test_masked_tokens_are_fine_and_never_drawn() -> None:
    logits = np.full(VOCAB, -np.inf, dtype=np.float32)
    logits[[3, 9]] = 0.0
    sampler = Sampler(SamplingParams(do_sample=True, top_k=50, top_p=0.99, min_p=0.1, seed=0), VOCAB)
    assert {sampler.pick(logits, []) for _ in range(50)} == {3, 9}


def test_banning_everything_raises() -> None:
    with pytest.raises(EngineError):
        Sampler(SamplingParams(), 3).pick(np.zeros(3, dtype=np.float32), [], [0, 1, 2])


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(500,\)"):
        Sampler(SamplingParams(), VOCAB).pick(np.zeros((1, VOCAB), dtype=np.float32), [])


def test_log_softmax_matches_torch() -> None:
    logits = np.stack([_logits(0), _logits(1, scale=50.0) + 1e4])
    expected = torch.tensor(logits).double().log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 7])
def test_scored_targets_match_the_whole_table(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CACHED_VALUES", 3 * VOCAB)  # rows are taken three at a time
    logits = np.stack([_logits(seed, scale=20.0) + 100 * seed for seed in range(rows)])
    targets = np.arange(rows) * 31 % VOCAB
    scores, best = score_targets(logits, targets)
    np.testing.assert_allclose(scores, log_softmax(logits)[np.arange(rows), targets], rtol=1e-7, atol=1e-6)
    assert best.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scored_targets_must_be_finite(value: float) -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[1, 4] = value
    with pytest.raises(EngineError, match="NaN or infinity"):
        score_targets(logits, np.zeros(3, np.int64))


def test_top_logprobs() -> None:
    logits = _logits(5)
    expected = torch.tensor(logits).double().log_softmax(-1).topk(6)
    actual = top_logprobs(logits, 6)
    assert [token for token, _ in actual] == expected.indices.tolist()
    np.testing.assert_allclose([p for _, p in actual], expected.values.numpy(), atol=1e-10)
    assert top_logprobs(logits, 0) == []
    assert [token for token, _ in top_logprobs(np.zeros(4, dtype=np.float32), 2)] == [0, 1]
    with pytest.raises(InputError, match="logprobs"):
        top_logprobs(logits, VOCAB + 1)


def test_numbers_that_were_looked_at_are_drawn_with() -> None:
    """Peeking moves nothing: the draws are those of a sampler that nobody looked at."""
    params = SamplingParams(do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, seed=3)
    looked, plain = (Sampler(params, VOCAB, stream=1) for _ in range(2))
    logits, rng = _logits(5), np.random.default_rng(3)
    for turn in range(40):
        peeked = looked.peek()
        assert peeked[:4] == (0.7, 9.0, 0.9, 0.01) and looked.peek() == peeked
        if rng.random() < 0.5:
            assert looked.advance() == peeked[4] == plain.advance(), turn
        else:
            assert looked.pick(logits, ()) == plain.pick(logits, ()), turn
        assert looked.peek()[4] == peeked[5]


def test_what_is_drawn_without_the_host() -> None:
    drawn = Sampler(SamplingParams(do_sample=True, top_k=VOCAB, temperature=1e-300), VOCAB)
    assert drawn.is_drawn and not drawn.is_plain
    assert drawn.peek()[:4] == (1e-30, 0.0, 1.0, 0.0), "as float32 divides, and all of them are no filter"
    greedy = Sampler(SamplingParams(), VOCAB)
    assert greedy.peek() == (0.0, 0.0, 1.0, 0.0, 0.0, 0.0) and not greedy.is_drawn
    assert not Sampler(SamplingParams(do_sample=True, repetition_penalty=1.1), VOCAB).is_drawn


def test_the_hottest_temperature_draws_nothing_that_was_banned() -> None:
    logits = _logits(6)
    sampler = Sampler(SamplingParams(do_sample=True, temperature=1e300, seed=0), VOCAB)
    kept = sampler.probabilities(logits, (), range(VOCAB - 10))
    assert not kept[:-10].any() and np.allclose(kept[-10:], 0.1)
