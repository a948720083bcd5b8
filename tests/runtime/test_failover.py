"""Decoding goes on when the engine breaks: every call gets what it would have got without, on the next engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accel
import accel.engines as engines
from accel.engines import Engine
from accel.engines.session import Fallback
from accel.errors import CapacityError, EngineBrokenError, EngineError, EngineUnavailableError
from accel.runtime.decoder import Decoder
from accel.runtime.results import GenerateResult
from accel.runtime.sampling import Sampler, SamplingParams
from accel.runtime.sequence import Sequence
from accel.runtime.slots import SlotLoop
from tests.engines.tiny_llama import EOS, VOCAB, draw_weights, greedy, write_bundle
from tests.runtime.breaking import ORT, TORCH, Shelf, refusing

WEIGHTS = draw_weights()
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, EOS, n).tolist() for n in (9, 2, 31, 14, 6)]
NEW = 12
EXPECTED = [greedy(WEIGHTS, prompt, NEW, EOS) for prompt in PROMPTS]
TEXT = " ".join(f"w{i}" for i in PROMPTS[0])
SAMPLED: Any = {"do_sample": True, "temperature": 1.4, "repetition_penalty": 1.2, "seed": 5, "max_new_tokens": NEW}

Load = Callable[..., Decoder]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("failover") / "bundle", WEIGHTS, tokenizer=True).path


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads the bundle with these engines and no others."""

    def load_with(*order: Engine, capacity: int = 128, max_batch: int = 3, **options: Any) -> Decoder:
        monkeypatch.setattr(engines, "ENGINES", order)
        loaded = accel.load(path, capacity=capacity, max_batch=max_batch, threads=1, **options)
        assert isinstance(loaded, Decoder)
        return loaded

    return load_with


def single(result: Any) -> GenerateResult:
    assert isinstance(result, GenerateResult)
    return result


def ids(results: Any) -> list[list[int]]:
    return [result.ids for result in results]


@pytest.mark.parametrize("steps", [0, 1, 5, NEW - 1])
@pytest.mark.parametrize("after", [ORT, TORCH], ids=lambda engine: engine.name)
def test_greedy_tokens_are_those_without_a_failure(load: Load, shelf: Shelf, steps: int, after: Engine) -> None:
    with load(shelf.engine("gpu", steps=steps), after) as lm:
        assert lm.engine.name == "gpu" and lm.fallbacks == ()
        result = single(lm.generate(PROMPTS[2], max_new_tokens=NEW))
        assert result.ids == EXPECTED[2] and result.finish_reason == "length"
        assert lm.engine.name == after.name
        assert lm.fallbacks == (Fallback("gpu", "gpu fell off the bus (at device 0)"),)
        assert shelf.opened[0].closed == shelf.opened[0].broken == 1
        assert single(lm.generate(PROMPTS[0], max_new_tokens=NEW)).ids == EXPECTED[0]


@pytest.mark.parametrize("steps", range(0, 20, 3))
def test_every_row_of_a_ragged_batch_goes_on(load: Load, shelf: Shelf, steps: int) -> None:
    with load(shelf.engine("gpu", steps=steps), shelf.engine("next")) as lm:
        assert ids(lm.generate(PROMPTS, max_new_tokens=NEW)) == EXPECTED  # five prompts on three rows
        gpu, after = shelf.opened
        assert gpu.broken == 1 and after.seen[0].past_lengths.max() == 0


@pytest.mark.parametrize("steps", [0, 4, 9])
def test_sampling_goes_on_from_its_random_state(load: Load, shelf: Shelf, steps: int) -> None:
    with load(ORT) as lm:
        expected = ids(lm.generate(PROMPTS, **SAMPLED))
    with load(shelf.engine("gpu", steps=steps), TORCH) as lm:
        assert ids(lm.generate(PROMPTS, **SAMPLED)) == expected


