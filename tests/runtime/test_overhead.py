"""What Python adds to ONNX Runtime's own call in a decode step, with caches that the weights have swept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.runtime.decoder import Decoder
from tests.conftest import MakeOnce, write_tiny_decoder

LIMIT = 150e-6  # seconds
TRIES = 60  # machines are noisy: once within the limit is enough


def overheads(decoder: Decoder) -> list[float]:
    """Seconds per greedy step outside ``run_with_iobinding``, until one is within the limit."""
    session: Any = decoder._session
    run, spent = session._session.run_with_iobinding, [0.0]

    def timed(binding: Any) -> None:
        start = time.perf_counter()
        run(binding)
        spent[0] += time.perf_counter() - start

    def outside(steps: int) -> float:
        spent[0], start = 0.0, time.perf_counter()
        decoder.generate("The capital of France is", max_new_tokens=steps, do_sample=False, eos_token_id=[])
        return time.perf_counter() - start - spent[0]

    class Timed:
        run_with_iobinding = staticmethod(timed)

    outside(10)  # binds what the steps need
    whole, session._session = session._session, Timed()
    tries: list[float] = []
    try:  # what a call costs once, its prompt included, drops out of the difference
        while len(tries) < TRIES and min(tries, default=1) > LIMIT:
            tries.append((outside(60) - outside(10)) / 50)
    finally:
        session._session = whole
    return tries


@pytest.fixture(scope="module")
def wide_vocabulary(made_once: MakeOnce) -> Path:
    """A small model with the vocabulary of Qwen2.5, 151,936 tokens: 155 MB of weights pass per step."""
    source = made_once(
        "wide_vocabulary_source", lambda out: write_tiny_decoder(out, vocab_size=151936, hidden_size=256)
    )
    return made_once("wide_vocabulary", lambda out: accel.export(source, out))


@pytest.mark.parametrize("bundle", ["smollm2_bundle", "wide_vocabulary"])
def test_python_per_decode_step(bundle: str, request: pytest.FixtureRequest) -> None:
    with accel.load(request.getfixturevalue(bundle), engine="ort-cpu", capacity=512, max_batch=1) as decoder:
        assert min(overheads(decoder)) <= LIMIT
