"""CUDA graphs of decode batches: who captures them, when, and what follows where that fails."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.engines.gpu_memory import OutOfMemoryError, let_go
from accel.engines.ort_cuda import decoder as module
from accel.engines.ort_cuda.decoder import CAPTURE_TRIES, GRAPH_RUNS
from accel.engines.ort_cuda.threads import OWN_THREADS
from accel.errors import EngineBrokenError, EngineError
from tests.engines.captures import DISTURBED, others_may_capture
from tests.engines.ort_cuda.stand_in import fake_gpu, open_decoder
from tests.engines.ort_cuda.steps import CAPACITY, LIMIT, ROWS, step

ENDED = "CUDA failure 901: operation failed due to a previous error during capture ; GPU=0"


def graph_id(options: Any) -> str | None:
    return options.get_run_config_entry("gpu_graph_id") if options is not None else None


class Failures:
    """Fails runs of one graph, each as the last of what is ``said``."""

    def __init__(self, graph: str) -> None:
        self.graph, self.said = graph, list[str]()

    def __call__(self, io: Any, options: Any) -> None:
        if self.said and graph_id(options) == self.graph:
            raise RuntimeError(self.said.pop())


def test_decode_batches_are_captured_at_opening(bundle: Bundle, logits: NDArray) -> None:
    runs: list[str | None] = []
    gpu = fake_gpu(lambda io, options: None if options is None else runs.append(graph_id(options)))
    session = open_decoder(bundle, ROWS, CAPACITY, gpu)
    assert gpu.opened == [True] and runs == [graph for size in "123" for graph in ("-1", *[size] * GRAPH_RUNS)]
    runs.clear()
    found = step(session, [(0, 0, 5), (1, 0, 4)], [4])
    assert np.abs(found - logits[[4]]).max() < LIMIT and runs == ["-1"], "prompts are not"
    step(session, [(0, 5, 6), (1, 4, 5)], [0, 1])
    assert runs[1:] == ["2"] and session.notes == []
    session.close()


def test_nobody_else_captures_meanwhile(bundle: Bundle) -> None:
    free: list[bool] = []

    def look(io: Any, options: Any) -> None:
        if graph_id(options) is not None:
            free.append(others_may_capture())

    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(look))
    assert free == [False] * 3 * (1 + GRAPH_RUNS)
    assert others_may_capture()
    session.close()


def test_other_threads_capture_with_their_first_run(bundle: Bundle, logits: NDArray) -> None:
    """ONNX Runtime keeps graphs by thread: the loader's and one more have their own, all others share one's."""
    runs: list[tuple[int, str | None, bool]] = []

    def note(io: Any, options: Any) -> None:
        if options is not None:  # a decoder run, of a prompt or a token; not what allocates
            runs.append((threading.get_ident(), graph_id(options), others_may_capture()))

    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(note))
    step(session, [(0, 0, 3)], [2])
    here, left = threading.get_ident(), set(threading.enumerate())
    runs.clear()
    pools = [ThreadPoolExecutor(1) for _ in range(4)]
    askers = [pool.submit(threading.get_ident).result() for pool in pools]
    for place in (3, 4, 5):
        for pool in pools:
            found = pool.submit(step, session, [(0, place, place + 1)], [0]).result()
            assert np.abs(found - logits[[place]]).max() < LIMIT
        assert np.abs(step(session, [(0, place, place + 1)], [0]) - logits[[place]]).max() < LIMIT
    ours = {ident for ident, _, _ in runs} - {here, askers[0]}
    assert len(ours) == 1 and not ours & {*askers}
    capturing = [(ident, graph, False) for ident in (askers[0], *ours) for graph in ("-1", *["1"] * GRAPH_RUNS)]
    replays = [(ident, "1", True) for ident in (*ours, *ours, here)]
    second = [(askers[0], "1", True), *replays[:1], *replays]
    assert runs == [*capturing, *replays, *second, *second]
    for pool in pools:
        pool.shutdown()
    session.close()
    assert not set(threading.enumerate()) - left


@pytest.mark.parametrize("said", ["onnxruntime", "legacy stream", "arena"])
def test_another_threads_capture_costs_a_second_try(bundle: Bundle, logits: NDArray, said: str) -> None:
    """Another model's, while it is loaded: CUDA gives no memory then."""
    left: list[int] = []
    free: list[bool] = []

    def refuse(io: Any, options: Any) -> None:
        if left and left.pop():
            raise RuntimeError(DISTURBED[said])
        free.append(others_may_capture())

    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(refuse))
    free.clear()
    left.append(1)
    assert np.abs(step(session, [(0, 0, 3)], [2]) - logits[[2]]).max() < LIMIT
    assert free == [False], "nobody captured the second time"
    left[:] = [1, 1]
    with pytest.raises(OutOfMemoryError if said == "arena" else EngineBrokenError, match=DISTURBED[said][:15]):
        step(session, [(0, 3, 4)], [0])
    session.close()


