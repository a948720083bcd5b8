"""Tokens drawn on the device: the host's own, one step ahead, beside greedy rows, and nothing lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from accel.engines.cuda import decoder, drawing
from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import INTERPRETED, Device
from accel.engines.kv_cache import CacheShape
from accel.engines.session import Draws, SamplingSession, StepInputs
from accel.errors import EngineError
from accel.runtime.sampling import Sampler, SamplingParams
from accel.runtime.sequence import Sequence
from accel.runtime.slots import SlotLoop
from accel.runtime.stepping import Stepper
from tests.engines.cuda.steps import CAPACITY, CASES, GREEDY, HOT, MIXED, WithoutSampling, count_runs, generate, inputs

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes on masked lanes
]

def samplers(vocab: int, *params: SamplingParams) -> list[Sampler]:
    return [Sampler(each, vocab) for each in params]


def draws_of(chosen: list[Sampler]) -> Draws:
    table = np.array([sampler.peek() for sampler in chosen])
    return Draws(table[:, :4], table[:, 4:])


def draw(session: Any, reference: Any, step: StepInputs, chosen: list[Sampler]) -> list[int]:
    """A step's tokens, which are those that the samplers pick from the reference's logits."""
    found = session.sample(step, draws_of(chosen))
    logits = np.array(reference.step(step))
    tokens = [sampler.pick(row, ()) for sampler, row in zip(chosen, logits)]
    assert found.tokens.tolist() == tokens
    np.testing.assert_allclose(found.logits, logits[range(len(tokens)), tokens], atol=2e-5 * np.abs(logits).max())
    return tokens


def test_drawn_tokens_are_the_hosts_and_one_step_ahead(
    session: CudaDecoderSession, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts and of steps; greedy rows beside drawn ones, in rows with a gap between them."""
    assert isinstance(session, SamplingSession)
    chosen = samplers(session.vocab_size, HOT, GREEDY)
    tokens = draw(session, reference, inputs({0: [5, 6, 7], 2: [8, 9]}, {}), chosen)
    runs = count_runs(session, monkeypatch)
    for past in range(4):
        step = inputs({0: tokens[:1], 2: tokens[1:]}, {0: 3 + past, 2: 2 + past})
        tokens = draw(session, reference, step, chosen)
    # the place's first run, in which every row sits out; the first step; and four steps ahead
    assert len(runs) == 1 + 1 + 4


def test_a_step_that_nobody_expected(session: CudaDecoderSession, reference: Any) -> None:
    """Other numbers, other filters, another token, greedy steps between: what ran ahead is forgotten."""
    hot, other, mixed, greedy = samplers(session.vocab_size, HOT, HOT, MIXED, GREEDY)
    for _ in range(5):
        other.advance()
    token = draw(session, reference, inputs({0: [5, 6, 7]}, {}), [hot])
    past = 3
    for chosen in (hot, other, other, mixed, hot):
        token = draw(session, reference, inputs({0: token}, {0: past}), [chosen])
        past += 1
    step = inputs({0: [token[0] ^ 1]}, {0: past})  # not what was drawn
    token = draw(session, reference, step, [hot])
    step = inputs({0: token}, {0: past + 1})
    best = session.greedy(step).tokens
    assert best[0] == reference.step(step)[0].argmax()
    step = inputs({0: best.tolist()}, {0: past + 2})
    token = draw(session, reference, step, [mixed])
    step = inputs({0: token}, {0: past + 3})
    np.testing.assert_allclose(session.step(step), np.array(reference.step(step)), atol=1e-4)
    draw(session, reference, step, [greedy])  # the same step again: the cache is as it was


def test_greedy_steps_draw_nothing(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], drawing.sample

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(drawing, "sample", counted)
    token = session.greedy(inputs({0: [5, 6, 7]}, {})).tokens
    token = session.greedy(inputs({0: token.tolist()}, {0: 3})).tokens
    assert not calls
    session.sample(inputs({0: token.tolist()}, {0: 4}), draws_of(samplers(session.vocab_size, HOT)))
    assert len(calls) == 2  # the step, and the one behind it