def test_the_history_is_prefilled_once_and_nothing_of_it_chosen_again(load: Load, shelf: Shelf) -> None:
    with load(shelf.engine("gpu", steps=5), shelf.engine("next")) as lm:
        lm.generate(PROMPTS[0], max_new_tokens=NEW)
    history = shelf.opened[1].seen[0]
    assert history.input_ids.tolist() == PROMPTS[0] + EXPECTED[0][:5]
    assert history.position_ids.tolist() == list(range(len(PROMPTS[0]) + 5)) and len(history.logits_positions) == 1
    assert len(shelf.opened[0].seen) + len(shelf.opened[1].seen) == NEW


@pytest.mark.parametrize("prompt_steps", [0, 1])
def test_breaking_in_the_midst_of_a_chunked_prompt(load: Load, shelf: Shelf, prompt_steps: int) -> None:
    prompt = RNG.integers(0, EOS, 500).tolist()  # two steps
    with load(ORT, capacity=512) as lm:
        expected = single(lm.generate(prompt, max_new_tokens=4)).ids
    with load(shelf.engine("gpu", steps=prompt_steps), shelf.engine("next"), capacity=512) as lm:
        assert single(lm.generate(prompt, max_new_tokens=4)).ids == expected


def test_twice_in_a_row_and_later_again(load: Load, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    names = ("a", "b", "c", "d")
    order = [shelf.engine(name, steps=steps) for name, steps in zip(names, (3, 0, 4, None), strict=True)]
    with caplog.at_level(logging.WARNING), load(*order) as lm:
        assert ids(lm.generate(PROMPTS, max_new_tokens=NEW)) == EXPECTED
        assert lm.engine.name == "d" and [f.engine for f in lm.fallbacks] == ["a", "b", "c"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "b runs because a cannot",
        "c runs because b cannot",
        "d runs because c cannot",
    ]
    assert [session.closed for session in shelf.opened] == [1, 1, 1, 1]


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_streams_repeat_and_lose_nothing(load: Load, shelf: Shelf, steps: int) -> None:
    words = " ".join(f"w{i}" for i in EXPECTED[0])
    for prompt, expected in ((PROMPTS[0], EXPECTED[0]), (TEXT, words)):
        with load(shelf.engine("gpu", steps=steps), TORCH) as lm:
            stream: Any = lm.stream(prompt, max_new_tokens=NEW)
            found = list(stream)
            assert (found if isinstance(prompt, list) else "".join(found)) == expected
            assert stream.result.ids == EXPECTED[0] and lm.engine.name == "torch"


def test_a_stop_string_across_the_failure(load: Load, shelf: Shelf) -> None:
    stop = f"w{EXPECTED[0][4]} w{EXPECTED[0][5]}"
    with load(ORT) as lm:
        expected = single(lm.generate(TEXT, max_new_tokens=NEW, stop=stop))
    with load(shelf.engine("gpu", steps=5), ORT) as lm:
        found = single(lm.generate(TEXT, max_new_tokens=NEW, stop=stop))
    assert (found.text, found.finish_reason) == (expected.text, "stop") and found.ids == expected.ids


def test_log_probabilities_are_recorded_once(load: Load, shelf: Shelf) -> None:
    with load(ORT) as lm:
        expected = single(lm.generate(PROMPTS[0], max_new_tokens=NEW, logprobs=3)).logprobs
    with load(shelf.engine("gpu", steps=6), TORCH) as lm:
        found = single(lm.generate(PROMPTS[0], max_new_tokens=NEW, logprobs=3)).logprobs
    assert found is not None and expected is not None
    assert [record.id for record in found] == [record.id for record in expected] == EXPECTED[0]
    np.testing.assert_allclose([r.logprob for r in found], [r.logprob for r in expected], atol=5e-5)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_scores_are_not_doubled(load: Load, shelf: Shelf, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(ORT) as lm:
        expected: Any = lm.teacher_force([PROMPTS[2], PROMPTS[0]])
    with load(shelf.engine("gpu", steps=steps), TORCH) as lm:
        monkeypatch.setattr(lm._driver.loop, "_score_chunk", 13)  # several steps
        found: Any = lm.teacher_force([PROMPTS[2], PROMPTS[0]])
    assert lm.engine.name == "torch"
    assert [len(each.best) for each in found] == [30, 8]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-5)


@pytest.mark.parametrize("how", [{"steps": 0}, {"copies": 0}, {"copies": 1}, {"copies": 2}, {"steps": 1}, {"steps": 7}])
def test_returned_sequences_share_the_prompt_on_the_next_engine_too(
    load: Load, shelf: Shelf, how: dict[str, Any]
) -> None:
    options = {**SAMPLED, "num_return_sequences": 5}
    with load(ORT) as lm:
        expected = ids(lm.generate(PROMPTS[2], **options))
    with load(shelf.engine("gpu", **how), shelf.engine("next")) as lm:
        assert ids(lm.generate(PROMPTS[2], **options)) == expected and lm.engine.name == "next"
    zero = [step for step in shelf.opened[1].seen if (step.query_lengths > 0)[step.past_lengths == 0].any()]
    assert len(zero) == 1, "the prompt is prefilled once"


def test_timings_add_up_and_opening_is_no_compute(load: Load, shelf: Shelf) -> None:
    slow = shelf.engine("slow")

    def open_slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return slow.open(*arguments)

    with load(shelf.engine("gpu", steps=4), Engine("slow", "cpu", slow.probe, open_slowly)) as lm:
        started = time.perf_counter()
        timings = single(lm.generate(PROMPTS[0], max_new_tokens=NEW)).timings
        measured = time.perf_counter() - started
    assert timings.tokens == timings.steps == NEW
    assert timings.total == pytest.approx(timings.compute + timings.prepost + timings.system)
    assert 0.3 < timings.system < timings.total <= measured
    assert min(timings.compute, timings.prepost) > 0


def test_strict_and_named_engines_are_not_replaced(load: Load, shelf: Shelf) -> None:
    for options in ({"strict": True}, {"engine": "gpu"}):
        with load(shelf.engine("gpu", steps=2), ORT, **options) as lm:
            for _ in range(2):  # the second call too says what happened
                with pytest.raises(EngineBrokenError, match="gpu fell off the bus"):
                    lm.generate(PROMPTS, max_new_tokens=NEW)
            assert lm.engine.name == "gpu" and lm.fallbacks == ()
        assert shelf.opened[-1].closed == shelf.opened[-1].broken == 1


def test_no_engine_left(load: Load, shelf: Shelf) -> None:
    refused = refusing("d", EngineError("no room"))
    order = (shelf.engine("a", steps=2), refusing("b", ValueError("no such thing")), shelf.engine("c", steps=1))
    tries: list[str] = []
    counted = replace(refused, probe=lambda bundle, variant: tries.append(variant))
    with load(*order, counted) as lm:
        for _ in range(2):
            with pytest.raises(EngineUnavailableError) as caught:
                lm.generate(PROMPTS, max_new_tokens=NEW)
            for reason in ("a: a fell off", "b: ValueError: no such thing", "c: c fell off", "d: no room"):
                assert reason in str(caught.value)
        with pytest.raises(EngineUnavailableError):
            list(lm.stream(TEXT, max_new_tokens=3))
        assert not lm._driver.loop.has_work
    assert [session.closed for session in shelf.opened] == [1, 1] and len(tries) == 1


def test_every_waiting_call_learns_that_no_engine_is_left(load: Load, shelf: Shelf) -> None:
    with load(shelf.engine("a", steps=20)) as lm, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(lm.generate, prompt, max_new_tokens=60, eos_token_id=[]) for prompt in PROMPTS[:4] * 2]
        assert all(isinstance(future.exception(30), EngineUnavailableError) for future in futures)


