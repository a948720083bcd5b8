"""Opening a plan: what is refused, with which words; and what happens when something breaks later."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from accel.bundle import Bundle
from accel.engines import OpenedSession
from accel.engines.session import StepInputs
from accel.engines.tensorrt.adapter import load_flavour
from accel.engines.tensorrt.engine import LoadedEngine
from accel.engines.tensorrt.memory import Device, DeviceMemoryError
from accel.errors import AccelError, CapacityError, EngineBrokenError, EngineError, EngineUnavailableError, InputError
from accel.runtime.decoder import Decoder
from tests.engines.tensorrt.built import BuiltEngine
from tests.engines.tensorrt.conftest import CAPACITY, DECODE
from tests.engines.tensorrt.double import World

Bundles, Opener, Built = Callable[[str], Bundle], Callable[..., Any], Callable[..., BuiltEngine]
FLOAT = ir.DataType.FLOAT
ONE = StepInputs(np.array([5]), np.array([0]), np.array([1, 0, 0], np.int32), np.zeros(3, np.int32), np.array([0]))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"target": "tensorrt"}, "is for tensorrt, not rtx"),
        ({"version": "1.6.0.1"}, r"built by TensorRT-RTX 1\.6\.0\.1, 1\.7.* is installed"),
        ({"sms": ("sm89", "sm120")}, "is for sm89, sm120, this GPU is sm86.*--sm sm86"),
        ({"size": 7}, "truncated or altered"),
        ({"sha256": "0" * 64}, "altered: its sha256"),
        ({"sources": {"canonical.onnx": "0" * 64}}, "another bundle: canonical.onnx differs"),
        ({"profiles": ("prefill",)}, "has 2 profiles, its manifest names 1"),
    ],
)
def test_an_engine_for_something_else(
    facts: dict[str, Any], message: str, open_tiny: Opener, built_engine: Built, world: World
) -> None:
    with pytest.raises(EngineUnavailableError, match=message):
        open_tiny("llama", facts=built_engine("llama").facts(**facts), max_batch=3)
    assert world.gpu.used == 0 and not world.contexts


def test_a_portable_engine_runs_on_other_gpus(open_tiny: Opener, built_engine: Built) -> None:
    facts = built_engine("llama").facts(sms=("sm89",), compatibility="ampere+")
    assert open_tiny("llama", facts=facts, max_batch=3).max_batch == 3


def test_the_bundle_it_was_built_from(open_tiny: Opener, built_engine: Built, tiny_bundle: Bundles) -> None:
    built, files = built_engine("llama"), tiny_bundle("llama").manifest.files
    sources = {name: files[name].sha256 for name in ("canonical.onnx", "fp32.weights")}
    facts = built.facts(sources=sources, sha256=hashlib.sha256(built.plan).hexdigest())
    assert open_tiny("llama", facts=facts).info.name == "rtx"


@pytest.mark.parametrize("harm", ["cut", "altered"])
def test_a_damaged_plan(harm: str, open_tiny: Opener, built_engine: Built) -> None:
    """Of the right size even: the library's own check refuses it."""
    plan = built_engine("llama").plan
    bad = plan[:-100] if harm == "cut" else plan[:-100] + bytes(100)
    with pytest.raises(EngineUnavailableError, match="truncated, altered, or no engine"):
        open_tiny("llama", plan=bad, facts=built_engine("llama").facts(size=len(bad)))


def test_the_real_library_refuses_too(world: World, built_engine: Built) -> None:
    """Here it finds no driver: that must be said, with an error that the next engine can follow."""
    built = built_engine("llama")
    for plan, reason in ((built.plan, "CUDA"), (built.plan[:20], "no engine")):
        with pytest.raises(EngineUnavailableError, match=f"TensorRT-RTX refuses the engine: .*{reason}"):
            LoadedEngine(memoryview(plan), built.facts(), load_flavour("rtx"), Device(world.gpu))


@pytest.mark.parametrize(
    ("refusal", "message"),
    [("deserialize", "cannot load the engine: .*Error Code 1"), ("context", "cannot make a context.*out of memory")],
)
def test_the_library_refuses(refusal: str, message: str, open_tiny: Opener, world: World) -> None:
    world.refuse.add(refusal)
    with pytest.raises(EngineUnavailableError, match=message):
        open_tiny("llama")
    assert world.gpu.used == 0


