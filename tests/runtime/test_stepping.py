"""Which way a step takes through the engine, and that no random number is lost or drawn with twice on any of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import ChosenTokens, Draws, SessionOptions, StepInputs
from accel.errors import EngineError
from accel.runtime.candidates import draw
from accel.runtime.sampling import Sampler, SamplingParams
from accel.runtime.sequence import Sequence, TextWatch
from accel.runtime.slots import SlotLoop, SlotOptions
from tests.engines.tiny_llama import VOCAB, draw_weights, write_bundle

ROWS = 3
PROMPTS = [np.random.default_rng(3).integers(0, VOCAB, n) for n in (3, 20, 1, 17, 8)]
GREEDY = SamplingParams()
HOT = SamplingParams(do_sample=True, temperature=1.7, seed=5)
NARROW = SamplingParams(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=6)
PENALISED = SamplingParams(do_sample=True, repetition_penalty=1.4, seed=7)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("stepping") / "bundle", draw_weights())


@pytest.fixture
def plain(bundle: Bundle) -> Iterator[Any]:
    opened = open_session(bundle, engine="ort-cpu", options=SessionOptions(1, 128, ROWS)).session
    yield opened
    opened.close()


class Drawing:
    """A session that draws by itself, and notes which way each step took."""

    def __init__(self, session: Any) -> None:
        self._session, self.mixed_steps = session, session.mixed_steps
        self.max_batch, self.capacity, self.vocab_size = session.max_batch, session.capacity, session.vocab_size
        self.copy_row = session.copy_row
        self.ways: list[str] = []
        self.expected: dict[int, float] = {}  # by row: the number that the step before gave for this one
        self.foretold = 0
        self.failures = 0  # steps of several rows that are still to fail
        self.poisoned: int | None = None  # a row whose best logit is NaN

    def step(self, inputs: StepInputs) -> Any:
        self.ways.append("logits")
        self.expected = {}
        return self._session.step(inputs)

    def greedy(self, inputs: StepInputs) -> ChosenTokens:
        self.ways.append("greedy")
        self.expected = {}
        logits = np.array(self._session.step(inputs))
        tokens = logits.argmax(1)
        return ChosenTokens(tokens, logits[range(len(tokens)), tokens])

    def sample(self, inputs: StepInputs, draws: Draws) -> ChosenTokens:
        if self.failures and np.count_nonzero(inputs.query_lengths) > 1:
            self.failures -= 1
            raise RuntimeError("the engine stumbled")
        self.ways.append("sample")
        logits, rows = np.array(self._session.step(inputs)), self._rows(inputs)
        assert draws.filters.shape == (len(rows), 4) and draws.uniforms.shape == (len(rows), 2)
        tokens, told = [], self.expected
        for row, scores, filters, uniform in zip(rows, logits, draws.filters, draws.uniforms[:, 0]):
            if row in told and filters[0]:
                assert uniform == told[row]
                self.foretold += 1
            tokens.append(chosen_by(scores, filters, uniform))
        self.expected = dict(zip(rows, draws.uniforms[:, 1].tolist()))
        values = logits[range(len(tokens)), tokens]
        values[[row == self.poisoned for row in rows]] = np.nan
        return ChosenTokens(np.array(tokens), values)

    @staticmethod
    def _rows(inputs: StepInputs) -> list[int]:
        of_token = np.repeat(np.arange(len(inputs.query_lengths)), inputs.query_lengths)
        return of_token[inputs.logits_positions].tolist()


def chosen_by(scores: np.ndarray, filters: np.ndarray, uniform: float) -> int:
    """A token as the protocol says it."""
    temperature, top_k, top_p, min_p = filters.tolist()
    if not temperature:
        return int(scores.argmax())
    params = SamplingParams(do_sample=True, temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p)
    ids, weights = Sampler(params, len(scores))._candidates(scores)
    return int(ids[draw(weights, uniform)])


Case = tuple[SamplingParams, dict[str, Any]]


def run(session: Any, cases: list[Case], count: int = 6) -> list[Sequence]:
    loop, made = SlotLoop(session, SlotOptions(chunk=16)), []
    for place, (params, options) in enumerate(cases):
        sampler = Sampler(params, VOCAB, stream=place)
        made.append(Sequence(PROMPTS[place % len(PROMPTS)], sampler, count + 4 * place, **options))
        loop.submit(made[-1])
    for _ in range(500):
        if not loop.has_work:
            return made
        loop.step()
    raise AssertionError("the loop does not come to an end")


def tokens_of(session: Any, cases: list[Case]) -> list[list[int]]:
    return [sequence.new_ids for sequence in run(session, cases)]


def test_drawn_and_greedy_rows_share_a_way(plain: Any) -> None:
    """Once the drawn ones have ended nothing is drawn; every number is the one that the step before foretold."""
    session, cases = Drawing(plain), [(HOT, {}), (NARROW, {}), (GREEDY, {})]
    assert tokens_of(session, cases) == tokens_of(plain, cases)
    decided = [way for way in session.ways if way != "logits"]
    assert decided == ["sample"] * decided.count("sample") + ["greedy"] * decided.count("greedy")
    assert decided[-1] == "greedy" and decided.count("sample") >= 7 and session.foretold >= 10


@pytest.mark.parametrize(
    "reader",
    [
        (PENALISED, {}),
        (HOT, {"logprobs": 2}),
        (SamplingParams(repetition_penalty=1.2), {}),
        (HOT, {"min_new_tokens": 40, "eos_token_ids": frozenset({VOCAB - 1})}),
    ],
)
def test_a_row_that_reads_its_logits_takes_the_step_to_the_host(plain: Any, reader: Case) -> None:
    """And the others' tokens stay the same."""
    session, cases = Drawing(plain), [(HOT, {}), (NARROW, {}), (GREEDY, {}), reader]  # it joins when a row is free
    assert tokens_of(session, cases) == tokens_of(plain, cases)
    assert "logits" in session.ways and "sample" in session.ways
    alone = Drawing(plain)
    run(alone, [reader])
    assert set(alone.ways) == {"logits"}