def test_an_error_while_closing_is_logged(load: Load, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    with load(shelf.engine("gpu", steps=2, fails_to_close=True), ORT) as lm:
        assert single(lm.generate(PROMPTS[0], max_new_tokens=NEW)).ids == EXPECTED[0]
    assert "closing gpu after it broke failed: the driver is gone" in caplog.text


def test_an_engine_that_holds_less_ends_what_no_longer_fits(load: Load, shelf: Shelf) -> None:
    with load(shelf.engine("gpu", steps=6), shelf.engine("small", capacity=24), capacity=64) as lm:
        slots = [lm._slots(np.array(p), lm._settle({"max_new_tokens": NEW}), accel_clock())[0] for p in PROMPTS]
        with pytest.raises(CapacityError, match="may need 42 positions.*holds 24"):
            lm._run(slots)
        assert [slot.error is None for slot in slots] == [len(p) + NEW - 1 <= 24 for p in PROMPTS]
        assert [slot.error is None for slot in slots].count(False) == 2
        for slot, expected in zip(slots, EXPECTED, strict=True):
            if slot.error is None:
                assert slot.new_ids == expected
        assert lm.capacity == 24
        with pytest.raises(CapacityError, match="the cache holds 24"):
            lm.generate(PROMPTS[2])
        assert len(single(lm.generate(PROMPTS[0], eos_token_id=[])).ids) == 24 - 9 + 1


def accel_clock() -> Any:
    from accel.runtime.sequence import Clock

    return Clock()


def test_fewer_rows_make_the_others_wait(load: Load, shelf: Shelf) -> None:
    with load(shelf.engine("gpu", steps=6), shelf.engine("narrow", rows=1), max_batch=4) as lm:
        assert ids(lm.generate(PROMPTS, max_new_tokens=NEW)) == EXPECTED
        assert lm.max_batch == 1
    began = [step.input_ids[: len(PROMPTS[4])].tolist() for step in shelf.opened[1].seen if not step.past_lengths[0]]
    assert len(began) == 5 and began[4] == PROMPTS[4], "the one that had not begun comes last"


def test_the_next_engine_is_asked_for_what_this_one_holds(load: Load, shelf: Shelf) -> None:
    with load(shelf.engine("gpu", steps=2, capacity=96), shelf.engine("next"), capacity=64) as lm:
        assert lm.capacity == 96
        lm.generate(PROMPTS[0], max_new_tokens=NEW)
        assert (lm.capacity, lm.max_batch) == (96, 3)
    assert (shelf.asked[1].capacity, shelf.asked[1].max_batch, shelf.asked[1].threads) == (96, 3, 1)


def test_separate_steps_after_mixed_ones(load: Load, shelf: Shelf) -> None:
    with load(shelf.engine("gpu", steps=7), shelf.engine("next", mixed_steps=False)) as lm:
        assert ids(lm.generate(PROMPTS, max_new_tokens=NEW)) == EXPECTED


@pytest.mark.parametrize("steps", [0, 7, 25])
def test_eight_threads_get_what_one_gets(load: Load, shelf: Shelf, steps: int) -> None:
    with load(shelf.engine("a", steps=steps), shelf.engine("b", steps=30), TORCH) as lm:

        def work(index: int) -> list[int]:
            prompt = PROMPTS[index % 5]
            if index % 4 == 3:
                return [int(token) for token in lm.stream(prompt, max_new_tokens=NEW)]
            assert lm.engine.name in ("a", "b", "torch") and len(lm.fallbacks) < 3
            return single(lm.generate(prompt, max_new_tokens=NEW)).ids

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(40))) == [EXPECTED[i % 5] for i in range(40)]
        assert lm.engine.name == "torch" and [f.engine for f in lm.fallbacks] == ["a", "b"]


