"""The whole way of an engine: built, stored, found, loaded and run through ``accel.load``; a hit reads no graph."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accel
from accel.builder import build as building
from accel.builder.profiles import input_shapes
from accel.bundle import Bundle
from accel.engines.tensorrt import open as opening
from accel.engines.tensorrt import registry
from accel.engines.tensorrt.memory import Device
from accel.errors import AccelError
from accel.store import EngineStore
from accel.variants import add_variant
from tests.engines.tensorrt.built import BuiltEngine, read_tensors
from tests.engines.tensorrt.double import World

PROMPT = [5, 9, 3, 60, 17]
_watched: list[list[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and event == "open" and isinstance(arguments[0], (str, bytes)):
        _watched[-1].append(os.fsdecode(arguments[0]))


sys.addaudithook(_hear)  # cannot be taken away again


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Names of the files that Python opens in the block."""
    found: list[str] = []
    _watched.append(found)
    try:
        yield found
    finally:
        _watched.pop()


@pytest.fixture
def built_here(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """``built_here(store, graph)``: lets the double run the engine that was built last, as its network says."""
    seen: list[Any] = []
    configure = building._configure

    def note(parsed: Any, settings: Any, timings: Any) -> Any:
        seen.append((parsed, settings))
        return configure(parsed, settings, timings)

    monkeypatch.setattr(building, "_configure", note)

    def give(store: Path, graph: Path) -> None:
        parsed, settings = seen[-1]
        (plan,) = store.rglob("*.plan")
        profiles = tuple(input_shapes(profile, parsed.source.inputs) for profile in settings.profiles)
        tensors = tuple(read_tensors(parsed.network))
        world.engines[plan.read_bytes()] = BuiltEngine(plan.read_bytes(), tensors, profiles, graph)

    return give


@pytest.fixture
def gpu_here(world: World, monkeypatch: pytest.MonkeyPatch) -> Device:
    """This machine has the double's GPU, an sm86."""
    device = Device(world.gpu)
    monkeypatch.setattr(registry, "current_sm", lambda: "sm86")
    monkeypatch.setattr(registry, "current_gpu", lambda: None)
    monkeypatch.setattr(registry, "load_flavour", lambda target: world.flavour())
    monkeypatch.setattr(opening, "shared_device", lambda: device)
    return device


def test_a_hit_is_loaded_and_run_without_its_graph(
    tiny_bundle: Callable[[str], Bundle],
    built_here: Callable[[Path, str], None],
    gpu_here: Device,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    path, store = tmp_path / "bundle", tmp_path / "store"
    bundle = add_variant(shutil.copytree(tiny_bundle("llama").path, path), "fp32", check=False)
    (report,) = accel.build(path, "rtx", "sm86", precision="fp32", capacity=64, max_batch=2, store=store)
    built_here(store, bundle.file(bundle.graph("fp32", "tensorrt").file))
    time.sleep(0.2)  # files that were just written are hashed once more
    options: dict[str, Any] = {"engine": "rtx", "variant": "fp32", "store": store}
    accel.load(path, **options).close()
    with opened_files() as files, accel.load(path, **options) as model:
        names = [Path(name).name for name in files]
        assert f"{report.digest}.json" in names and any(name.endswith(".plan") for name in names)
        assert [name for name in names if name.endswith((".onnx", ".weights"))] == []
        assert (model.engine.name, model.engine.device, model.engine.variant) == ("rtx", "cuda:0", "fp32")
        assert EngineStore(store).prune(0) == []  # in use
        found = model.generate(PROMPT, max_new_tokens=12, eos_token_id=[]).ids
    with accel.load(path, engine="ort-cpu") as reference:
        assert reference.generate(PROMPT, max_new_tokens=12, eos_token_id=[]).ids == found
    assert world.gpu.used == 0 and len(world.runs) > 12 and np.unique(found).size > 1


def test_a_changed_graph_is_no_hit(
    tiny_bundle: Callable[[str], Bundle], gpu_here: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterpart: what has changed is read, and refused."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    path, store = tmp_path / "bundle", tmp_path / "store"
    bundle = add_variant(shutil.copytree(tiny_bundle("llama").path, path), "fp32", check=False)
    accel.build(path, "rtx", "sm86", precision="fp32", capacity=64, max_batch=2, store=store)
    graph = bundle.file(bundle.graph("fp32", "tensorrt").file)
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with opened_files() as files, pytest.raises(AccelError, match="corrupt"):
        accel.load(path, engine="rtx", variant="fp32", store=store)
    assert str(graph) in files
