"""The decoder session's own logic, on Triton's interpreter: places, steps ahead, rows and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import INTERPRETED, open_device
from accel.engines.kv_cache import CacheShape
from accel.engines.session import GreedySession
from accel.errors import BundleError, EngineBrokenError, EngineError
from accel.runtime.sampling import Sampler, SamplingParams
from accel.runtime.sequence import Sequence
from accel.runtime.slots import SlotLoop, SlotOptions
from accel.spec import ArchSpec
from tests.engines.cuda.steps import CAPACITY, count_runs, inputs

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes on masked lanes
]


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_steps_and_logits_of_any_tokens(session: CudaDecoderSession, reference: Any) -> None:
    for step in (
        inputs({0: [5, 6, 7, 8], 2: [9, 10]}, {}, wanted=[0, 2, 3, 5]),
        inputs({0: [11], 2: [12]}, {0: 4, 2: 2}),
        inputs({1: [13, 14, 15]}, {}, wanted=[]),
        inputs({0: [16], 1: [17], 2: [18]}, {0: 5, 1: 3, 2: 3}),
    ):
        ours, theirs = session.step(step), np.array(reference.step(step))
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        if len(theirs):
            same(ours, theirs)


def test_greedy_is_the_largest_logit_and_one_step_ahead(
    session: CudaDecoderSession, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(session, GreedySession)
    step = inputs({0: [5, 6, 7]}, {})
    token, past = session.greedy(step), 3
    assert token.tokens[0] == reference.step(step)[0].argmax()
    runs = count_runs(session, monkeypatch)
    for _ in range(4):
        step = inputs({0: token.tokens.tolist()}, {0: past})
        expected = reference.step(step)[0]
        token, past = session.greedy(step), past + 1
        assert token.tokens[0] == expected.argmax()
        assert token.logits[0] == pytest.approx(expected.max(), rel=1e-4)
    # the place's first run, in which every row sits out; the first step; and four steps ahead
    assert len(runs) == 1 + 1 + 4


def test_a_step_that_nobody_expected(session: CudaDecoderSession, reference: Any) -> None:
    """Another token than the best one, a row that joins, a row that leaves: what ran ahead is forgotten."""
    for step in (inputs({0: [5, 6, 7], 1: [8, 9]}, {}), inputs({0: [10], 1: [11]}, {0: 3, 1: 2})):
        session.greedy(step)
        reference.step(step)
    for step in (
        inputs({0: [12], 1: [13]}, {0: 4, 1: 3}),
        inputs({1: [14]}, {1: 4}),
        inputs({2: [15, 16]}, {}),
        inputs({0: [17], 1: [18], 2: [19]}, {0: 5, 1: 5, 2: 2}),
        inputs({0: [20]}, {0: 6}),
    ):
        same(session.greedy(step).logits, reference.step(step).max(1))
        same(session.step(step), np.array(reference.step(step)))  # the same step again: the cache is as it was


def test_no_step_beyond_the_capacity(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.step(inputs({0: list(range(3, 3 + CAPACITY - 2))}, {}))
    session.greedy(inputs({0: [5]}, {0: CAPACITY - 2}))
    runs = count_runs(session, monkeypatch)
    assert np.isfinite(session.greedy(inputs({0: [6]}, {0: CAPACITY - 1})).logits).all()
    assert len(runs) <= 1  # this step at most, none behind it


def test_copied_rows(session: CudaDecoderSession, reference: Any) -> None:
    step = inputs({0: [5, 6, 7, 8]}, {})
    for each in (session, reference):
        each.step(step)
        each.copy_row(0, 2, 3)
    step = inputs({2: [9]}, {2: 3})
    same(session.step(step), np.array(reference.step(step)))


def test_generation_through_the_loop(session: CudaDecoderSession, reference: Any, graph: Any) -> None:
    """Sequences that join and leave: greedy on the device, and one that looks at its logits."""
    vocab = graph[1].vocab_size

    def generate(engine: Any) -> list[list[int]]:
        loop = SlotLoop(engine, SlotOptions(chunk=6))
        made = []
        for place, length in enumerate((5, 9, 3, 7)):
            params = SamplingParams(repetition_penalty=1.3) if place == 2 else SamplingParams()
            prompt = np.arange(3, 3 + length) + 7 * place
            made.append(Sequence(prompt, Sampler(params, vocab), max_new_tokens=4 + place))
            loop.submit(made[-1])
        while loop.has_work:
            loop.step()
        assert all(sequence.error is None for sequence in made)
        return [sequence.new_ids for sequence in made]

    assert generate(session) == generate(reference)


def test_nan_ends_the_sequence_alone(session: CudaDecoderSession, graph: Any) -> None:
    loop = SlotLoop(session)
    session._caches[0][0][0].fill_(float("nan"))  # row 0 alone sees it, behind its first token
    sequences = [Sequence(np.arange(3, 8), Sampler(SamplingParams(), graph[1].vocab_size), 3) for _ in range(2)]
    for sequence in sequences:
        loop.submit(sequence)
    loop.step()
    session._caches[0][0][0].fill_(float("nan"))
    while loop.has_work:
        loop.step()
    assert isinstance(sequences[0].error, EngineError) and "nan" in str(sequences[0].error)
    assert sequences[1].error is None and len(sequences[1].new_ids) == 3


def test_failures(session: CudaDecoderSession, graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session._executor, "run", fail)
    with pytest.raises(EngineBrokenError, match="illegal memory access"):
        session.step(inputs({0: [5, 6]}, {}))

    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(session._executor, "run", full)
    with pytest.raises(EngineError, match="memory is full") as info:
        session.step(inputs({0: [5, 6]}, {}))
    assert not isinstance(info.value, EngineBrokenError)
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.step(inputs({0: [5]}, {}))


@pytest.mark.parametrize("broken", [False, True])
def test_closing_waits_for_the_step_that_ran_ahead(
    broken: bool, session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes its tokens to page-locked memory, which someone else may get."""
    session.greedy(inputs({0: [5]}, {}))
    places = []

    def synchronize() -> None:
        places.append(len(session._decodes))
        if broken:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(session._device, "synchronize", synchronize)
    session.close()
    assert places == [1] and not session._decodes


def test_a_damaged_graph(graph: tuple[Path, ArchSpec], tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(graph[0].read_bytes())  # without its weights
    with pytest.raises(BundleError, match="cannot be read"):
        CudaDecoderSession(
            tmp_path / "graph.onnx", graph[1], "fp32", CacheShape(1, 16), open_device(), torch.float32
        )  # fmt: skip