def test_an_engine_of_another_model(open_tiny: Opener, built_engine: Built, world: World) -> None:
    other = built_engine("qwen3")
    world.engines[other.plan] = other
    with pytest.raises(EngineUnavailableError, match="another model: past.0.key has the shape"):
        open_tiny("llama", plan=other.plan, facts=other.facts())
    assert world.gpu.used == 0


def test_a_plan_from_a_memory_map(open_tiny: Opener, built_engine: Built, tmp_path: Path) -> None:
    """It is let go once the engine is open."""
    path = tmp_path / "plan"
    path.write_bytes(built_engine("llama").plan)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        session = open_tiny("llama", plan=plan, max_batch=3)
    assert session.step(ONE).shape == (1, 97)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": CAPACITY + 1}, CapacityError, "holds 64 positions per row, 65 are asked for"),
        ({"max_batch": 5}, CapacityError, "no profile.*takes 5 rows.*batch 1 to 4, sequence 1 to 1.*max_batch=4"),
        ({"max_batch": 0}, InputError, "max_batch must be an integer of at least 1"),
    ],
)
def test_more_than_it_was_built_for(
    options: dict[str, int], error: type[AccelError], message: str, open_tiny: Opener, world: World
) -> None:
    with pytest.raises(error, match=message):
        open_tiny("llama", **options)
    assert world.gpu.used == 0


def test_what_is_not_asked_for_comes_from_the_engine(open_tiny: Opener) -> None:
    session = open_tiny("llama")
    assert (session.max_batch, session.capacity, session.vocab_size) == (4, CAPACITY, 97)
    assert open_tiny("llama", capacity=5).capacity == CAPACITY


def test_no_profile_for_single_tokens(open_tiny: Opener) -> None:
    wide = ((1,), (2,), (4,)), ((2,), (8,), (16,))
    with pytest.raises(EngineUnavailableError, match="takes single tokens.*sequence 2 to 16.*begins at 1"):
        open_tiny("llama", FLOAT, wide)


def test_a_run_that_no_profile_covers(open_tiny: Opener) -> None:
    """Two tokens where the prefill profile begins at eight and padding them would not fit: that row ends alone."""
    prefill = ((1,), (1,), (1,)), ((8,), (16,), (32,))
    session = open_tiny("llama", FLOAT, prefill, DECODE, max_batch=3)
    past = np.array([CAPACITY - 3, 0, 0], np.int32)
    step = StepInputs(np.array([5, 6]), past[:1] + np.arange(2), np.array([2, 0, 0], np.int32), past, np.array([1]))
    with pytest.raises(
        EngineError, match="no profile of the engine covers batch 1, sequence 2.*profile0.*wider"
    ) as found:
        session.step(step)
    assert not isinstance(found.value, EngineBrokenError)
    assert session.step(ONE).shape == (1, 97)


