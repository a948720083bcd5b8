"""The decoder as users see it: tokens, texts, streams, threads, timings, lifetime."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accel
from accel.errors import AccelError, CapacityError, EngineError, InputError
from accel.runtime.decoder import Decoder
from accel.runtime.results import GenerateResult
from tests.engines.tiny_llama import EOS, VOCAB, draw_weights, greedy, reference_logits, write_bundle

WEIGHTS = draw_weights()
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, EOS, n).tolist() for n in (9, 2, 31, 14, 6)]
EXPECTED = [greedy(WEIGHTS, prompt, 12, EOS) for prompt in PROMPTS]
TEXT = " ".join(f"w{i}" for i in PROMPTS[0])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("decoder") / "bundle", WEIGHTS, tokenizer=True).path


@pytest.fixture(scope="module")
def lm(path: Path) -> Iterator[Decoder]:
    loaded = accel.load(path, capacity=128, max_batch=3, threads=1)
    assert isinstance(loaded, Decoder)
    with loaded:
        yield loaded


def single(result: Any) -> GenerateResult:
    assert isinstance(result, GenerateResult)
    return result


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_a_prompt_of_ids_is_continued(lm: Decoder) -> None:
    result = single(lm.generate(PROMPTS[0], max_new_tokens=12))
    assert result.ids == EXPECTED[0] and result.finish_reason == "length" and result.logprobs is None
    assert result.text == words(result.ids)


def test_a_text_is_continued(lm: Decoder) -> None:
    assert single(lm.generate(TEXT, max_new_tokens=12)).ids == EXPECTED[0]
    many = lm.generate([TEXT, words(PROMPTS[1])], max_new_tokens=12)
    assert isinstance(many, list) and [result.ids for result in many] == EXPECTED[:2]


def test_every_row_of_a_ragged_batch_equals_its_own_run(lm: Decoder) -> None:
    batch = lm.generate(PROMPTS, max_new_tokens=12)  # five prompts on three rows
    assert isinstance(batch, list) and [result.ids for result in batch] == EXPECTED
    assert [single(lm.generate(prompt, max_new_tokens=12)).ids for prompt in PROMPTS] == EXPECTED


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_arrays_with_a_mask(lm: Decoder, side: str) -> None:
    width = max(map(len, PROMPTS))
    ids, mask = np.full((5, width), 7), np.zeros((5, width), np.int64)
    for row, prompt in enumerate(PROMPTS):
        at = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, at], mask[row, at] = prompt, 1
    results = lm.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert isinstance(results, list) and [result.ids for result in results] == EXPECTED


def test_torch_tensors_are_taken(lm: Decoder) -> None:
    torch = pytest.importorskip("torch")
    results = lm.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4)
    assert isinstance(results, list) and results[0].ids == EXPECTED[0][:4]
    assert single(lm.generate(torch.tensor(PROMPTS[0]), max_new_tokens=4)).ids == EXPECTED[0][:4]


def test_the_reference_engine_gives_the_same_tokens(path: Path) -> None:
    with accel.load(path, engine="torch", capacity=128, max_batch=3) as lm:
        assert lm.engine.name == "torch"
        results = lm.generate(PROMPTS, max_new_tokens=12)  # type: ignore[union-attr]
        assert [result.ids for result in results] == EXPECTED


def test_streams(lm: Decoder) -> None:
    stream = lm.stream(PROMPTS[0], max_new_tokens=12)
    assert list(stream) == EXPECTED[0]
    assert stream.result.ids == EXPECTED[0] and stream.result.finish_reason == "length"
    pieces = lm.stream(TEXT, max_new_tokens=12)
    with pytest.raises(InputError, match="not come to its end"):
        _ = pieces.result
    assert "".join(map(str, pieces)) == words(EXPECTED[0]) == pieces.result.text
    assert next(iter(lm.stream(TEXT, max_new_tokens=12))) == f"w{EXPECTED[0][0]}"


def test_a_stream_keeps_its_end_while_another_thread_drives(lm: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader looks for a piece, finds none, and only then another thread's step ends the sequence."""
    for prompt, expected in ((PROMPTS[0], EXPECTED[0]), (TEXT, [words(EXPECTED[0])])):
        stream: Any = lm.stream(prompt, max_new_tokens=12)
        take = stream._take

        def take_late(take: Any = take, loop: Any = lm._driver.loop) -> Any:
            piece = take()
            while piece is None and loop.has_work:
                loop.step()  # as another thread would, whose events have not been delivered yet
            return piece

        monkeypatch.setattr(stream, "_take", take_late)
        found = list(stream)
        assert (found if isinstance(prompt, list) else ["".join(found)]) == expected


