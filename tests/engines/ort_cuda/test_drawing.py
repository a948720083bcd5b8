"""Tokens drawn on the device from ONNX Runtime's logits: the host's own, beside greedy rows, or drawn on the host."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel.bundle import Bundle
from accel.engines.cuda import drawing as kernels
from accel.engines.cuda.device import INTERPRETED, Device
from accel.engines.cuda.drawing import Drawer
from accel.engines.ort_cuda import decoder, drawing
from accel.engines.ort_cuda.decoder import OrtCudaDecoderSession
from accel.engines.session import Draws, SamplingSession, StepInputs
from accel.errors import EngineBrokenError, EngineError, EngineUnavailableError
from accel.runtime.sampling import Sampler
from accel.runtime.stepping import Stepper
from accel.variants import add_variant
from tests.engines.cuda.steps import CAPACITY, CASES, GREEDY, HOT, MIXED, ROWS, WithoutSampling, generate, inputs
from tests.engines.ort_cuda.stand_in import CPU, fake_gpu, open_decoder

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes on masked lanes
]


@pytest.fixture(scope="module")
def bundle(tiny_decoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(tiny_decoder_bundle, tmp_path_factory.mktemp("drawing") / "bundle")
    return add_variant(folder, "fp32", target="ort-cuda", check=False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Drawer]:
    """Sessions draw in Triton's interpreter; returns what was opened."""
    opened: list[Drawer] = []

    def open_drawer(address: int, rows: int, vocab_size: int, index: int) -> Drawer:
        opened.append(Drawer(address, rows, vocab_size, Device(torch.device("cpu"))))
        return opened[-1]

    monkeypatch.setattr(decoder, "open_drawer", open_drawer)
    return opened


@pytest.fixture
def session(bundle: Bundle, interpreted: list[Drawer]) -> Any:
    opened = open_decoder(bundle, ROWS, CAPACITY, fake_gpu())
    assert len(interpreted) == 1 and opened.notes == []
    yield opened
    opened.close()


def draws_of(*samplers: Sampler) -> Draws:
    table = np.array([sampler.peek() for sampler in samplers])
    return Draws(table[:, :4], table[:, 4:])


def draw(session: OrtCudaDecoderSession, step: StepInputs, *samplers: Sampler) -> list[int]:
    """A step's tokens, which are those that the samplers pick from its logits."""
    found = session.sample(step, draws_of(*samplers))
    logits = session.step(step).copy()
    tokens = [sampler.pick(row, ()) for sampler, row in zip(samplers, logits, strict=True)]
    assert found.tokens.dtype == np.int64 and found.tokens.tolist() == tokens
    assert found.logits.dtype == np.float32
    np.testing.assert_allclose(found.logits, logits[range(len(tokens)), tokens], atol=1e-5)
    return tokens


def test_drawn_tokens_are_the_hosts(session: OrtCudaDecoderSession) -> None:
    """Of prompts and of steps, wanted in another order than the rows'; a greedy row beside drawn ones; a gap."""
    assert isinstance(session, SamplingSession) and Stepper(session)._sample is not None
    hot, greedy, mixed = (Sampler(params, session.vocab_size, 1) for params in (HOT, GREEDY, MIXED))
    third, first, second = draw(session, inputs({0: [5, 6, 7], 1: [8, 9], 2: [3]}, {}, [5, 2, 4]), mixed, hot, greedy)
    for past in range(4):
        step = inputs({0: [first], 1: [second], 2: [third]}, {0: 3 + past, 1: 2 + past, 2: 1 + past})
        first, second, third = draw(session, step, hot, greedy, mixed)
    gap = inputs({0: [first], 2: [third]}, {0: 7, 2: 5})
    draw(session, gap, hot, mixed)
    assert session.sample(inputs({1: [4, 5, 6]}, {}, []), draws_of(hot)).tokens.shape == (0,)  # a chunk of a prompt