def test_a_prompt_beyond_the_engines_capacity(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    """Said before anything runs, with what would help; the engine goes on with the others."""
    with Decoder(tiny_bundle("llama"), OpenedSession(open_tiny("llama", max_batch=2))) as decoder:
        with pytest.raises(CapacityError, match="prompt has 65 tokens, but the cache holds 64.*accel build --capacity"):
            decoder.generate([5] * (CAPACITY + 1), max_new_tokens=1)
        with pytest.raises(CapacityError, match="60 prompt tokens and 9 new ones .*accel build --capacity"):
            decoder.generate([5] * 60, max_new_tokens=9)
        assert len(decoder.generate([5] * 60, max_new_tokens=2, eos_token_id=[]).ids) == 2


def test_memory_that_does_not_fit_says_what_would(open_tiny: Opener, world: World) -> None:
    row = 6 * 2 * CAPACITY * 16 * 4
    world.gpu.memory = 130_000 + 2 * row  # scratch memory, logits and inputs take less
    with pytest.raises(DeviceMemoryError, match=r"bytes free, .* takes .*load with max_batch=2") as found:
        open_tiny("llama", max_batch=4)
    assert found.value.size == 4 * row // 6 and world.gpu.used == 0
    assert open_tiny("llama", max_batch=2).max_batch == 2
    world.gpu.memory = world.gpu.used + 12_416 + row // 2
    with pytest.raises(DeviceMemoryError, match=r"Not one row fits: build an engine of at most [1-9]\d* positions"):
        open_tiny("qwen2", max_batch=4)


def test_rows_must_begin_aligned(open_tiny: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.engines.tensorrt import decoder

    monkeypatch.setattr(decoder, "ALIGNMENT", 1 << 20)  # rows of these models are all multiples of 256
    with pytest.raises(EngineUnavailableError, match="a cache row is no multiple of"):
        open_tiny("llama", max_batch=2)
    assert open_tiny("llama", max_batch=1).step(one_row()).shape == (1, 97)


def one_row() -> StepInputs:
    return StepInputs(np.array([5]), np.array([0]), np.array([1], np.int32), np.zeros(1, np.int32), np.array([0]))


@pytest.mark.parametrize("what", ["run", "cudaStreamSynchronize", "cudaMemcpyAsync"])
def test_a_failure_while_running_breaks_the_session(what: str, open_tiny: Opener, world: World) -> None:
    session = open_tiny("llama", max_batch=3)
    session.step(ONE)
    if what == "run":
        world.refuse.add(what)
    else:
        world.gpu.fail[what] = world.gpu.cudaError_t.cudaErrorIllegalAddress
    reason = "Error Code 1: Cask" if what == "run" else "CUDA failed: cudaErrorIllegalAddress"
    with pytest.raises(EngineBrokenError, match=reason):
        session.step(ONE)
    world.refuse.clear()
    world.gpu.fail.clear()
    calls = len(world.gpu.calls)
    for again in (lambda: session.step(ONE), lambda: session.copy_row(0, 1, 1)):
        with pytest.raises(EngineBrokenError):
            again()
    assert len(world.gpu.calls) == calls, "a broken session must leave the GPU alone"


def test_calls_go_on_on_the_next_engine(tiny_bundle: Bundles, open_tiny: Opener, world: World) -> None:
    """Broken amid a generation: the sequence goes on from its tokens on ONNX Runtime."""
    from tests.engines.tensorrt.test_decoder import reference

    bundle = tiny_bundle("llama")
    prompt = [5, 9, 33, 12]
    with Decoder(bundle, OpenedSession(reference(bundle))) as decoder:
        expected = decoder.generate(prompt, max_new_tokens=12, eos_token_id=[]).ids

    class Opened:
        fallbacks = ()
        session = open_tiny("llama", max_batch=3)

        def open_next(self, error: EngineBrokenError) -> OpenedSession:
            return OpenedSession(reference(bundle))

    with Decoder(bundle, Opened()) as decoder:
        world.lasts = 5
        found = decoder.generate(prompt, max_new_tokens=12, eos_token_id=[]).ids
        assert decoder.engine.name == "ort-cpu" and len(world.runs) == 5
    assert list(found) == list(expected)


def test_closed_and_forked_sessions_refuse(open_tiny: Opener, world: World) -> None:
    session = open_tiny("llama", max_batch=3)
    session.step(ONE)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_step_in_child, args=(session, world, queue))
    child.start()
    message, calls = queue.get(timeout=30)
    child.join(30)
    assert "fork" in message and calls == 0
    kept = session.step(ONE)
    session.close()
    session.close()
    assert np.isfinite(kept).all()
    with pytest.raises(EngineError, match="closed"):
        session.step(ONE)
    with pytest.raises(EngineError, match="closed"):
        session.copy_row(0, 1, 1)


def _step_in_child(session: Any, world: World, queue: Any) -> None:
    before = len(world.gpu.calls)
    try:
        session.step(ONE)
        message = "ran"
    except EngineError as error:
        message = str(error)
    session.close()
    queue.put((message, len(world.gpu.calls) - before))


def test_kernels_are_kept(open_tiny: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read at the start, written at the end; junk and a folder that cannot be written cost a warning at most."""
    path = tmp_path / "cache" / "kernels"
    for _ in range(2):
        session = open_tiny("llama", max_batch=3, kernels=path)
        session.step(ONE)
        session.close()
    assert path.read_bytes().count(b"(1, 1)") == 1 and [*path.parent.iterdir()] == [path]
    path.write_bytes(b"junk")
    session = open_tiny("llama", max_batch=3, kernels=path)
    session.step(ONE)
    session.close()
    assert path.read_bytes().startswith(b"kernels:") and not caplog.records
    session = open_tiny("llama", max_batch=3, kernels=path / "below a file")
    session.step(ONE)
    session.close()
    assert "kernels are not kept" in caplog.text
