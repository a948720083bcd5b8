"""The slot loop: rows join and leave, chunks, mixed and separate steps, shared prompts, failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import SessionOptions, StepInputs
from accel.errors import EngineError, InputError
from accel.runtime.sampling import Sampler, SamplingParams
from accel.runtime.sequence import Event, Sequence, TextWatch
from accel.runtime.slots import SlotLoop, SlotOptions
from tests.engines.tiny_llama import VOCAB, draw_weights, greedy, reference_logits, write_bundle

WEIGHTS = draw_weights()
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, VOCAB, n).tolist() for n in (3, 40, 1, 17, 8, 26, 5)]
ROWS = 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("slots") / "bundle", WEIGHTS)


class Recorder:
    """A session that notes every step, and can be told to fail."""

    def __init__(self, session: Any, mixed: bool) -> None:
        self._session, self.mixed_steps = session, mixed
        self.max_batch, self.capacity, self.vocab_size = session.max_batch, session.capacity, session.vocab_size
        self.steps: list[list[int]] = []
        self.ends: list[int] = []  # largest past plus the widest row: what the padded attention spans
        self.copies: list[tuple[int, int, int]] = []
        self.poisoned: int | None = None  # a token whose row's logits become NaN
        self.refused: int | None = None  # a token at which the engine raises

    def step(self, inputs: StepInputs) -> np.ndarray:
        self.steps.append(inputs.query_lengths.tolist())
        active = inputs.query_lengths > 0
        self.ends.append(int(inputs.past_lengths[active].max() + inputs.query_lengths.max()))
        if self.refused is not None and self.refused in inputs.input_ids:
            raise RuntimeError("the engine broke")
        logits = self._session.step(inputs)
        if self.poisoned is not None:
            logits[inputs.input_ids[inputs.logits_positions] == self.poisoned] = np.nan
        return logits

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.copies.append((source, target, length))
        self._session.copy_row(source, target, length)


@pytest.fixture(params=[True, False], ids=["mixed", "separate"])
def session(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Recorder]:
    opened = open_session(bundle, engine="ort-cpu", options=SessionOptions(1, 128, ROWS)).session
    yield Recorder(opened, request.param)
    opened.close()


def sequence(prompt: list[int], count: int, **options: Any) -> Sequence:
    sampler = options.pop("sampler", None) or Sampler(SamplingParams(), VOCAB)
    return Sequence(np.array(prompt), sampler, max_new_tokens=count, **options)


def drain(loop: SlotLoop) -> list[Event]:
    events = []
    for _ in range(1000):
        if not loop.has_work:
            return events
        events += loop.step()
    raise AssertionError("the loop does not come to an end")


@pytest.mark.parametrize("chunk", [4, 16, 256])
def test_more_sequences_than_rows_each_get_their_own_tokens(session: Recorder, chunk: int) -> None:
    loop = SlotLoop(session, SlotOptions(chunk=chunk))
    sequences = [sequence(prompt, 6 + i) for i, prompt in enumerate(PROMPTS)]
    for each in sequences:
        loop.submit(each)
    events = drain(loop)
    for i, each in enumerate(sequences):
        assert each.new_ids == greedy(WEIGHTS, PROMPTS[i], 6 + i), i
        assert each.finish_reason == "length" and each.finished and each.error is None
        assert [event.token for event in events if event.sequence is each] == each.new_ids
    assert sum(event.finished for event in events) == len(sequences)
    # Prompt tokens per step stay within the chunk (a row with one token may be decoding).
    assert max(sum(count for count in step if count > 1) for step in session.steps) <= chunk


def test_rows_join_and_leave_between_steps(session: Recorder) -> None:
    loop = SlotLoop(session)
    first, late = sequence(PROMPTS[1], 12), sequence(PROMPTS[3], 4)
    loop.submit(first)
    for _ in range(5):
        loop.step()
    loop.submit(late)
    drain(loop)
    assert first.new_ids == greedy(WEIGHTS, PROMPTS[1], 12)
    assert late.new_ids == greedy(WEIGHTS, PROMPTS[3], 4)
    assert any(step[0] and step[1] for step in session.steps), "they shared steps"


def test_the_kinds_of_steps(session: Recorder) -> None:
    loop = SlotLoop(session, SlotOptions(chunk=8))
    for prompt in (PROMPTS[0], PROMPTS[3], PROMPTS[4]):  # 3, 17, 8 tokens
        loop.submit(sequence(prompt, 4))
    drain(loop)
    if session.mixed_steps:
        assert session.steps[:3] == [[3, 5, 0], [1, 8, 0], [1, 4, 4]]
    else:
        assert session.steps[:4] == [[3, 0, 0], [1, 0, 0], [0, 8, 0], [1, 0, 0]]


def test_waiting_is_first_come_first_served_and_rows_are_reused(session: Recorder) -> None:
    loop = SlotLoop(session)
    sequences = [sequence(PROMPTS[0], 3) for _ in range(2 * ROWS + 1)]
    for each in sequences:
        loop.submit(each)
    ended = [event.sequence for event in drain(loop) if event.finished]
    assert [sequences.index(each) for each in ended] == list(range(2 * ROWS + 1))
    assert not loop.has_work


def test_siblings_share_the_prompts_prefill(session: Recorder) -> None:
    loop = SlotLoop(session)
    group = object()
    siblings = [sequence(PROMPTS[1], 5, group=group) for _ in range(5)]
    for each in siblings:
        loop.submit(each)
    drain(loop)
    expected = greedy(WEIGHTS, PROMPTS[1], 5)
    assert all(each.new_ids == expected for each in siblings)
    assert sum(count for step in session.steps for count in step if count > 1) == len(PROMPTS[1])
    assert all(copy[2] == len(PROMPTS[1]) - 1 for copy in session.copies) and 1 <= len(session.copies) <= 4


def test_another_prompt_in_the_row_ends_the_sharing(session: Recorder) -> None:
    loop = SlotLoop(session)
    group = object()
    loop.submit(sequence(PROMPTS[1], 2, group=group))
    drain(loop)
    for _ in range(ROWS):  # all rows get other prompts
        loop.submit(sequence(PROMPTS[3], 2))
    drain(loop)
    again = sequence(PROMPTS[1], 5, group=group)
    loop.submit(again)
    drain(loop)
    assert again.new_ids == greedy(WEIGHTS, PROMPTS[1], 5)


def test_bad_logits_end_their_own_row_only(session: Recorder) -> None:
    loop = SlotLoop(session)
    good, bad = sequence(PROMPTS[0], 6), sequence([*PROMPTS[4], 57], 6)
    assert 57 not in PROMPTS[0] + greedy(WEIGHTS, PROMPTS[0], 6)
    session.poisoned = 57
    loop.submit(bad)
    loop.submit(good)
    drain(loop)
    assert isinstance(bad.error, EngineError) and "logit is nan" in str(bad.error)
    assert bad.finished and bad.new_ids == [] and bad.row is None
    assert good.new_ids == greedy(WEIGHTS, PROMPTS[0], 6)


def test_text_that_fails_ends_its_own_row_only(session: Recorder) -> None:
    class Broken:
        def push(self, token: int) -> str:
            raise RuntimeError("no such token")

        def flush(self) -> str:
            raise RuntimeError("no such token")

    loop = SlotLoop(session)
    bad = sequence(PROMPTS[0], 4, watch=TextWatch(Broken(), None))
    good = sequence(PROMPTS[1], 4)
    loop.submit(bad)
    loop.submit(good)
    drain(loop)
    assert isinstance(bad.error, EngineError) and "no such token" in str(bad.error) and bad.finished
    assert good.new_ids == greedy(WEIGHTS, PROMPTS[1], 4) and good.error is None


def test_an_engine_failure_ends_only_the_row_that_causes_it(session: Recorder) -> None:
    loop = SlotLoop(session)
    good, bad = sequence(PROMPTS[0], 6), sequence([*PROMPTS[4], 57], 6)
    session.refused = 57
    loop.submit(bad)
    loop.submit(good)
    drain(loop)
    assert isinstance(bad.error, EngineError) and "the engine broke" in str(bad.error)
    assert good.error is None and good.new_ids == greedy(WEIGHTS, PROMPTS[0], 6)


def test_cancelling_frees_the_row(session: Recorder) -> None:
    loop = SlotLoop(session)
    running = [sequence(PROMPTS[0], 50) for _ in range(ROWS)]
    waiting, dropped = sequence(PROMPTS[4], 3), sequence(PROMPTS[4], 3)
    for each in (*running, dropped, waiting):
        loop.submit(each)
    loop.step()
    loop.cancel(running[1])
    loop.cancel(dropped)
    events = loop.step()
    assert {event.sequence for event in events if event.finished} == {running[1], dropped}
    assert running[1].finish_reason == dropped.finish_reason == "cancelled"
    assert waiting.row == 1
    drain(loop)
    assert waiting.new_ids == greedy(WEIGHTS, PROMPTS[4], 3)
    assert running[0].new_ids == greedy(WEIGHTS, PROMPTS[0], 50)


def test_aborting_ends_everyone(session: Recorder) -> None:
    loop = SlotLoop(session)
    sequences = [sequence(PROMPTS[0], 50) for _ in range(ROWS + 2)]
    for each in sequences:
        loop.submit(each)
    loop.step()
    error = EngineError("stopped")
    assert len(loop.abort(error)) == ROWS + 2
    assert all(each.error is error and each.finished for each in sequences) and not loop.has_work


def test_scoring_in_chunks_gives_the_references_log_probabilities(session: Recorder) -> None:
    loop = SlotLoop(session, SlotOptions(chunk=7))
    scored = Sequence(np.array(PROMPTS[1]), None)
    beside = sequence(PROMPTS[0], 9)
    loop.submit(beside)
    loop.submit(scored)
    drain(loop)
    logits = reference_logits(WEIGHTS, PROMPTS[1])
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = expected[np.arange(39), PROMPTS[1][1:]]
    assert np.abs(np.array(scored.scores) - expected).max() < 5e-5
    assert beside.new_ids == greedy(WEIGHTS, PROMPTS[0], 9)


def test_end_of_sequence_tokens_end_after_the_minimum(session: Recorder) -> None:
    expected = greedy(WEIGHTS, PROMPTS[0], 8)
    eos = frozenset({expected[2]})
    loop = SlotLoop(session)
    free, held = sequence(PROMPTS[0], 8, eos_token_ids=eos), sequence(PROMPTS[0], 8, eos_token_ids=eos)
    held.min_new_tokens = 5
    loop.submit(free)
    loop.submit(held)
    drain(loop)
    first = expected.index(expected[2])
    assert free.new_ids == expected[: first + 1] and free.finish_reason == "eos"
    assert len(held.new_ids) >= 5 and expected[2] not in held.new_ids[:5]
    assert held.new_ids[:first] == expected[:first]


def test_log_probabilities_are_recorded(session: Recorder) -> None:
    loop = SlotLoop(session)
    each = sequence(PROMPTS[0], 3, logprobs=2)
    loop.submit(each)
    drain(loop)
    logits = reference_logits(WEIGHTS, PROMPTS[0] + each.new_ids)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, record in enumerate(each.records):
        row = expected[len(PROMPTS[0]) - 1 + i]
        assert record.id == each.new_ids[i] == record.top[0][0]
        assert abs(record.logprob - row[record.id]) < 5e-5
        assert [token for token, _ in record.top] == np.argsort(-row)[:2].tolist()


def test_the_chunk_is_checked(session: Recorder) -> None:
    with pytest.raises(InputError, match="chunk must be at least 1"):
        SlotLoop(session, SlotOptions(chunk=0))


@pytest.mark.parametrize("lead", [40, 20, 1])
def test_a_row_near_its_capacity_shares_with_a_long_prompt(session: Recorder, lead: int) -> None:
    """The padded attention refuses past + width > capacity in any row: the loop narrows the step or takes turns."""
    loop = SlotLoop(session)
    near = sequence(RNG.integers(0, VOCAB, 70).tolist(), 128 - 70)
    loop.submit(near)
    while near.computed < session.capacity - lead:
        loop.step()
    late = [sequence(RNG.integers(0, VOCAB, 60).tolist(), 4), sequence(RNG.integers(0, VOCAB, 90).tolist(), 4)]
    for other in late:
        loop.submit(other)
    drain(loop)
    assert max(session.ends) <= session.capacity
    for one in (near, *late):
        assert one.error is None and one.finish_reason == "length"
        prompt = one.prompt.tolist()
        assert one.new_ids == greedy(WEIGHTS, prompt, len(one.new_ids))