@pytest.mark.parametrize("fails", [1, 2])
def test_a_capture_that_others_end_is_made_again(
    bundle: Bundle, logits: NDArray, fails: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Others that serve allocate, until they wait for the lock."""
    captured: list[str | None] = []

    def fail(io: Any, options: Any) -> None:
        captured.append(graph_id(options))
        if captured[-1] == "2" and captured.count("2") <= fails:
            raise RuntimeError(ENDED)

    gpu = fake_gpu(fail)
    session = open_decoder(bundle, ROWS, CAPACITY, gpu)
    assert gpu.opened == [True] * (1 + fails) and not session.notes and not caplog.records
    assert captured.count("1") == GRAPH_RUNS * 2, "a new session has none of the old one's graphs"
    step(session, [(0, 0, 5), (1, 0, 4)], [])
    assert np.abs(step(session, [(0, 5, 6), (1, 4, 5)], [0, 1]) - logits[[5, 4]]).max() < LIMIT
    assert captured[-1] == "2"
    session.close()


def test_a_failed_capture_is_noted_and_runs_go_on(
    bundle: Bundle, logits: NDArray, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(io: Any, options: Any) -> None:
        if graph_id(options) == "2":
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")

    gpu = fake_gpu(fail)
    session = open_decoder(bundle, ROWS, CAPACITY, gpu)
    assert gpu.opened == [True] * CAPTURE_TRIES + [False]
    assert len(session.notes) == 1 and "CUDA graphs are off: CUDA failed: CUDA failure 900" in session.notes[0]
    assert session.notes[0] in caplog.text
    step(session, [(0, 0, 5), (1, 0, 4)], [])
    assert np.abs(step(session, [(0, 5, 6), (1, 4, 5)], [0, 1]) - logits[[5, 4]]).max() < LIMIT
    session.close()


def test_a_session_that_refuses_capture_is_opened_without(bundle: Bundle) -> None:
    gpu = fake_gpu()
    plain = type(gpu).open

    def refuse(self: Any, graph: Any, capture: bool = False) -> Any:
        if capture:
            raise EngineError("nodes are not all on CUDA")
        return plain(self, graph, capture)

    type(gpu).open = refuse  # type: ignore[method-assign]
    try:
        session = open_decoder(bundle, ROWS, CAPACITY, gpu)
    finally:
        type(gpu).open = plain  # type: ignore[method-assign]
    assert session.notes == ["CUDA graphs are off: nodes are not all on CUDA"]
    session.close()


def test_a_capture_that_fails_in_use(bundle: Bundle, logits: NDArray) -> None:
    """Another thread's first run: caches stay, and all graphs are made again by whoever comes."""
    failures: list[str] = []
    runs: list[tuple[int, str | None]] = []

    def fail(io: Any, options: Any) -> None:
        if options is not None:
            runs.append((threading.get_ident(), graph_id(options)))
            if failures and graph_id(options) != "-1":
                raise RuntimeError(failures.pop())

    gpu = fake_gpu(fail)
    session = open_decoder(bundle, ROWS, CAPACITY, gpu)
    step(session, [(0, 0, 3)], [2])
    runs.clear()
    with ThreadPoolExecutor(1) as pool:
        failures.append(ENDED)
        found = pool.submit(step, session, [(0, 3, 4)], [0]).result()
        other = pool.submit(threading.get_ident).result()
    assert np.abs(found - logits[[3]]).max() < LIMIT and gpu.opened == [True] * 2
    assert np.abs(step(session, [(0, 4, 5)], [0]) - logits[[4]]).max() < LIMIT
    graphs = [graph for _, graph in runs]
    assert graphs == ["-1", "1", *["-1", *["1"] * GRAPH_RUNS] * 2], "not captured at first: full memory shows then"
    assert [ident for ident, _ in runs] == [other] * (3 + GRAPH_RUNS) + [threading.get_ident()] * (1 + GRAPH_RUNS)
    session.close()


@pytest.mark.parametrize(("others", "graph"), [(0, "1"), (0, "3"), (1, "1"), (OWN_THREADS, "1")])
def test_the_session_of_a_failed_capture_goes_first(
    bundle: Bundle, others: int, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that holds the weights once need not hold them twice: at opening, in another thread, in the shared one."""
    good = [] if others else [1]  # runs of the graph until one fails
    opened: list[weakref.ref[Any]] = []
    left: list[int] = []

    def fail(io: Any, options: Any) -> None:
        if good and graph_id(options) == graph:
            good[0] -= 1
            if good[0] < 0:
                good.clear()
                raise RuntimeError(ENDED)

    gpu = fake_gpu(fail)
    plain = type(gpu).open

    def counted(self: Any, graph: Any, capture: bool = False) -> Any:
        session = plain(self, graph, capture)
        if capture:
            left.append(sum(one() is not None for one in opened))
            opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(type(gpu), "open", counted)
    gc.disable()
    try:
        session = open_decoder(bundle, ROWS, CAPACITY, gpu)
        step(session, [(0, 0, 3), (1, 0, 2)], [])
        with ExitStack() as stack:
            for left_to_come in reversed(range(others)):
                good[:] = [] if left_to_come else [1]
                pool = stack.enter_context(ThreadPoolExecutor(1))
                pool.submit(step, session, [(0, 3, 4), (1, 2, 9)], [0, 7]).result()  # a token and a prompt
        assert left == [0, 0]
    finally:
        gc.enable()
    session.close()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("BFCArena: Failed to allocate memory for requested buffer of size 12345", OutOfMemoryError),
        ("INVALID_ARGUMENT: Got invalid dimensions", EngineError),
    ],
)
def test_a_run_that_fails_by_itself_ends_no_capture(
    bundle: Bundle, logits: NDArray, said: str, error: type[EngineError]
) -> None:
    """The step fails alone, and captures when it comes again."""
    failures: list[str] = []

    def fail(io: Any, options: Any) -> None:
        if failures and options is not None:
            raise RuntimeError(failures.pop())

    gpu = fake_gpu(fail)
    session = open_decoder(bundle, ROWS, CAPACITY, gpu)
    step(session, [(0, 0, 3)], [2])
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            failures.append(said)
            with pytest.raises(error, match=said[-9:]):
                pool.submit(step, session, [(0, 3, 4)], [0]).result()
        found = pool.submit(step, session, [(0, 3, 4)], [0]).result()
    assert np.abs(found - logits[[3]]).max() < LIMIT and gpu.opened == [True] and not session.notes
    session.close()


def test_tries_are_for_one_capture(bundle: Bundle, logits: NDArray) -> None:
    """A server that runs for months keeps its graphs."""
    failures = Failures("1")
    gpu = fake_gpu(failures)
    session = open_decoder(bundle, ROWS, CAPACITY, gpu)
    step(session, [(0, 0, 3)], [2])
    for _ in range(2):
        failures.said = [ENDED] * (CAPTURE_TRIES - 1)
        with ThreadPoolExecutor(1) as pool:
            assert np.abs(pool.submit(step, session, [(0, 3, 4)], [0]).result() - logits[[3]]).max() < LIMIT
    assert gpu.opened == [True] * (1 + 2 * (CAPTURE_TRIES - 1)) and not session.notes
    session.close()


def test_an_interrupt_amid_a_capture_breaks_the_session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what follows would run, uncaptured as it believes, in a session that captures."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    failures = Failures("1")
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(failures))
    step(session, [(0, 0, 3)], [2])
    monkeypatch.setattr(module._log, "warning", interrupt)
    failures.said = [ENDED] * CAPTURE_TRIES
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(step, session, [(0, 3, 4)], [0]).result()
    with pytest.raises(EngineBrokenError, match="could not be opened again"):
        step(session, [(0, 3, 4)], [0])
    session.close()


def test_a_session_that_cannot_be_opened_again_is_broken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have taken the memory meanwhile."""
    failures = Failures("1")
    gpu = fake_gpu(failures)
    session = open_decoder(bundle, ROWS, CAPACITY, gpu)

    def full(*_: Any, **__: Any) -> Any:
        raise OutOfMemoryError("the weights do not fit")

    step(session, [(0, 0, 3)], [2])
    monkeypatch.setattr(type(gpu), "open", full)
    failures.said = [ENDED]
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            with pytest.raises(EngineBrokenError, match="could not be opened again.*the weights do not fit"):
                pool.submit(step, session, [(0, 3, 4)], [0]).result()
    session.close()


def test_memory_that_others_take_while_it_is_opened(bundle: Bundle) -> None:
    """Whoever loads is told what fits, as if it had been full at first."""

    failures = Failures("2")
    failures.said = [ENDED]
    gpu = fake_gpu(failures)
    plain = type(gpu).open

    def once(self: Any, graph: Any, capture: bool = False) -> Any:
        if self.opened:
            raise OutOfMemoryError("the weights do not fit")
        return plain(self, graph, capture)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(gpu), "open", once)
        with pytest.raises(OutOfMemoryError, match="do not fit") as caught:
            open_decoder(bundle, ROWS, CAPACITY, gpu)
    let_go(caught.value)
