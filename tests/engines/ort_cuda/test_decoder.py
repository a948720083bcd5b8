"""The decoder session's own logic on the CPU provider: bindings, padding, ragged rows, copies, faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.engines.gpu_memory import OutOfMemoryError
from accel.engines.ort_cuda import decoder as module
from accel.engines.ort_cuda.decoder import OrtCudaDecoderSession, halves
from accel.engines.padded import PaddedStep
from accel.engines.session import GreedySession
from accel.errors import BundleError, EngineBrokenError, EngineError
from tests.engines.captures import DISTURBED
from tests.engines.ort_cuda.stand_in import CPU, fake_gpu, open_decoder
from tests.engines.ort_cuda.steps import CAPACITY, IDS, LIMIT, ROWS, inputs, step


@pytest.fixture(params=["plain", "captured"])
def session(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[OrtCudaDecoderSession]:
    opened = open_decoder(bundle, ROWS, CAPACITY, CPU if request.param == "plain" else fake_gpu())
    yield opened
    opened.close()


def test_info(session: OrtCudaDecoderSession) -> None:
    assert session.info.name == "ort-cuda" and session.info.variant == "fp32" and session.info.device == "cpu:0"
    assert (session.max_batch, session.capacity, session.mixed_steps) == (ROWS, CAPACITY, True)


def test_a_whole_prompt(session: OrtCudaDecoderSession, logits: NDArray) -> None:
    """More logits than one run gives."""
    found = step(session, [(1, 0, 48)], list(range(48)))
    assert found.dtype == np.float32 and np.abs(found - logits).max() < LIMIT


def test_rows_at_different_phases_share_a_step(session: OrtCudaDecoderSession, logits: NDArray) -> None:
    assert step(session, [(1, 0, 5)], []).shape == (0, session.vocab_size)
    mixed = step(session, [(0, 0, 3), (1, 5, 12), (2, 0, 9)], [2, 9, 18])
    assert np.abs(mixed - logits[[2, 11, 8]]).max() < LIMIT
    gaps = step(session, [(0, 3, 4), (2, 9, 10)], [0, 1])  # row 1 sits out
    assert np.abs(gaps - logits[[3, 9]]).max() < LIMIT
    assert np.abs(step(session, [(1, 12, 13)], [0]) - logits[[12]]).max() < LIMIT
    every = step(session, [(0, 4, 5), (1, 13, 14), (2, 10, 11)], [2, 0, 1])  # wanted in another order
    assert np.abs(every - logits[[10, 4, 13]]).max() < LIMIT
    assert np.abs(step(session, [(2, 11, 12)], [0]) - logits[[11]]).max() < LIMIT  # a run from row 2 on


def test_tokens_without_logits(session: OrtCudaDecoderSession, logits: NDArray) -> None:
    assert isinstance(session, GreedySession)
    best = session.greedy(inputs([(0, 0, 7), (2, 0, 1)], [6, 7]))
    assert best.tokens.dtype == np.int64 and best.tokens.tolist() == logits[[6, 0]].argmax(-1).tolist()
    assert best.logits.dtype == np.float32 and np.abs(best.logits - logits[[6, 0]].max(-1)).max() < LIMIT


def test_neighbours_prompts_run_side_by_side(session: OrtCudaDecoderSession, logits: NDArray) -> None:
    runs = list(session._padder.split(inputs([(0, 0, 9), (1, 0, 12), (2, 0, 10)], [8, 20, 30])))
    assert [run.input_ids.shape for run in runs] == [(3, 12)]
    found = step(session, [(0, 0, 9), (1, 0, 12), (2, 0, 10)], [30, 8, 20])
    assert np.abs(found - logits[[9, 8, 11]]).max() < LIMIT
    every = step(session, [(0, 9, 10), (1, 12, 13), (2, 10, 11)], [0, 1, 2])
    assert np.abs(every - logits[[9, 12, 10]]).max() < LIMIT


def test_a_row_is_used_again_and_a_step_repeated(session: OrtCudaDecoderSession, logits: NDArray) -> None:
    step(session, [(0, 0, 20)], [])
    assert np.abs(step(session, [(0, 0, 6)], [5]) - logits[[5]]).max() < LIMIT
    for _ in range(2):
        assert np.abs(step(session, [(0, 6, 8)], [1]) - logits[[7]]).max() < LIMIT


def test_copied_rows_go_their_own_way(session: OrtCudaDecoderSession, logits: NDArray) -> None:
    step(session, [(2, 0, 16)], [])
    session.copy_row(2, 0, 10)
    found = step(session, [(0, 10, 14), (2, 16, 17)], [3, 4])
    assert np.abs(found - logits[[13, 16]]).max() < LIMIT
    assert np.abs(step(session, [(0, 14, 15), (2, 17, 18)], [0, 1]) - logits[[14, 17]]).max() < LIMIT


def test_decoding_goes_through_the_same_bindings_and_memory(session: OrtCudaDecoderSession, logits: NDArray) -> None:
    pointers = session.cache_pointers()
    step(session, [(0, 0, 4)], [])
    step(session, [(0, 4, 5)], [0])
    kept = dict(session._kept)
    for place in range(5, 48):
        assert np.abs(step(session, [(0, place, place + 1)], [0]) - logits[[place]]).max() < LIMIT
    assert session._kept == kept and session.cache_pointers() == pointers


def test_long_prompts_run_in_chunks(bundle: Bundle, logits: NDArray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 10)
    session = open_decoder(bundle, ROWS, CAPACITY)
    assert np.abs(step(session, [(0, 0, 48)], [3, 47]) - logits[[3, 47]]).max() < LIMIT
    session.close()


def test_a_closed_session_refuses(session: OrtCudaDecoderSession) -> None:
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        step(session, [(0, 0, 2)], [1])
    with pytest.raises(EngineError, match="closed"):
        session.copy_row(0, 1, 1)


def test_a_graph_of_another_target(bundle: Bundle) -> None:
    from accel.engines.kv_cache import CacheShape

    graph = bundle.file(bundle.graph("fp32", "ort-cpu").file)
    with pytest.raises(BundleError, match=r"lacks input_ids, step_shape.*accel quantize|lacks step_shape"):
        OrtCudaDecoderSession(graph, bundle.manifest, "fp32", CPU, CacheShape(1, 8))


# Faults


def test_a_copy_that_was_refused_is_made_again(bundle: Bundle, logits: NDArray) -> None:
    """CUDA refuses it while another thread captures; the run that is tried again needs this step's token."""
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu())
    step(session, [(0, 0, 3)], [2])
    step(session, [(0, 3, 4)], [0])
    binding = session._kept[0, 1]
    real, copied = binding._inputs["input_ids"], list[list[int]]()

    class Refuses:
        def update_inplace(self, array: NDArray) -> None:
            copied.append(array.ravel().tolist())
            if len(copied) == 1:
                raise RuntimeError(DISTURBED["legacy stream"])
            real.update_inplace(array)

    binding._inputs["input_ids"] = Refuses()
    assert np.abs(step(session, [(0, 4, 5)], [0]) - logits[[4]]).max() < LIMIT
    assert copied == [[IDS[4]]] * 2
    session.close()