def test_abandoned_streams_free_their_rows(lm: Decoder) -> None:
    for _ in range(2 * lm.max_batch):
        stream = lm.stream(PROMPTS[0], max_new_tokens=100)
        next(stream)
        stream.close()
        assert list(stream) == []
    assert single(lm.generate(PROMPTS[0], max_new_tokens=3)).ids == EXPECTED[0][:3]
    assert len(lm._driver.loop._active) == 0


def test_a_stop_string_cuts_the_text(lm: Decoder) -> None:
    ids = EXPECTED[0]
    at = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    result = single(lm.generate(TEXT, max_new_tokens=12, stop=f"w{ids[at]}"))
    assert result.finish_reason == "stop"
    assert result.text is not None and result.text.rstrip() == words(ids[:at])
    stream = lm.stream(TEXT, max_new_tokens=12, stop=[f"w{ids[at]}", "never"])
    assert "".join(map(str, stream)) == result.text


def test_the_text_of_an_end_token_that_is_no_special_one(lm: Decoder) -> None:
    at = next(i for i in range(2, 12) if EXPECTED[0][i] not in EXPECTED[0][:i])
    options: Any = {"max_new_tokens": 12, "eos_token_id": EXPECTED[0][at]}
    plain, watched = (single(lm.generate(TEXT, **options, stop=stop)) for stop in (None, "never"))
    stream = lm.stream(TEXT, **options)
    assert plain.text == watched.text == "".join(map(str, stream)) == words(EXPECTED[0][: at + 1])
    assert {plain.finish_reason, watched.finish_reason, stream.result.finish_reason} == {"eos"}


def test_chat_uses_the_template(lm: Decoder) -> None:
    messages = [{"role": "user", "content": words(PROMPTS[0][:4])}, {"role": "user", "content": words(PROMPTS[0][4:])}]
    assert single(lm.chat(messages, max_new_tokens=5)).ids == EXPECTED[0][:5]
    assert "".join(lm.stream_chat(messages, max_new_tokens=5)) == words(EXPECTED[0][:5])


def test_score(lm: Decoder) -> None:
    logits = reference_logits(WEIGHTS, PROMPTS[2])
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = table[np.arange(30), PROMPTS[2][1:]]
    scores = lm.score(PROMPTS[2])
    assert isinstance(scores, np.ndarray) and np.abs(scores - expected).max() < 5e-5
    both: Any = lm.teacher_force([PROMPTS[2], PROMPTS[0]])
    assert [len(each.logprobs) for each in both] == [30, 8] and (both[0].best == logits[:-1].argmax(-1)).all()
    with pytest.raises(InputError, match="at least two tokens"):
        lm.score([5])


def test_seeds_repeat_and_returned_sequences_differ(lm: Decoder) -> None:
    options: Any = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "num_return_sequences": 5, "seed": 3}
    first, second = lm.generate(PROMPTS[0], **options), lm.generate(PROMPTS[0], **options)
    assert isinstance(first, list) and isinstance(second, list) and len(first) == 5
    assert [result.ids for result in first] == [result.ids for result in second]
    assert len({tuple(result.ids) for result in first}) > 1
    alone = single(lm.generate(PROMPTS[0], **{**options, "num_return_sequences": 1}))
    assert alone.ids == first[0].ids


def test_logprobs(lm: Decoder) -> None:
    result = single(lm.generate(PROMPTS[0], max_new_tokens=3, logprobs=4))
    assert result.logprobs is not None and [record.id for record in result.logprobs] == result.ids
    assert all(len(record.top) == 4 and record.top[0] == (record.id, record.logprob) for record in result.logprobs)


def test_eight_threads_get_what_one_gets(lm: Decoder) -> None:
    jobs = [PROMPTS[i % 5] for i in range(40)]

    def work(index: int) -> list[int]:
        if index % 4 == 3:
            return [int(token) for token in lm.stream(jobs[index], max_new_tokens=12)]
        return single(lm.generate(jobs[index], max_new_tokens=12)).ids

    before = lm._driver.loop.steps
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(40)))
    assert results == [EXPECTED[i % 5] for i in range(40)]
    assert lm._driver.loop.steps - before < 0.9 * 40 * 12, "their steps are shared"


