"""A GPU whose memory is full during a step: it becomes smaller, and at last one request alone fails."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from accel.engines.cuda import decoder as module
from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import INTERPRETED
from accel.engines.cuda.executor import Run
from accel.engines.cuda.step_halves import halves
from accel.engines.session import ChosenTokens, Draws, StepInputs
from accel.errors import EngineBrokenError, EngineError
from accel.runtime.sampling import Sampler
from accel.runtime.sequence import Sequence
from accel.runtime.slots import SlotLoop
from tests.engines.cuda.steps import GREEDY, inputs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/engines/test_full_gpu.py fills it")
Full = Callable[[Any], bool]
TOKENS = {0: [5, 6, 7, 8, 9, 10, 11], 1: [12], 2: [13, 14, 15, 16, 17]}  # 13, which run as 16
WANTED = [0, 6, 7, 12]


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_TOKENS", 2)


LACKING: dict[str, tuple[type[Exception], str]] = {
    "allocator": (torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"),
    "driver": (RuntimeError, "CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "kernel": (RuntimeError, "Triton Error [CUDA]: out of memory"),
    "another's capture": (RuntimeError, "CUDA error: operation not permitted when stream is capturing\nFor debugging"),
    "library": (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


def fill(
    session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch, full: Full, who: str = "allocator"
) -> list[int]:
    """Memory that lacks for some steps' ids, as who asks for it says; how many tokens were tried, in order."""
    tried, run = [], session._executor.run

    def limited(feeds: Any, *rest: Any) -> Any:
        tried.append(len(feeds["input_ids"]))
        if full(feeds["input_ids"]):
            kind, message = LACKING[who]
            raise kind(message)
        return run(feeds, *rest)

    monkeypatch.setattr(session._executor, "run", limited)
    return tried


@pytest.mark.parametrize("who", ["allocator", "driver", "kernel", "library"])
def test_halves_leave_what_the_step_leaves(
    who: str, session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = inputs(TOKENS, {0: 0, 1: 0, 2: 0}, WANTED)
    whole, best = session.step(step), session.greedy(step)
    behind = session.step(inputs({0: [1, 2], 1: [3], 2: [4]}, {0: 7, 1: 1, 2: 5}))
    tried = fill(session, monkeypatch, lambda ids: len(ids) > 4, who)
    with caplog.at_level(logging.WARNING, "accel"):
        np.testing.assert_allclose(session.step(step), whole, rtol=1e-4, atol=1e-5)
    assert tried == [16, 8, 4, 4, 4, 2, 2], "13 tokens, 6 of them, 3 and 3; of the other 7 three, and four in halves"
    assert "at most from now on" in caplog.text
    found = session.greedy(step)
    assert tried[7:] == [4, 4, 4, 2, 2], "the size that did not fit is not tried again"
    np.testing.assert_array_equal(found.tokens, best.tokens)
    np.testing.assert_allclose(found.logits, best.logits, rtol=1e-4, atol=1e-5)
    again = session.step(inputs({0: [1, 2], 1: [3], 2: [4]}, {0: 7, 1: 1, 2: 5}))
    np.testing.assert_allclose(again, behind, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [inputs(TOKENS, {}, WANTED), inputs({0: [5], 1: [6]}, {0: 3, 1: 2})])
def test_another_threads_capture_costs_a_second_try(
    step: StepInputs, session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's, while another model is loaded: the driver gives no memory then."""
    session.step(inputs({0: [5, 6, 7], 1: [8, 9]}, {}))
    expected = session.greedy(step)
    left = [1]

    def refuse(_: Any) -> bool:
        return bool(left) and left.pop() == 1

    fill(session, monkeypatch, refuse, "another's capture")
    np.testing.assert_array_equal(session.greedy(step).tokens, expected.tokens)
    assert not left and session._most_tokens is None, "no step is made smaller for it"
    fill(session, monkeypatch, lambda ids: True, "another's capture")
    with pytest.raises(EngineBrokenError, match="stream is capturing"):
        session.step(inputs({2: [5, 6, 7]}, {}))


def test_draws_are_halved_with_their_positions(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    step = inputs(TOKENS, {}, WANTED)
    filters = np.array([[1.5, 0, 1.0, 0.0], [0.0, 0, 1.0, 0.0], [0.7, 5, 0.9, 0.0], [2.0, 0, 1.0, 0.0]])
    draws = Draws(filters, np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.3], [0.6, 0.8]]))
    expected = session.sample(step, draws)
    assert len({*expected.tokens.tolist()}) > 1
    fill(session, monkeypatch, lambda ids: len(ids) > 4)
    found = session.sample(step, draws)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert isinstance(found, ChosenTokens) and found.logits.dtype == np.float32


