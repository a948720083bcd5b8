from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import accel
from accel.engines.session import EngineInfo
from accel.errors import EngineError, InputError
from accel.quality import decoders, resolve_text
from accel.quality.decoders import DecoderObservation, DecoderPlan
from accel.runtime.decoder import Decoder
from accel.runtime.results import TeacherForced

INFO = EngineInfo("ort-cpu", "1", "cpu", "rounded", 2)


@pytest.fixture(scope="module")
def decoder(tiny_decoder_bundle: Path) -> Iterator[Decoder]:
    with accel.load(tiny_decoder_bundle, threads=1) as model:
        yield cast(Decoder, model)


def text_of(*lengths: int) -> Any:
    """Passages of so many bytes, each a token."""
    letters = np.random.default_rng(0).integers(97, 123, sum(lengths))
    ends = np.cumsum(lengths)
    return resolve_text([bytes(letters[end - n : end].tolist()).decode() for n, end in zip(lengths, ends)])


def test_blocks_are_passages_and_windows_of_long_ones(decoder: Decoder) -> None:
    plan = decoders.make_plan(decoder, text_of(40, 1100, 1, 30), 10_000, 8)
    assert [len(block) for block in plan.blocks] == [40, 512, 512, 76, 30]  # one token has nothing to predict
    assert plan.tokens == 1170 and plan.new_tokens == 8
    assert sorted(len(prompt) for prompt in plan.prompts) == [15, 20, 32, 32, 32]
    begin = {tuple(block[:15].tolist()) for block in plan.blocks}
    assert all(tuple(prompt[:15].tolist()) in begin for prompt in plan.prompts)


def test_the_text_ends_where_enough_is_measured(decoder: Decoder) -> None:
    plan = decoders.make_plan(decoder, text_of(40, 1100, 30), 100, 8)
    assert [len(block) for block in plan.blocks] == [40, 60]
    with pytest.raises(InputError, match="nothing to predict"):
        decoders.make_plan(decoder, text_of(1, 1), 100, 8)


def test_generation_stays_inside_the_positions(decoder: Decoder) -> None:
    plan = decoders.make_plan(decoder, text_of(64), 100, 10_000)
    assert plan.new_tokens == decoder.arch.max_positions - 32 + 1


def test_observed_is_what_the_decoder_says(decoder: Decoder) -> None:
    plan = decoders.make_plan(decoder, text_of(90, 30, 2500), 10_000, 6)
    told: list[int] = []
    found = decoders.observe(decoder, plan, told.append)
    assert sum(told) == plan.tokens and len(told) > 1 and found.engine == decoder.engine
    for block, forced in zip(plan.blocks, found.forced, strict=True):
        np.testing.assert_allclose(forced.logprobs, decoder.score(block), atol=1e-5)
    expected: Any = decoder.generate(plan.prompts[0], max_new_tokens=6, eos_token_id=[])
    assert found.generated[0] == tuple(expected.ids)
    assert [timings.name for timings in found.timings] == ["prefill of 128 tokens", "decode step"]
    assert all(item.compute > 0 and item.prepost > 0 and item.rounds == 5 for item in found.timings)


def observation(logprobs: list[list[float]], best: list[list[int]], generated: list[list[int]]) -> DecoderObservation:
    forced = tuple(TeacherForced(np.array(a), np.array(b)) for a, b in zip(logprobs, best, strict=True))
    return DecoderObservation(INFO, forced, tuple(map(tuple, generated)), ())


def test_comparison_by_hand() -> None:
    reference = observation([[-1.0, -2.0], [-3.0]], [[5, 6], [7]], [[1, 2, 3, 4], [1, 2, 3, 4]])
    ours = observation([[-1.5, -2.0], [-4.0]], [[5, 9], [7]], [[1, 2, 9, 4], [1, 2, 3, 4]])
    plan = DecoderPlan((), (), 4)
    found = decoders.compare(plan, ours, reference)
    likelihood, greedy = found["likelihood"], found["greedy"]
    assert (likelihood.q, likelihood.reference_q, likelihood.difference) == pytest.approx((-2.5, -2.0, -0.5))
    assert likelihood.perplexity == pytest.approx(np.exp(2.5))
    assert likelihood.reference_perplexity == pytest.approx(np.exp(2))
    assert (likelihood.tokens, likelihood.blocks, likelihood.interval) == (3, 2, None)
    assert (greedy.top1, greedy.prefix) == pytest.approx((2 / 3, (0.5 + 1.0) / 2))  # equal again later counts nothing
    itself = decoders.compare_to_itself(plan, reference)["likelihood"]
    assert itself.difference == 0 and itself.q == itself.reference_q == pytest.approx(-2.0)


def test_probability_zero_is_an_error() -> None:
    bad = observation([[-np.inf]], [[1]], [[1]])
    with pytest.raises(EngineError, match="probability 0") as info:
        decoders.compare(DecoderPlan((), (), 1), bad, bad)
    assert info.value.where == "variant rounded"
