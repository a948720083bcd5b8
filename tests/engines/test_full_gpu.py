"""A GPU that is really full: at load the next engine runs, or what fits is said; a long prompt runs in parts.

Nothing else may use the GPU meanwhile, workers of the same run neither.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.capturing import is_disturbed
from accel.engines.cuda.device import INTERPRETED, open_device
from accel.engines.cuda.replay import _LATER, Replay
from accel.engines.session import SessionOptions, StepInputs
from accel.errors import CapacityError, EngineBrokenError, EngineError, EngineUnavailableError
from accel.machine import has_nvidia_device
from tests.engines.cuda.ways import drawn_ways
from tests.engines.ort_cuda.gpu import needs_gpu as needs_onnxruntime

needs_kernels = pytest.mark.skipif(INTERPRETED or not has_nvidia_device(), reason="needs an NVIDIA GPU")
both = pytest.mark.parametrize(
    "engine", [pytest.param("cuda", marks=needs_kernels), pytest.param("ort-cuda", marks=needs_onnxruntime)]
)
__all__ = ["drawn_ways"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="takes the whole GPU: run it without workers"),
]
MIB = 1 << 20
STEP = 2 * MIB  # what the driver hands out
# What a recording takes; PyTorch 2.12 and 2.13 keep that for ever if it fails (PyTorch's #190348).
PIECE = 256 * MIB if torch.__version__ < "2.12" else 2 * MIB
PROMPT, CAPACITY, SHORT = 8000, 8192, 64  # tokens; their hidden layer takes 64 MiB, what stands before it 16
# Lengths that run before, since libraries load kernels when they first run, and bytes that are left then; PyTorch may
# have tens of MiB more in pieces that others share. ONNX Runtime keeps the memory that its runs took, and runs 4,096
# tokens at most, of which the hidden layer takes 32 MiB twice.
ROOM = {"cuda": ((SHORT, PROMPT // 2, PROMPT // 4, PROMPT // 8), 32 * MIB), "ort-cuda": ((SHORT,), 24 * MIB)}
HOLD = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""
LOAD = """
import json, sys, accel
with accel.load(sys.argv[1]) as model:
    tokens = model.generate([[5, 6, 7]], max_new_tokens=4, eos_token_id=[])[0].ids
    print(json.dumps([model.engine.name, len(tokens), {one.engine: one.reason for one in model.fallbacks}]))
"""


@pytest.fixture(scope="module")
def bundle(made_once: Callable[..., Path]) -> Path:
    """A decoder whose hidden layer is wide, with a graph for each engine."""

    def make(out: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
            num_key_value_heads=4, max_position_embeddings=16384,
        )  # fmt: skip
        accel.export(LlamaForCausalLM(config).eval(), out, {"parity": {"enabled": False}}, show_progress=False)
        for target in ("cuda", "ort-cuda"):
            accel.add_variant(out, "fp16", target=target, check=False, show_progress=False)

    return made_once("wide-llama", make)


def free_memory() -> int:
    """Bytes, once what is dropped was given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


@contextmanager
def filled(left: int) -> Iterator[None]:
    """All but about so many bytes of the GPU are taken meanwhile."""
    size, held = (free_memory() - left) // STEP * STEP, None
    while held is None:  # the last few pieces may lie apart
        try:
            held = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            size -= STEP
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


def step_of(count: int) -> StepInputs:
    """The first tokens of a prompt in row 0; its last one's logits are wanted."""
    ids = np.random.default_rng(0).integers(3, 2000, PROMPT)[:count]
    lengths = np.array([count], np.int32)
    return StepInputs(ids, np.arange(count), lengths, 0 * lengths, np.array([count - 1]))


def open_engine(bundle: Path, engine: str) -> Any:
    options = SessionOptions(capacity=CAPACITY, max_batch=1)
    return open_session(Bundle.open(bundle), engine=engine, variant="fp16", options=options).session