def test_seeded_generation_is_every_engines(session: CudaDecoderSession, reference: Any) -> None:
    """Drawn and greedy rows, and those that go the host's way for a while, or always, in whose steps all rows go."""
    expected = generate(reference, CASES, late=2)
    assert generate(session, CASES, late=2) == expected
    assert generate(WithoutSampling(session), CASES, late=2) == expected


def test_nan_ends_the_sequence_alone(session: CudaDecoderSession) -> None:
    loop = SlotLoop(session)
    sequences = [Sequence(np.arange(3, 8), Sampler(HOT, session.vocab_size), 3) for _ in range(2)]
    for sequence in sequences:
        loop.submit(sequence)
    loop.step()
    session._caches[0][0][0].fill_(float("nan"))  # row 0 alone sees it, behind its first token
    while loop.has_work:
        loop.step()
    assert isinstance(sequences[0].error, EngineError) and "largest logit is nan" in str(sequences[0].error)
    assert sequences[1].error is None and len(sequences[1].new_ids) == 3


def greedy_tokens(engine: Any, *prompts: list[int], count: int = 6) -> list[list[int]]:
    """Of one sequence after the other, each of which has row 0."""
    loop, made = SlotLoop(engine), []
    for prompt in prompts:
        made.append(Sequence(np.array(prompt), Sampler(GREEDY, engine.vocab_size), count))
        loop.submit(made[-1])
        while loop.has_work:
            loop.step()
    assert all(sequence.error is None for sequence in made)
    return [sequence.new_ids for sequence in made]


def test_the_next_sequence_of_a_row_does_not_get_what_ran_ahead_of_the_last_one(
    session: CudaDecoderSession, reference: Any
) -> None:
    """It begins with the last one's last token, at the same length: only the cache tells them apart."""
    first = [7, 8, 9]
    last = greedy_tokens(reference, first, count=2)[0][-1]
    prompts = np.random.default_rng(0).integers(3, 250, (5000, 4)).tolist()
    second = next(prompt for prompt in prompts if greedy_tokens(reference, prompt, count=1)[0] == [last])
    expected = [*greedy_tokens(reference, first, count=2), *greedy_tokens(reference, second)]
    assert [*greedy_tokens(session, first, count=2), *greedy_tokens(session, second)] == expected


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.cuda.OutOfMemoryError("out of memory")


def test_after_a_draw_that_found_no_memory_every_step_gets_its_own_tokens(
    session: CudaDecoderSession, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = inputs({0: [5, 6, 7]}, {}), inputs({0: [11]}, {0: 3})
    for engine in (session, reference):
        engine.step(first)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "sample", out_of_memory)
        with pytest.raises(EngineError, match="memory"):
            session.sample(second, draws_of(samplers(session.vocab_size, HOT)))
    draw(session, reference, second, samplers(session.vocab_size, HOT))
    assert greedy_tokens(session, [3, 4, 5, 6]) == greedy_tokens(reference, [3, 4, 5, 6])


def test_where_only_the_step_ahead_finds_no_memory_the_step_itself_holds(
    session: CudaDecoderSession, reference: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = drawing.sample, []

    def once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options) if len(calls) == 1 else out_of_memory()

    for engine in (session, reference):
        engine.step(inputs({0: [5, 6, 7]}, {}))
    chosen = samplers(session.vocab_size, HOT)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "sample", once)
        (token,) = draw(session, reference, inputs({0: [11]}, {0: 3}), chosen)
    assert len(calls) == 2 and "do not run ahead" in caplog.text
    draw(session, reference, inputs({0: [token]}, {0: 4}), chosen)


def test_a_larger_vocabulary_is_drawn_from_by_the_host(
    graph: Any, session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, arch = graph
    monkeypatch.setattr(decoder, "MAX_VOCAB", arch.vocab_size - 1)
    opened = CudaDecoderSession(path, arch, "fp32", CacheShape(1, CAPACITY), Device(torch.device("cpu")), torch.float32)
    assert Stepper(opened)._sample is None and Stepper(opened)._greedy is not None
    assert Stepper(session)._sample is not None
    opened.close()
