"""Tiny bundles, the engines that TensorRT-RTX builds from them, and sessions over a double of its runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import accel
from accel.bundle import Bundle
from accel.engines.session import SessionOptions
from accel.engines.tensorrt.memory import Device
from accel.engines.tensorrt.open import open_tensorrt
from tests.engines.tensorrt.built import BuiltEngine, Ranges, build, decoder_ranges, encoder_ranges, lowered
from tests.engines.tensorrt.double import World
from tests.engines.tensorrt.gpu import Gpu
from tests.parity.families import ALL, build_model

CAPACITY = 64
PREFILL = ((1,), (1,), (1,)), ((1,), (24,), (32,))
DECODE = ((1,), (2,), (4,)), ((1,), (1,), (1,))
BATCHES = ((1,), (2,), (4,)), ((1,), (8,), (24,))


@pytest.fixture(scope="session")
def tiny_bundle(made_once: Callable[[str, Callable[[Path], Any]], Path]) -> Callable[[str], Bundle]:
    """``tiny_bundle(name)``: the family's model, exported. Read-only."""

    def get(name: str) -> Bundle:
        def export(out: Path) -> None:
            accel.export(build_model(name), out, task=ALL[name].task, show_progress=False)

        return Bundle.open(made_once(f"family_{name}", export))

    return get


@pytest.fixture(scope="session")
def built_engine(
    tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., BuiltEngine]:
    """``built_engine(name, dtype, *profiles)``: built by TensorRT-RTX, once. Profiles are (batch, sequence) ranges."""
    made: dict[Any, BuiltEngine] = {}

    def get(name: str, dtype: ir.DataType = ir.DataType.FLOAT, *profiles: Any) -> BuiltEngine:
        key = name, dtype, profiles
        if key not in made:
            bundle, folder = tiny_bundle(name), tmp_path_factory.mktemp(name)
            model = lowered(bundle, dtype)
            ranges: list[Ranges]
            if bundle.manifest.arch.kind == "decoder":
                ranges = [decoder_ranges(bundle, CAPACITY, *sizes) for sizes in profiles or (PREFILL, DECODE)]
                made[key] = build(model, folder, ranges, CAPACITY)
            else:
                names = [str(value.name) for value in model.graph.inputs]
                ranges = [encoder_ranges(names, *sizes) for sizes in profiles or (BATCHES,)]
                made[key] = build(model, folder, ranges)
        return made[key]

    return get


@pytest.fixture
def world() -> World:
    return World(Gpu())


@pytest.fixture
def open_tiny(
    tiny_bundle: Callable[[str], Bundle], built_engine: Callable[..., BuiltEngine], world: World
) -> Iterator[Callable[..., Any]]:
    """``open_tiny(name, dtype, *profiles, facts=..., **options)``: a session on the double; all memory comes back."""
    opened: list[Any] = []
    device = Device(world.gpu)

    def get(name: str, dtype: ir.DataType = ir.DataType.FLOAT, *profiles: Any, **options: Any) -> Any:
        engine = built_engine(name, dtype, *profiles)
        world.engines[engine.plan] = engine
        facts, plan = options.pop("facts", engine.facts()), options.pop("plan", engine.plan)
        kernels = options.pop("kernels", None)
        session = open_tensorrt(
            tiny_bundle(name), "fp32", SessionOptions(**options), plan, facts, world.flavour(),
            kernels=kernels, device=device,
        )  # fmt: skip
        opened.append(session)
        return session

    yield get
    for session in opened:
        session.close()
    assert world.gpu.why == world.breaks, "the session broke a rule of the GPU"
    if not world.gpu.why and not world.gpu.fail:
        assert world.gpu.used == 0, "device memory was not freed"
        assert not any(graph.live for graph in world.gpu.graphs)