def test_a_row_that_fails_alone_while_the_engine_breaks(load: Load, shelf: Shelf) -> None:
    """A failed step is repeated row by row; the engine breaks between two of those rows."""
    with load(shelf.engine("gpu", steps=4), ORT) as lm:
        session: Any = shelf.opened[0]
        whole, calls = session.session.step, []

        def fail_once(inputs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return whole(inputs)

        session.session.step = fail_once
        assert ids(lm.generate(PROMPTS[:3], max_new_tokens=NEW)) == EXPECTED[:3]
        assert len(calls) == 4 and lm.engine.name == "ort-cpu"


def test_cancelling_at_the_failure(load: Load, shelf: Shelf) -> None:
    streams: list[Any] = []
    with load(shelf.engine("gpu", steps=3, at=lambda: streams[0].close()), shelf.engine("next")) as lm:
        streams += [lm.stream(prompt, max_new_tokens=NEW) for prompt in PROMPTS[:3]]
        found = [list(stream) for stream in streams[1:]]
        assert found == EXPECTED[1:3]
        assert list(streams[0]) == []
        assert all((step.query_lengths > 0).sum() <= 2 for step in shelf.opened[1].seen)


def test_nothing_is_opened_for_cancelled_sequences(load: Load, shelf: Shelf) -> None:
    streams: list[Any] = []
    with load(shelf.engine("gpu", steps=3, at=lambda: streams[0].close()), shelf.engine("next")) as lm:
        streams.append(lm.stream(PROMPTS[0], max_new_tokens=NEW))
        for _ in range(3):
            next(streams[0])
        lm._driver.loop.step()
        assert lm._driver.loop.step() and not lm._driver.loop.has_work and len(shelf.opened) == 1
        assert single(lm.generate(PROMPTS[1], max_new_tokens=NEW)).ids == EXPECTED[1] and len(shelf.opened) == 2


@pytest.mark.parametrize("moment", ["breaking", "opening"])
def test_closing_during_a_failover(load: Load, shelf: Shelf, moment: str) -> None:
    reached, closing = threading.Event(), threading.Event()

    def pause() -> None:
        reached.set()
        assert closing.wait(20)
        time.sleep(0.05)

    after = shelf.engine("next")

    def open_slowly(*arguments: Any) -> Any:
        if moment == "opening":
            pause()
        return after.open(*arguments)

    order = (
        shelf.engine("gpu", steps=2, at=pause if moment == "breaking" else lambda: None),
        Engine("next", "cpu", after.probe, open_slowly),
    )
    lm = load(*order)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(lm.generate, p, max_new_tokens=80, eos_token_id=[]) for p in PROMPTS[:4]]
        assert reached.wait(20)
        closing.set()
        lm.close()
        for future in futures:
            assert "closed" in str(future.exception(20))
    assert [session.closed for session in shelf.opened] == [1] * (1 if moment == "breaking" else 2)


def test_an_interrupt_while_opening_leaves_the_model_usable(load: Load, shelf: Shelf) -> None:
    after, tries = shelf.engine("next"), []

    def interrupted(*arguments: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return after.open(*arguments)

    with load(shelf.engine("gpu", steps=3), Engine("next", "cpu", after.probe, interrupted)) as lm:
        with pytest.raises(KeyboardInterrupt):
            lm.generate(PROMPTS[:2], max_new_tokens=NEW)
        assert ids(lm.generate(PROMPTS, max_new_tokens=NEW)) == EXPECTED
        assert lm.engine.name == "next" and len(tries) == 2
    assert [session.closed for session in shelf.opened] == [1, 1]


def test_a_loop_without_a_successor_ends_everyone(load: Load, shelf: Shelf) -> None:
    with load(shelf.engine("gpu", steps=2)) as lm:
        loop = SlotLoop(lm._session)
        sequences = [Sequence(np.array(p), Sampler(SamplingParams(), VOCAB), max_new_tokens=NEW) for p in PROMPTS]
        for sequence in sequences:
            loop.submit(sequence)
        while loop.has_work:
            loop.step()
        assert all(isinstance(sequence.error, EngineBrokenError) and sequence.finished for sequence in sequences)