def halvings(session: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """Counts how often a step was halved from now on."""
    if session.info.name == "cuda":
        return lambda: sum("memory is full" in record.message for record in caplog.records)
    from accel.engines.ort_cuda import decoder

    calls: list[int] = []
    real = decoder.halves
    monkeypatch.setattr(decoder, "halves", lambda run: (calls.append(1), real(run))[1])
    return lambda: len(calls)


@both
def test_a_long_prompt_runs_in_parts(
    engine: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_engine(bundle, engine)
    whole, short = (first.step(step_of(count)).copy() for count in (PROMPT, SHORT))
    first.close()
    del first
    session = open_engine(bundle, engine)
    before, left = ROOM[engine]
    for count in before:
        session.step(step_of(count))
    halved = halvings(session, monkeypatch, caplog)
    with filled(left), caplog.at_level(logging.WARNING, "accel"):
        found = session.step(step_of(PROMPT)).copy()
    assert halved() > 0
    assert np.abs(found - whole).max() <= 2e-2 * np.abs(whole).max()
    with filled(0):
        try:
            found = session.step(step_of(PROMPT)).copy()
            assert np.abs(found - whole).max() <= 2e-2 * np.abs(whole).max()
        except EngineError as error:
            assert not isinstance(error, EngineBrokenError) and "memory" in str(error)
    assert np.abs(session.step(step_of(SHORT)) - short).max() <= 2e-2 * np.abs(short).max(), "it goes on"
    session.close()


@both
def test_what_fits_is_said_and_does(engine: str, bundle: Path) -> None:
    with filled(3072 * MIB):
        with pytest.raises(CapacityError, match="Ask for a capacity of at most") as caught:
            accel.load(bundle, engine=engine, capacity=16384, max_batch=256)
        said = re.search(r"a capacity of at most ([\d,]+) with max_batch 256", str(caught.value))
        assert said is not None
        with accel.load(bundle, engine=engine, capacity=int(said[1].replace(",", "")), max_batch=256) as model:
            assert len(model.generate([[5, 6, 7]], max_new_tokens=4, eos_token_id=[])[0].ids) == 4


@both
def test_a_closed_model_leaves_its_memory_to_others(engine: str, bundle: Path) -> None:
    """To other engines, and other processes."""
    open_engine(bundle, engine).close()  # the libraries keep their own
    before = free_memory()
    options = SessionOptions(capacity=16384, max_batch=16)  # 512 MiB of cache
    session: Any = open_session(Bundle.open(bundle), engine=engine, variant="fp16", options=options).session
    assert before - free_memory() > 500 * MIB
    session.close()
    assert before - torch.cuda.mem_get_info()[0] < 32 * MIB


@needs_kernels
def test_a_recording_that_another_thread_ends() -> None:
    """It is made later, and what it had is free again."""
    disturbed, results = threading.Event(), torch.zeros(MIB, device="cuda")
    others: list[Exception] = []

    def run() -> None:
        results.add_(torch.ones(PIECE, dtype=torch.uint8, device="cuda")[:MIB])
        if torch.cuda.is_current_stream_capturing() and not disturbed.is_set():
            disturbed.set()
            other = threading.Thread(target=wait_for_all)
            other.start()
            other.join()

    def wait_for_all() -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            others.append(error)

    before, replay = free_memory(), Replay(open_device(), run)
    replay.run()
    assert before - free_memory() < 32 * MIB
    replay.run()
    assert disturbed.is_set() and is_disturbed(others[0])
    assert before - free_memory() < 32 * MIB
    for _ in range(_LATER[0]):
        assert replay._graph is None
        replay.run()
    assert replay._graph is not None and replay.failure is None and results[-1].item() == 2 + _LATER[0]
    del replay
    assert before - free_memory() < 32 * MIB


@both
def test_no_room_for_weights(engine: str, bundle: Path) -> None:
    with filled(32 * MIB), pytest.raises(EngineUnavailableError, match="weights take|memory"):
        accel.load(bundle, engine=engine)
    with accel.load(bundle, engine=engine) as model:
        assert model.engine.name == engine


@needs_kernels
@needs_onnxruntime
def test_another_process_has_it_all(bundle: Path) -> None:
    """A fresh process, in which not even CUDA starts, goes on where no GPU is needed, and says why."""
    free_memory()
    paths = os.pathsep.join(filter(None, sys.path))  # also of a checkout that is not installed
    options: dict[str, Any] = {"text": True, "env": {**os.environ, "PYTHONPATH": paths}}
    hold = [sys.executable, "-c", HOLD, str(16 * MIB)]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        load = [sys.executable, "-c", LOAD, str(bundle)]
        done = subprocess.run(load, capture_output=True, timeout=300, **options)
        holder.stdin.close()
    assert done.returncode == 0, done.stderr
    name, count, passed_over = json.loads(done.stdout.splitlines()[-1])
    assert count == 4 and name in ("ort-cpu", "torch"), (name, passed_over)
    assert all("memory" in passed_over[engine].lower() for engine in ("cuda", "ort-cuda")), passed_over