def test_one_threads_failure_stays_its_own(lm: Decoder) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("broken sampler")

    original = lm._slots

    def work(index: int) -> str:
        try:
            if index % 2:
                slots = original(np.array(PROMPTS[0]), lm._settle({"max_new_tokens": 12}), accel_clock())
                slots[0].sampler = Broken()  # type: ignore[assignment]
                lm._run(slots)
            return str(single(lm.generate(PROMPTS[0], max_new_tokens=12)).ids)
        except AccelError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(12)))
    assert all(result == str(EXPECTED[0]) for result in results[::2])
    assert all("broken sampler" in result for result in results[1::2])


def accel_clock() -> Any:
    from accel.runtime.sequence import Clock

    return Clock()


def test_timings_add_up_and_match_the_clock(lm: Decoder) -> None:
    worst = []
    for _ in range(3):
        started = time.perf_counter()
        result = single(lm.generate(PROMPTS[2], max_new_tokens=90, eos_token_id=[]))
        measured = time.perf_counter() - started
        timings = result.timings
        assert timings.total == pytest.approx(timings.compute + timings.prepost + timings.system)
        assert min(timings.compute, timings.prepost, timings.system) > 0
        assert timings.tokens == 90 and timings.steps == 90
        assert timings.first_token is not None and 0 < timings.first_token < timings.total
        worst.append(abs(timings.total - measured) / measured)
    assert min(worst) < 0.02


def test_waiting_for_others_is_system_time(lm: Decoder) -> None:
    with ThreadPoolExecutor(6) as pool:  # three rows: half of the calls wait
        results = list(
            pool.map(lambda _: single(lm.generate(PROMPTS[0], max_new_tokens=60, eos_token_id=[])), range(6))
        )
    for result in results:
        timings = result.timings
        assert timings.compute <= timings.total and timings.system > -1e-4


def test_a_batch_counts_shared_steps_once(lm: Decoder) -> None:
    results = lm.generate(PROMPTS[:3], max_new_tokens=20, eos_token_id=[])
    assert isinstance(results, list)
    assert results[0].timings == results[2].timings
    assert results[0].timings.tokens == 60 and results[0].timings.steps == 20


def test_use_after_close(path: Path) -> None:
    lm = accel.load(path, capacity=32)
    assert isinstance(lm, Decoder)
    stream = lm.stream(PROMPTS[1], max_new_tokens=20)
    next(stream)
    lm.close()
    lm.close()
    with pytest.raises(EngineError, match="closed"):
        next(stream)
    for call in (lambda: lm.generate([1]), lambda: lm.stream([1]), lambda: lm.score([1, 2]), lambda: lm.chat([])):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_closing_ends_the_calls_under_way(path: Path) -> None:
    lm = accel.load(path, capacity=512, max_batch=2, threads=1)
    assert isinstance(lm, Decoder)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                lm.generate(PROMPTS[0], max_new_tokens=400, eos_token_id=[])
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    lm.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(errors) == 4 and all("closed" in str(error) for error in errors)


def _generate_in_child(lm: Decoder, queue: Any) -> None:
    try:
        queue.put(repr(lm.generate(PROMPTS[0], max_new_tokens=2)))
    except EngineError as error:
        lm.close()
        queue.put(str(error))


def test_a_forked_child_is_refused_even_while_another_thread_runs(lm: Decoder) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_generate_in_child, args=(lm, queue))
    busy = threading.Thread(target=lambda: lm.generate(PROMPTS[0], max_new_tokens=100, eos_token_id=[]))
    busy.start()
    with lm._lock, lm._driver._lock:  # as when another thread is just about to do something
        child.start()
    assert "fork" in queue.get(timeout=30)
    child.join(30)
    busy.join(30)
    assert single(lm.generate(PROMPTS[0], max_new_tokens=12)).ids == EXPECTED[0]


