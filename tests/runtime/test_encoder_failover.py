"""Encoding goes on when the engine breaks: what it was running is repeated on the next one, whoever called."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import accel
import accel.engines as engines
from accel.bundle import Bundle
from accel.engines.session import EngineInfo, Fallback
from accel.errors import EngineBrokenError, EngineError, EngineUnavailableError, UncoveredError
from accel.runtime.encoder import Encoder
from tests.engines import test_encoder_sessions as tiny
from tests.runtime.breaking import Breaking, Shelf
from tests.runtime.encoder_samples import FakeSession, write_bundle

TEXTS = [f"{'the quick fox ' * (1 + i % 7)} number {i}" for i in range(60)]


class Many(Breaking):
    """Breaks in ``run_many`` too: it counts as one run."""

    def run_many(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        assert not self.closed
        self._count("steps")
        time.sleep(0.001)
        found: list[dict[str, np.ndarray]] = self.session.run_many(batches)
        assert not self.closed, "closed during a run"
        return found


class Narrow(Breaking):
    """Was built for rows of up to three tokens."""

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if feeds["input_ids"].shape[1] > 3:
            raise UncoveredError(f"{self.info.name} takes three tokens")
        return super().run(feeds)


class Line:
    """Sessions that follow one another; what opening one yields."""

    def __init__(self, *sessions: Any, fallbacks: tuple[Fallback, ...] = ()) -> None:
        self.session, self.rest, self.fallbacks = sessions[0], sessions[1:], fallbacks

    def open_next(self, error: EngineBrokenError) -> Line:
        assert self.session.closed, "the broken one is closed first"
        reason = Fallback(self.session.info.name, str(error))
        if not self.rest:
            raise EngineUnavailableError("no engine is left")
        return Line(*self.rest, fallbacks=(*self.fallbacks, reason))

    def open_beside(self, error: UncoveredError) -> Line:
        assert not self.session.closed, "it stays in use"
        if not self.rest:
            raise EngineUnavailableError("no engine is left")
        return Line(*self.rest, fallbacks=(*self.fallbacks, Fallback(self.session.info.name, str(error))))


def breaking(name: str, runs: int | None = None, many: bool = True, **how: Any) -> Any:
    kind = Many if many else Breaking
    return kind(FakeSession(many=many), EngineInfo(name, "1", "cpu", "fp32", 2), steps=runs, **how)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("encoder") / "b")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> np.ndarray:
    return Encoder(bundle, Line(breaking("whole"))).embed(TEXTS)


@pytest.fixture
def small_waves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("accel.runtime.encoder_core.WAVE_BYTES", 16 << 10)
    yield


def test_a_call_is_repeated_on_the_next_engine(bundle: Bundle) -> None:
    ids = [[101, 7592, 102]]
    first, second, third = breaking("a", 1), breaking("b", 0), breaking("c")
    encoder = Encoder(bundle, Line(first, second, third))
    whole = encoder(ids).last_hidden_state
    assert encoder.engine.name == "a" and encoder.fallbacks == ()
    np.testing.assert_array_equal(encoder(ids).last_hidden_state, whole)
    assert encoder.engine.name == "c" and "c, fp32" in repr(encoder)
    assert encoder.fallbacks == tuple(Fallback(name, f"{name} fell off the bus (at device 0)") for name in "ab")
    encoder.close()
    assert [session.closed for session in (first, second, third)] == [1, 1, 1]
    assert first.broken == second.broken == 1


@pytest.mark.usefixtures("small_waves")
@pytest.mark.parametrize("many", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("runs", [0, 1, 2])
def test_texts_in_waves(bundle: Bundle, expected: np.ndarray, runs: int, many: tuple[bool, bool]) -> None:
    last = breaking("b", many=many[1])
    with Encoder(bundle, Line(breaking("a", runs, many[0]), last)) as encoder:
        np.testing.assert_allclose(encoder.embed(TEXTS), expected, atol=2e-6)
        assert encoder.engine.name == "b"
    assert last.session.seen


@pytest.mark.usefixtures("small_waves")
@pytest.mark.parametrize("runs", [0, 3, 20])
def test_eight_threads_change_once_per_engine(bundle: Bundle, expected: np.ndarray, runs: int) -> None:
    sessions = [breaking("a", runs), breaking("b", runs), breaking("c")]
    start = threading.Barrier(8)
    with Encoder(bundle, Line(*sessions)) as encoder, ThreadPoolExecutor(8) as pool:

        def work(index: int) -> list[np.ndarray]:
            start.wait()
            single = [encoder.embed(TEXTS[index]) for _ in range(5)]
            return [encoder.embed(TEXTS), *single]

        for index, (several, *single) in enumerate(pool.map(work, range(8))):
            np.testing.assert_allclose(several, expected, atol=2e-6)
            for one in single:
                np.testing.assert_allclose(one, expected[index], atol=2e-6)
        assert encoder.engine.name == "c" and [f.engine for f in encoder.fallbacks] == ["a", "b"]
    assert [session.closed for session in sessions] == [1, 1, 1]


def test_the_broken_session_is_closed_only_after_the_others_left_it(bundle: Bundle) -> None:
    inside, broke = threading.Event(), threading.Event()
    first, second = breaking("a", 1, at=broke.set), breaking("b")
    plain = first.session.run

    def slow(feeds: dict[str, np.ndarray]) -> Any:
        inside.set()
        assert broke.wait(20)
        time.sleep(0.1)
        assert not first.closed
        return plain(feeds)

    first.session.run = slow
    with Encoder(bundle, Line(first, second)) as encoder, ThreadPoolExecutor(2) as pool:
        slow_call = pool.submit(encoder, [[101, 102]])
        assert inside.wait(20)
        other = pool.submit(encoder, [[101, 102]])
        np.testing.assert_array_equal(slow_call.result(20).last_hidden_state, other.result(20).last_hidden_state)
        assert len(second.session.seen) == 1 and encoder.engine.name == "b"


def test_without_another_engine_every_call_says_so(bundle: Bundle) -> None:
    last = breaking("a", 4)
    with Encoder(bundle, Line(last)) as encoder, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(lambda: [encoder([[101, 102]]) for _ in range(5)]) for _ in range(8)]
        assert all(isinstance(future.exception(20), EngineUnavailableError) for future in futures)
        with pytest.raises(EngineUnavailableError, match="no engine is left"):
            encoder.embed(TEXTS)
    assert last.closed == 1


def test_an_error_of_the_call_alone_is_not_a_broken_engine(bundle: Bundle) -> None:
    first = breaking("a")

    def fail(feeds: Any) -> Any:
        raise EngineError("out of memory")

    first.session.run = fail
    with Encoder(bundle, Line(first, breaking("b"))) as encoder:
        with pytest.raises(EngineError, match="out of memory"):
            encoder([[101, 102]])
        assert encoder.engine.name == "a" and not first.closed


def test_opening_is_no_compute_time(bundle: Bundle) -> None:
    class Slow(Line):
        def open_next(self, error: EngineBrokenError) -> Line:
            time.sleep(0.3)
            return super().open_next(error)

    timings = Encoder(bundle, Slow(breaking("a", 0), breaking("b")))([[101, 102]]).timings
    assert timings.compute < 0.3 < timings.system < timings.total and timings.steps == 1
    assert timings.total == pytest.approx(timings.compute + timings.prepost + timings.system)


def test_an_interrupt_while_opening_leaves_the_encoder_usable(bundle: Bundle) -> None:
    tries: list[int] = []

    class Interrupted(Line):
        def open_next(self, error: EngineBrokenError) -> Line:
            tries.append(1)
            if len(tries) == 1:
                raise KeyboardInterrupt
            return super().open_next(error)

    encoder = Encoder(bundle, Interrupted(breaking("a", 0), breaking("b")))
    with pytest.raises(KeyboardInterrupt):
        encoder([[101, 102]])
    assert encoder([[101, 102]]).last_hidden_state.shape[:2] == (1, 2)
    assert encoder.engine.name == "b" and len(tries) == 2


def test_closing_while_the_next_engine_opens(bundle: Bundle) -> None:
    opening, going_on = threading.Event(), threading.Event()

    class Slow(Line):
        def open_next(self, error: EngineBrokenError) -> Line:
            opening.set()
            assert going_on.wait(20)
            return super().open_next(error)

    sessions = [breaking("a", 0), breaking("b")]
    encoder = Encoder(bundle, Slow(*sessions))
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(encoder, [[101, 102]])
        assert opening.wait(20)
        closing = pool.submit(encoder.close)
        time.sleep(0.05)
        going_on.set()
        assert call.result(20).last_hidden_state.shape[:2] == (1, 2)  # it was in flight
        closing.result(20)
    assert [session.closed for session in sessions] == [1, 1]
    with pytest.raises(EngineError, match="closed"):
        encoder([[101]])


def narrow(name: str, runs: int | None = None) -> Any:
    return Narrow(FakeSession(), EngineInfo(name, "1", "cpu", "fp32", 2), steps=runs)


SHORT, LONG = [[101, 102]], [[101, 7592, 2088, 102]]


def test_a_row_too_long_runs_beside(bundle: Bundle) -> None:
    """The next engine that takes it is opened by the first such row; the others stay on the first engine."""
    first, second, third = narrow("a"), narrow("b"), breaking("c")
    encoder = Encoder(bundle, Line(first, second, third))
    encoder(SHORT)
    assert encoder.fallbacks == ()
    whole = Encoder(bundle, Line(breaking("whole")))(LONG).last_hidden_state
    for _ in range(2):
        np.testing.assert_array_equal(encoder(LONG).last_hidden_state, whole)
        encoder(SHORT)
    assert encoder.engine.name == "a" and not first.closed
    assert encoder.fallbacks == tuple(Fallback(name, f"{name} takes three tokens") for name in "ab")
    assert [len(session.session.seen) for session in (first, second, third)] == [3, 0, 2]
    encoder.close()
    assert [session.closed for session in (first, second, third)] == [1, 1, 1]


def test_texts_of_all_lengths_over_two_engines(bundle: Bundle, expected: np.ndarray) -> None:
    with Encoder(bundle, Line(narrow("a"), breaking("b"))) as encoder, ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: encoder.embed(["the", *TEXTS]), range(8)):
            np.testing.assert_allclose(found[1:], expected, atol=2e-6)
        assert [fallback.engine for fallback in encoder.fallbacks] == ["a"]


def test_an_engine_beside_that_breaks(bundle: Bundle) -> None:
    """It is replaced as any other."""
    first, second = narrow("a"), breaking("b", 1)
    with Encoder(bundle, Line(first, second, breaking("c"))) as encoder:
        encoder(LONG)
        encoder(LONG)
        assert [fallback.engine for fallback in encoder.fallbacks] == ["a", "b"]
        assert second.closed and not first.closed and encoder.engine.name == "a"


def test_the_engine_breaks_while_another_is_beside_it(bundle: Bundle) -> None:
    """The one beside it makes room for the one that takes its place, which runs all rows."""
    beside, last = breaking("b"), breaking("b")

    class Anew(Line):
        def open_next(self, error: EngineBrokenError) -> Line:
            assert self.session.closed and beside.closed
            return Line(last, fallbacks=(Fallback("a", str(error)),))

    with Encoder(bundle, Anew(narrow("a", 1), beside)) as encoder:
        encoder(LONG)
        for ids in (SHORT, SHORT, LONG):
            encoder(ids)
        assert encoder.engine.name == "b" and len(beside.session.seen) == 1 and len(last.session.seen) == 2
        assert encoder.fallbacks == (Fallback("a", "a fell off the bus (at device 0)"),)
    assert beside.closed == last.closed == 1


def test_a_row_too_long_for_every_engine(bundle: Bundle) -> None:
    only = narrow("a")
    with Encoder(bundle, Line(only)) as encoder:
        for _ in range(2):
            with pytest.raises(EngineUnavailableError, match="no engine is left"):
                encoder(LONG)
        assert encoder(SHORT).last_hidden_state.shape == (1, 2, encoder.arch.hidden_size)
    assert only.closed == 1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that both real engines can open."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("real")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "model")
    return accel.export(folder / "model", folder / "bundle").path


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"engine": "gpu"}])
def test_from_onnxruntime_to_the_reference(
    real: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    shelf, known = Shelf(), {engine.name: engine for engine in engines.ENGINES}
    ort, torch = known["ort-cpu"], known["torch"]
    monkeypatch.setattr(engines, "ENGINES", (shelf.engine("gpu", ort, steps=1), torch))
    feeds = tiny.batch([7, 3, 5])
    feeds["token_type_ids"] = feeds["token_type_ids"] * 0
    with accel.load(real, threads=1, **options) as encoder:
        assert isinstance(encoder, Encoder)
        first = encoder(**feeds).last_hidden_state
        if options:
            for _ in range(2):
                with pytest.raises(EngineBrokenError, match="gpu fell off the bus"):
                    encoder(**feeds)
            return
        second = encoder(**feeds).last_hidden_state
        assert encoder.engine.name == "torch"
        kept = feeds["attention_mask"].astype(bool)
        assert np.abs(first - second)[kept].max() < 1e-5