def test_banned_tokens_are_the_hosts_until_there_are_enough(plain: Any) -> None:
    session = Drawing(plain)
    cases: list[Case] = [(HOT, {"min_new_tokens": 3, "eos_token_ids": frozenset({VOCAB - 1})})]
    assert tokens_of(session, cases) == tokens_of(plain, cases)
    assert session.ways[:3] == ["logits"] * 3 and set(session.ways[3:]) == {"sample"}


def test_a_step_that_fails_draws_nothing(plain: Any) -> None:
    """Its rows run alone then, with the numbers of the step that failed."""
    cases: list[Case] = [(HOT, {}), (NARROW, {})]
    expected = tokens_of(plain, cases)
    session = Drawing(plain)
    session.failures = 2
    assert tokens_of(session, cases) == expected and session.failures == 0


def test_a_bad_logit_ends_its_own_row_only(plain: Any) -> None:
    session, cases = Drawing(plain), [(HOT, {}), (NARROW, {})]
    expected = tokens_of(plain, cases)
    session.poisoned = 0
    bad, good = run(session, cases)
    assert isinstance(bad.error, EngineError) and "largest logit is nan" in str(bad.error) and bad.new_ids == []
    assert good.error is None and good.new_ids == expected[1]


def test_a_stream_that_stops_early(plain: Any) -> None:
    """A stop string ends one row while the step behind it may be under way; the other one goes on as alone."""

    class Letters:
        def push(self, token: int) -> str:
            return chr(97 + token % 26)

        def flush(self) -> str:
            return ""

    class Third:
        """Stops at the third token."""

        def __init__(self) -> None:
            self.seen = 0

        def push(self, text: str) -> tuple[str, bool]:
            self.seen += len(text)
            return text, self.seen >= 3

        def flush(self) -> str:
            return ""

    def cases() -> list[Case]:
        return [(HOT, {"watch": TextWatch(Letters(), Third())}), (NARROW, {"watch": TextWatch(Letters(), None)})]

    (stopped, other), expected = run(Drawing(plain), cases()), run(plain, cases())
    assert stopped.finish_reason == "stop" and len(stopped.new_ids) == 3
    for ours, theirs in zip((stopped, other), expected):
        assert ours.new_ids == theirs.new_ids and ours.watch and theirs.watch
        assert list(ours.watch.pieces) == list(theirs.watch.pieces)


def test_a_prompt_in_chunks_draws_once(plain: Any) -> None:
    """Steps without a wanted token have nothing to draw."""
    session = Drawing(plain)
    loop = SlotLoop(session, SlotOptions(chunk=4))
    each = Sequence(PROMPTS[1], Sampler(HOT, VOCAB), 2)
    loop.submit(each)
    while loop.has_work:
        loop.step()
    assert session.ways == ["logits"] * 4 + ["sample"] * 2