def test_an_interrupt_leaves_the_model_usable(lm: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = lm._session.step, []

    def interrupted(inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(inputs)

    monkeypatch.setattr(lm._session, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.generate(PROMPTS[:2], max_new_tokens=30)
    assert single(lm.generate(PROMPTS[0], max_new_tokens=12)).ids == EXPECTED[0]
    assert not lm._driver.loop.has_work


def test_capacity_is_used_to_the_last_position(path: Path) -> None:
    with accel.load(path, capacity=16, max_batch=1) as lm:
        assert isinstance(lm, Decoder)
        assert single(lm.generate(PROMPTS[0], max_new_tokens=8, eos_token_id=[])).ids == EXPECTED[0][:8]
        assert len(single(lm.generate(PROMPTS[0], eos_token_id=[])).ids) == 8  # the default shrinks to what fits
        with pytest.raises(CapacityError, match="at most 8 new tokens"):
            lm.generate(PROMPTS[0], max_new_tokens=9)
        with pytest.raises(CapacityError, match="prompt has 31 tokens, but the cache holds 16"):
            lm.generate(PROMPTS[2])
        with pytest.raises(CapacityError, match="prompt has 31"):
            lm.score(PROMPTS[2])
        assert len(single(lm.generate(list(range(16)), max_new_tokens=1)).ids) == 1


BAD_CALLS: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "text is empty"),
    (["w1", ""], {}, r"text is empty \(at texts\[1\]"),
    ([], {}, "batch is empty"),
    ([[]], {}, "without tokens|batch is empty"),
    (np.zeros((0, 4), np.int64), {}, "batch is empty"),
    ([["w1"]], {}, "not an integer type"),
    (["w1", 3], {}, "text is expected, not int"),
    ([1, VOCAB], {}, rf"outside the vocabulary of {VOCAB}: \[{VOCAB}\]"),
    ([-1], {}, "outside the vocabulary"),
    ([1.0, 2.0], {}, "dtype float64"),
    (np.zeros((1, 2, 3), np.int64), {}, "rank 3"),
    (np.array(3), {}, "rank 0"),
    ([[1, 2], [3]], {"attention_mask": [[1, 1], [1, 1]]}, "attention_mask has rows"),
    (np.ones((2, 3), np.int64), {"attention_mask": np.ones((2, 2))}, "dtype float64"),
    (np.ones((2, 3), np.int64), {"attention_mask": np.ones((2, 2), np.int64)}, "attention_mask has rows"),
    (np.ones((1, 3), np.int64), {"attention_mask": [[1, 0, 1]]}, "holes"),
    (np.ones((1, 3), np.int64), {"attention_mask": [[1, 2, 1]]}, "other values"),
    (np.ones((1, 3), np.int64), {"attention_mask": [[0, 0, 0]]}, "without tokens"),
    ("w1", {"attention_mask": [1]}, "belongs to token ids"),
    ([1], {"temperature": float("nan"), "do_sample": True}, "temperature must be"),
    ([1], {"top_p": -0.1, "do_sample": True}, "top_p must be"),
    ([1], {"top_k": -1, "do_sample": True}, "top_k must be"),
    ([1], {"min_p": 2.0, "do_sample": True}, "min_p must be"),
    ([1], {"repetition_penalty": 0.0}, "repetition_penalty must be"),
    ([1], {"temperature": 0.7}, "do_sample is False"),
    ([1], {"seed": -1}, "seed must be"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
    ([1], {"max_new_tokens": 2.0}, "max_new_tokens must be"),
    ([1], {"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens 3 is above"),
    ([1], {"num_return_sequences": 2}, "do_sample"),
    ([1], {"logprobs": VOCAB + 1}, "logprobs must be at most"),
    ([1], {"eos_token_id": VOCAB}, "eos_token_id"),
    ([1], {"eos_token_id": "x"}, "eos_token_id"),
    ([1], {"stop": ""}, "stop must be"),
    ([1], {"stop": [3]}, "stop must be"),
    ([1], {"max_tokens": 3}, "unknown argument 'max_tokens'.*'max_new_tokens'"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), BAD_CALLS)
def test_bad_calls_are_refused(lm: Decoder, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lm.generate(prompt, **options)


def test_streams_take_one_prompt(lm: Decoder) -> None:
    with pytest.raises(InputError, match="only one prompt"):
        lm.stream(["w1", "w2"])
    with pytest.raises(InputError, match="only one sequence"):
        lm.stream("w1", do_sample=True, num_return_sequences=2)
