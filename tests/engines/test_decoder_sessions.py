"""Both decoder sessions against the NumPy reference: packed mixed steps, copied rows, pointers, fork, close."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import GreedySession, SessionOptions, StepInputs
from accel.errors import EngineError
from tests.engines.tiny_llama import VOCAB, draw_weights, reference_logits, write_bundle

WEIGHTS = draw_weights()
IDS = np.random.default_rng(1).integers(0, VOCAB, 24).tolist()
LOGITS = reference_logits(WEIGHTS, IDS)
ROWS, CAPACITY = 3, 64
LIMIT = 5e-5  # logits reach 10; float32 through two layers


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("decoder") / "bundle", WEIGHTS)


@pytest.fixture(params=["ort-cpu", "torch"])
def session(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = open_session(bundle, engine=request.param, options=SessionOptions(2, CAPACITY, ROWS)).session
    assert opened.info.name == request.param
    yield opened
    opened.close()


def step(session: Any, rows: list[tuple[int, int, int]], wanted: list[int]) -> np.ndarray:
    """Runs IDS[start:stop] in each given row (row, start, stop), with ``start`` tokens in its cache."""
    query, past = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
    positions: list[int] = []
    for row, start, stop in rows:
        query[row], past[row] = stop - start, start
        positions += range(start, stop)
    ids = np.array([IDS[p] for p in positions])
    logits = session.step(StepInputs(ids, np.array(positions), query, past, np.array(wanted, np.int64)))
    return logits.copy()


def test_a_whole_prompt_gives_the_reference(session: Any) -> None:
    logits = step(session, [(0, 0, 24)], list(range(24)))
    assert logits.dtype == np.float32
    assert np.abs(logits - LOGITS).max() < LIMIT


def test_rows_at_different_phases_share_a_step(session: Any) -> None:
    assert step(session, [(1, 0, 5)], []).shape == (0, VOCAB)
    mixed = step(session, [(0, 0, 3), (1, 5, 12), (2, 0, 9)], [2, 9, 18])
    assert np.abs(mixed - LOGITS[[2, 11, 8]]).max() < LIMIT
    gaps = step(session, [(0, 3, 4), (2, 9, 10)], [0, 1])  # row 1 sits out
    assert np.abs(gaps - LOGITS[[3, 9]]).max() < LIMIT
    assert np.abs(step(session, [(1, 12, 13)], [0]) - LOGITS[[12]]).max() < LIMIT
    every = step(session, [(0, 4, 5), (1, 13, 14), (2, 10, 11)], [2, 0, 1])  # wanted in another order
    assert np.abs(every - LOGITS[[10, 4, 13]]).max() < LIMIT


def test_a_row_can_be_reused_and_repeated(session: Any) -> None:
    step(session, [(0, 0, 20)], [])
    assert np.abs(step(session, [(0, 0, 6)], [5]) - LOGITS[[5]]).max() < LIMIT
    for _ in range(2):  # the same step again, as after a failure
        assert np.abs(step(session, [(0, 6, 8)], [1]) - LOGITS[[7]]).max() < LIMIT


def test_copied_rows_go_their_own_way(session: Any) -> None:
    step(session, [(2, 0, 16)], [])
    session.copy_row(2, 0, 10)
    logits = step(session, [(0, 10, 14), (2, 16, 17)], [3, 4])
    assert np.abs(logits - LOGITS[[13, 16]]).max() < LIMIT


def test_a_closed_session_refuses(session: Any) -> None:
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        step(session, [(0, 0, 2)], [1])
    with pytest.raises(EngineError, match="closed"):
        session.copy_row(0, 1, 1)


def _step_in_child(session: Any, queue: Any) -> None:
    try:
        step(session, [(0, 0, 2)], [1])
        queue.put("ran")
    except EngineError as error:
        queue.put(str(error))


def test_a_forked_child_is_refused_and_the_parent_goes_on(bundle: Bundle) -> None:
    session = open_session(bundle, engine="ort-cpu", options=SessionOptions(2, CAPACITY, ROWS)).session
    step(session, [(0, 0, 4)], [3])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_step_in_child, args=(session, queue))
    child.start()
    message = queue.get(timeout=30)
    child.join(30)
    assert "fork" in message and "spawn" in message
    assert np.abs(step(session, [(0, 4, 6)], [1]) - LOGITS[[5]]).max() < LIMIT
    session.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_over_1000_steps_pointers_stay_and_memory_does_not_grow(bundle: Bundle) -> None:
    session: Any = open_session(bundle, engine="ort-cpu", options=SessionOptions(1, 512, ROWS)).session
    before = session.cache_pointers()
    ids = np.random.default_rng(2).integers(0, VOCAB, (1100, ROWS))

    def run(index: int) -> None:
        past = np.full(ROWS, index % 512, np.int32)
        inputs = StepInputs(ids[index], past.astype(np.int64), np.ones(ROWS, np.int32), past, np.arange(ROWS))
        assert np.isfinite(session.step(inputs)).all()

    for index in range(600):  # once around: the cache's pages are committed
        run(index)
    start = resident_bytes()
    for _ in range(2):
        for index in range(100, 600):
            run(index)
    assert resident_bytes() - start < 1 << 20
    assert session.cache_pointers() == before
    session.close()


def test_keys_land_in_the_bound_buffers(bundle: Bundle) -> None:
    session: Any = open_session(bundle, engine="ort-cpu", options=SessionOptions(1, CAPACITY, ROWS)).session
    step(session, [(1, 0, 5)], [])
    keys = session._caches["0.key"]
    assert np.abs(keys[1, :, :5]).min(axis=-1).shape == (2, 5)
    assert (np.abs(keys[1, :, :5]).max(axis=-1) > 0).all()
    assert not keys[1, :, 5:].any() and not keys[0].any() and not keys[2].any()
    session.close()


def test_many_wanted_logits_outgrow_the_reused_buffer(session: Any) -> None:
    first = step(session, [(0, 0, 10)], list(range(10)))
    assert np.abs(first - LOGITS[:10]).max() < LIMIT
    assert np.abs(step(session, [(0, 10, 11)], [0]) - LOGITS[[10]]).max() < LIMIT


def test_the_graph_finds_the_likeliest_tokens_itself(tiny_decoder_bundle: Path) -> None:
    """An exported decoder's; several rows, several tokens, and none wanted."""
    session: Any = open_session(
        Bundle.open(tiny_decoder_bundle), engine="ort-cpu", options=SessionOptions(2, 64, ROWS)
    ).session
    assert isinstance(session, GreedySession)
    query, past = np.array([3, 0, 2], np.int32), np.zeros(ROWS, np.int32)
    for wanted in ([2, 4], [0, 1, 2, 3, 4], []):
        inputs = StepInputs(np.arange(5), np.array([0, 1, 2, 0, 1]), query, past, np.array(wanted, np.int64))
        logits = session.step(inputs).copy()
        best = session.greedy(inputs)
        np.testing.assert_array_equal(best.tokens, logits.argmax(axis=-1))
        np.testing.assert_array_equal(best.logits, logits.max(axis=-1, initial=-np.inf))
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.greedy(inputs)


def test_a_graph_of_before_leaves_the_choice_to_its_caller(bundle: Bundle) -> None:
    session = open_session(bundle, engine="ort-cpu", options=SessionOptions(2, CAPACITY, ROWS)).session
    assert not isinstance(session, GreedySession)
    session.close()