class Limited:
    """Fails runs of more tokens than fit."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.runs = tokens, list[int]()

    def __call__(self, io: Any, options: Any) -> None:
        if not hasattr(self, "session"):
            return
        width = self.session.width
        self.runs.append(width)
        if width > self.tokens:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 12345")


def watch(session: OrtCudaDecoderSession, limited: Limited) -> None:
    """Tells ``limited`` how many tokens each run has."""
    bind = session._bind

    def note(run: PaddedStep, feeds: Any) -> Any:
        limited.session = type("Run", (), {"width": run.input_ids.shape[1]})  # type: ignore[attr-defined]
        return bind(run, feeds)

    session._bind = note  # type: ignore[method-assign]


def test_a_prompt_that_does_not_fit_runs_in_smaller_chunks(
    bundle: Bundle, logits: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_TOKENS", 4)
    limited = Limited(12)
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(limited))
    watch(session, limited)
    assert np.abs(step(session, [(1, 0, 48)], [0, 30, 47]) - logits[[0, 30, 47]]).max() < LIMIT
    assert limited.runs == [48, 48, 24, 24, 12, 12, 24, 24, 12, 12], "what fails might have met a capture"
    assert np.abs(step(session, [(1, 20, 21)], [0]) - logits[[20]]).max() < LIMIT
    session.close()


def test_a_prompt_that_does_not_fit_at_all_fails_alone(
    bundle: Bundle, logits: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_TOKENS", 4)
    limited = Limited(3)
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(limited))
    watch(session, limited)
    with pytest.raises(OutOfMemoryError, match="ran out of device memory.*smaller batch"):
        step(session, [(0, 0, 48)], [47])
    assert np.abs(step(session, [(1, 0, 3)], [2]) - logits[[2]]).max() < LIMIT, "others go on"
    session.close()


def test_a_cuda_error_breaks_the_session(bundle: Bundle) -> None:
    broken: list[bool] = []

    def fail(io: Any, options: Any) -> None:
        if broken:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(fail))
    step(session, [(0, 0, 3)], [2])
    broken.append(True)
    with pytest.raises(EngineBrokenError, match="illegal memory access"):
        step(session, [(0, 3, 4)], [0])  # a captured run: the model is not loaded again amid requests
    assert session.notes == []
    broken.clear()
    for act in (lambda: step(session, [(0, 0, 4)], [3]), lambda: session.copy_row(0, 1, 2)):
        with pytest.raises(EngineBrokenError, match="illegal memory access"):
            act()  # type: ignore[no-untyped-call]
    session.close()


def test_another_error_is_this_steps_alone(bundle: Bundle) -> None:
    failing: list[bool] = []

    def fail(io: Any, options: Any) -> None:
        if failing:
            raise RuntimeError("Non-zero status code returned")

    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu(fail))
    failing.append(True)
    with pytest.raises(EngineError, match="Non-zero status code") as caught:
        step(session, [(0, 0, 4)], [3])
    assert not isinstance(caught.value, EngineBrokenError)
    failing.clear()
    step(session, [(0, 0, 4)], [3])
    session.close()


def test_halves_of_several_rows() -> None:
    ids = np.arange(12).reshape(3, 4)
    run = PaddedStep(1, ids, ids + 20, np.zeros(3, np.int64), np.array([3, 6, 11]), np.array([2, 0, 1]))
    first, second = halves(run)
    assert (first.first, first.input_ids.tolist()) == (1, [[0, 1, 2, 3]])
    assert (first.logits_positions.tolist(), first.wanted.tolist()) == ([3], [2])
    assert (second.first, second.position_ids.tolist()) == (2, [[24, 25, 26, 27], [28, 29, 30, 31]])
    assert (second.logits_positions.tolist(), second.wanted.tolist()) == ([2, 7], [0, 1])


def test_halves() -> None:
    run = PaddedStep(2, np.arange(5)[None], np.arange(5)[None] + 7, np.array([7]), np.array([0, 3]), np.array([1, 0]))
    first, second = halves(run)
    assert first.input_ids.tolist() == [[0, 1]] and second.input_ids.tolist() == [[2, 3, 4]]
    assert second.position_ids.tolist() == [[9, 10, 11]] and (first.write_index[0], second.write_index[0]) == (7, 9)
    assert (first.logits_positions.tolist(), first.wanted.tolist()) == ([0], [1])
    assert (second.logits_positions.tolist(), second.wanted.tolist()) == ([1], [0])
    empty, _ = halves(PaddedStep(0, run.input_ids, run.position_ids, run.write_index, np.array([4]), np.array([0])))
    assert (empty.logits_positions.tolist(), empty.wanted.tolist()) == ([0], [-1])