def test_what_was_recorded_makes_room(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.step(inputs({0: [5, 6]}, {}))
    session.step(inputs({0: [5, 6, 7]}, {}))
    kept, released = {*session._packed}, []
    monkeypatch.setattr(session._device, "release", lambda: released.append(len(session._packed)))
    fill(session, monkeypatch, lambda ids: len(ids) > 8)
    session.step(inputs(TOKENS, {}, WANTED))
    assert kept and released == [0]
    assert not kept & {*session._packed}


def test_nothing_waits_for_a_search_of_cycles(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded, and what the failed run had made, is free when memory is given back, and while halves run."""
    session.step(inputs({0: [5, 6, 7]}, {}))
    session.greedy(inputs({0: [5], 1: [6]}, {}))
    kept = [weakref.ref(place) for place in (*session._packed.values(), *session._decodes.values())]
    made, compute, alive = [], Run._compute, []

    def computing(run: Run, node: Any) -> None:
        if all(known() is not run for known in made):
            made.append(weakref.ref(run))
        if len(made) == 1 and node.op_type == "CachedAttention":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        compute(run, node)

    monkeypatch.setattr(Run, "_compute", computing)
    monkeypatch.setattr(
        session._device, "release", lambda: alive.extend(known() for known in (*kept, made[0]) if known() is not None)
    )
    gc.collect()
    gc.disable()
    try:
        session.step(inputs(TOKENS, {}, WANTED))
        assert not alive and len(made) == 3
        assert all(known() is None for known in made)
    finally:
        gc.enable()


def test_an_error_that_is_kept_keeps_no_memory(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    made, compute = [], Run._compute

    def computing(run: Run, node: Any) -> None:
        made.append(weakref.ref(run))
        compute(run, node)
        if node.op_type == "CachedAttention":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Run, "_compute", computing)
    alive = []
    monkeypatch.setattr(session._device, "release", lambda: alive.extend(known() for known in made if known()))
    for step in (inputs({0: [5, 6, 7]}, {}), inputs({0: [5]}, {0: 3})):
        with pytest.raises(EngineError, match="memory is full") as info:
            session.step(step)
        assert info.value.__cause__ is not None
        assert made and not alive and all(known() is None for known in made)


def test_a_token_makes_room_once(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    step = inputs({0: [5], 1: [6]}, {0: 3, 1: 2})
    session.step(inputs({0: [5, 6, 7], 1: [8, 9]}, {}))
    expected = session.greedy(step)
    tried = fill(session, monkeypatch, lambda ids: len(session._packed) > 0)
    found = session.greedy(inputs({0: [5], 1: [6]}, {0: 3, 1: 2}))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert not session._packed and len(tried) >= 2


def test_more_tokens_are_tried_again(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEPS_UNTIL_MORE", 3)
    monkeypatch.setattr(module, "CHUNK", 16)
    fill(session, monkeypatch, lambda ids: len(ids) > 4)
    session.step(inputs(TOKENS, {}, WANTED))
    assert session._most_tokens in (3, 6)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_STEPS_UNTIL_MORE", 3)
    monkeypatch.setattr(module, "CHUNK", 16)
    for _ in range(9):
        session.step(inputs({0: [5, 6]}, {}))
    assert session._most_tokens is None


def test_the_last_few_tokens_do_not_fit(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fill(session, monkeypatch, lambda ids: True)
    with pytest.raises(EngineError, match="memory is full") as info:
        session.step(inputs(TOKENS, {}, WANTED))
    assert not isinstance(info.value, EngineBrokenError)
    assert tried == [16, 8, 4, 4], "3 tokens are no longer halved"


def test_a_few_tokens_run_once_there_is_room(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = inputs({0: [5, 6, 7]}, {})
    expected = session.step(prompt).copy()
    session.greedy(inputs({0: [8]}, {0: 3}))
    tried = fill(session, monkeypatch, lambda ids: bool(session._decodes))
    np.testing.assert_array_equal(session.step(prompt), expected)
    assert tried == [4, 4] and session._most_tokens is None, "nothing is made smaller for it"


def test_that_request_alone_fails(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(session, monkeypatch, lambda ids: bool((ids == 77).any()))
    prompts = [[5, 6, 7, 8, 9], [5, 6, 77, 8, 9, 10, 11], [12, 13, 14]]
    loop = SlotLoop(session)
    made = [Sequence(np.array(ids), Sampler(GREEDY, session.vocab_size), 3) for ids in prompts]
    for sequence in made:
        loop.submit(sequence)
    while loop.has_work:
        loop.step()
    assert [sequence.error is None for sequence in made] == [True, False, True]
    assert isinstance(made[1].error, EngineError) and "memory is full" in str(made[1].error)
    assert [len(sequence.new_ids) for sequence in made] == [3, 0, 3]


def test_places_are_limited(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLACES", 2)
    for count in (2, 3, 5, 3):
        session.step(inputs({0: [*range(5, 5 + count)]}, {}))
    session.step(inputs({0: [*range(5, 14)]}, {}))
    assert [key[0] for key in session._packed] == [4, 16], "the least recently used one goes"


@pytest.mark.parametrize("lengths", [[7, 1, 5], [0, 13, 0], [1, 1, 1], [0, 1, 1], [6, 7, 0]])
def test_halves(lengths: list[int]) -> None:
    """Each token once, in order, at its place in its row."""
    counts, past = np.array(lengths, np.int32), np.array([3, 0, 9], np.int32)
    total = int(counts.sum())
    positions = np.concatenate([np.arange(n) + p for n, p in zip(lengths, past, strict=True)])
    step = StepInputs(np.arange(total), positions, counts, past, np.arange(total))
    first, second = halves(step)
    assert len(first.input_ids) == total // 2
    np.testing.assert_array_equal(np.concatenate([first.input_ids, second.input_ids]), step.input_ids)
    np.testing.assert_array_equal(first.query_lengths + second.query_lengths, counts)
    np.testing.assert_array_equal(second.past_lengths, past + first.query_lengths)
    for part in (first, second):
        assert part.query_lengths.sum() == len(part.input_ids)
        assert part.query_lengths.dtype == part.past_lengths.dtype == np.int32
        own = [np.arange(n) + p for n, p in zip(part.query_lengths, part.past_lengths, strict=True)]
        np.testing.assert_array_equal(part.position_ids, np.concatenate(own))
        np.testing.assert_array_equal(part.logits_positions, np.arange(len(part.input_ids)))