def test_more_tokens_than_a_run_gives(session: OrtCudaDecoderSession) -> None:
    count = decoder.MAX_LOGITS + 5
    samplers = [Sampler((HOT, GREEDY)[place % 2], session.vocab_size, place) for place in range(count)]
    tokens = np.random.default_rng(0).integers(0, 250, count).tolist()
    draw(session, inputs({1: tokens}, {}, list(range(count))), *samplers)


def test_seeded_generation_is_every_engines(session: OrtCudaDecoderSession) -> None:
    """Drawn and greedy rows, and those that go the host's way for a while, or always, in whose steps all rows go."""
    assert generate(session, CASES, late=2) == generate(WithoutSampling(session), CASES, late=2)


def test_every_batch_is_drawn_at_opening(
    bundle: Bundle, interpreted: list[Drawer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no request waits for a compiler."""
    rows: list[int] = []
    real = kernels.sample
    monkeypatch.setattr(kernels, "sample", lambda *args, **more: (rows.append(len(args[1])), real(*args, **more))[1])
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu())
    assert rows == [1, 2, 3]
    session.close()


def refused(*_: Any) -> Any:
    raise EngineUnavailableError("the GPU is sm75; the kernels need sm80 or later")


def test_where_the_kernels_do_not_run_the_host_draws(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "open_drawer", refused)
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu())
    assert len(session.notes) == 1 and "do not run here: the GPU is sm75" in session.notes[0]
    assert Stepper(session)._sample is None and Stepper(session)._greedy is not None
    assert generate(session, CASES[:2]) == generate(WithoutSampling(session), CASES[:2])
    session.close()


def test_on_the_cpu_provider_the_host_draws(bundle: Bundle) -> None:
    session = open_decoder(bundle, ROWS, CAPACITY, CPU)
    assert Stepper(session)._sample is None and session.notes == []
    session.close()


def test_a_closed_session_refuses(bundle: Bundle, interpreted: list[Drawer]) -> None:
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu())
    space, draws = weakref.ref(interpreted[0]._best), draws_of(Sampler(HOT, session.vocab_size))
    session.close()
    session.close()
    assert space() is None, "its memory is free"
    with pytest.raises(EngineError, match="closed"):
        session.sample(inputs({0: [5, 6]}, {}), draws)


def failing(message: str) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    return fail


def test_kernels_that_do_not_compile(
    bundle: Bundle, interpreted: list[Drawer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "sample", failing("Failed to find C compiler"))
    session = open_decoder(bundle, ROWS, CAPACITY, fake_gpu())
    assert Stepper(session)._sample is None and interpreted[0]._space is None
    said = "drawn on the host, as the kernels for that do not run here: Failed to find C compiler"
    assert session.notes[0].endswith(said)
    session.close()


def test_a_device_that_fails_while_it_draws_breaks_the_session(
    session: OrtCudaDecoderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, hot = inputs({0: [5, 6]}, {}), Sampler(HOT, session.vocab_size)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "sample", failing("CUDA error: an illegal memory access was encountered"))
        with pytest.raises(EngineBrokenError, match="illegal memory access"):
            session.sample(step, draws_of(hot))
    with pytest.raises(EngineBrokenError, match="illegal memory access"):
        session.step(step)


def test_no_memory_for_a_draw_fails_that_step_alone(
    session: OrtCudaDecoderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    step, hot = inputs({0: [5, 6]}, {}), Sampler(HOT, session.vocab_size)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "sample", full)
        with pytest.raises(EngineError, match="memory is full"):
            session.sample(step, draws_of(hot))
    draw(session, step, hot)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineUnavailableError, match="NVIDIA"):  # there is none here
        drawing.open_drawer(0, 1, 10, 0)
    monkeypatch.setattr(drawing, "unfit_gpu", lambda: None)
    with pytest.raises(EngineUnavailableError, match="2,000,000 tokens, the kernels take 1,048,576"):
        drawing.open_drawer(0, 1, 2_000_000, 0)
    def broken() -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(drawing, "unfit_gpu", broken)
    with pytest.raises(EngineUnavailableError, match="ImportError: libcudart"):
        drawing.open_drawer(0, 1, 10, 0)
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailableError, match="torch and triton missing"):
        drawing.open_drawer(0, 1, 10, 0)
