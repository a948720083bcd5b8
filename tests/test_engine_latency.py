"""Warm-up and timing over the double of TensorRT's runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from accel import engine_latency
from accel.builder.profiles import Profile, Range
from accel.bundle import Bundle
from accel.engine_latency import measure_engine, warm_and_measure
from accel.engine_request import BuildRequest, prepare
from accel.engines.session import StepInputs
from accel.engines.tensorrt.adapter import load_flavour
from accel.engines.tensorrt.kernel_cache import kernels_path
from accel.engines.tensorrt.memory import Device
from accel.errors import DependencyError, EngineUnavailableError
from accel.store import EngineStore
from accel.variants import add_variant
from tests.engines.tensorrt.built import BuiltEngine
from tests.engines.tensorrt.conftest import built_engine, open_tiny, tiny_bundle, world
from tests.engines.tensorrt.double import World

__all__ = ["built_engine", "open_tiny", "tiny_bundle", "world"]  # fixtures
pytest.importorskip("tensorrt_rtx")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))


PREFILL = Profile("prefill", Range(1, 1, 1), Range(1, 24, 32))
DECODE = Profile("decode", Range(1, 2, 4), Range(1, 1, 1))
ENCODE = Profile("encode", Range(1, 2, 4), Range(1, 8, 24))


def test_each_profile_of_an_encoder_runs(open_tiny: Callable[..., Any], world: World) -> None:
    session = open_tiny("bert")
    found = warm_and_measure(session, [ENCODE], rounds=3)
    assert list(found) == ["encode"] and found["encode"] > 0
    assert len(world.runs) > 12 and [shape for _, shape in world.runs][-3:] == [(2, 8)] * 3  # at the tuned shape


def test_each_profile_of_a_decoder_runs(
    open_tiny: Callable[..., Any], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_tiny("llama", ir.DataType.FLOAT, max_batch=3)
    steps: list[list[int]] = []
    step = session.step

    def count(inputs: StepInputs) -> Any:
        steps.append([int(length) for length in inputs.query_lengths])
        logits = step(inputs)
        assert logits.shape[0] == np.count_nonzero(inputs.query_lengths)
        return logits

    session.warm_up()
    monkeypatch.setattr(session, "warm_up", lambda: steps.append([]))
    monkeypatch.setattr(session, "step", count)
    found = warm_and_measure(session, [PREFILL, DECODE], rounds=2)
    assert list(found) == ["prefill", "decode"] and min(found.values()) > 0
    assert steps == [[], *[[24, 0, 0]] * 3, *[[1, 1, 0]] * 3]  # warm first; then one call to settle, two timed


@pytest.fixture
def stored(
    tiny_bundle: Callable[[str], Bundle], built_engine: Callable[..., BuiltEngine], world: World, tmp_path: Path
) -> tuple[BuildRequest, EngineStore]:
    """What is asked of an engine of a copy of bert, and a store that has it."""
    folder = Path(shutil.copytree(tiny_bundle("bert").path, tmp_path / "bert"))
    bundle = add_variant(folder, "fp32", check=False, show_progress=False)
    ranges = {"batch": {"min": 1, "opt": 2, "max": 4}, "sequence": {"min": 1, "opt": 8, "max": 24}}
    (request,) = prepare(bundle, load_flavour("rtx"), "sm86", precision="fp32", profiles={"encode": ranges})
    engine, store = built_engine("bert"), EngineStore(tmp_path / "store")
    world.engines[engine.plan] = engine
    facts = {"profile_order": ["encode"], "max_batch": 4, "sources": request.sources}
    store.put(request.key, engine.plan, facts)
    return request, store


def test_a_stored_engine_is_measured(
    stored: tuple[BuildRequest, EngineStore], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, store = stored
    monkeypatch.setattr(engine_latency, "current_sm", lambda: "sm86")
    monkeypatch.setattr("accel.engines.tensorrt.open.shared_device", lambda: Device(world.gpu))
    engine = store.get(request.key)
    assert engine is not None
    with engine:
        found = measure_engine(request, engine, world.flavour())
    assert list(found) == ["encode"] and found["encode"] > 0 and [shape for _, shape in world.runs][-1] == (2, 8)
    assert world.gpu.used == 0 and not world.gpu.why  # the session was closed
    assert kernels_path(request.key, "sm86").is_file()


def test_an_engine_for_another_gpu_is_not_measured(
    stored: tuple[BuildRequest, EngineStore], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, store = stored
    engine = store.get(request.key)
    assert engine is not None
    with engine:
        for here in (None, "sm89"):
            monkeypatch.setattr(engine_latency, "current_sm", lambda here=here: here)
            with pytest.raises(EngineUnavailableError, match="no GPU sm86 here"):
                measure_engine(request, engine, world.flavour())
        monkeypatch.setattr(engine_latency, "find_spec", lambda _: None)
        with pytest.raises(DependencyError, match='pip install "cuda-python'):
            measure_engine(request, engine, world.flavour())
    assert world.runs == []
