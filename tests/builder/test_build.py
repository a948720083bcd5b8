"""Real engines of TensorRT-RTX, built without a GPU, and everything a build refuses."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accel.builder import build as building
from accel.builder.build import BuildSettings, build_plan, per_sm
from accel.builder.profiles import Profile, Range, default_profiles
from accel.engines.tensorrt import packages
from accel.engines.tensorrt.adapter import MessageLog, load_flavour
from accel.errors import DependencyError, EngineBuildError, EngineProofError, InputError, StorageError
from accel.schema import to_dict
from tests.builder import graphs

pytest.importorskip("tensorrt_rtx")
ROOT = Path(__file__).parents[2]
ARCH = graphs.arch((None, 8))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.save(graphs.decoder(windows=(None, 8)), tmp_path_factory.mktemp("decoder"))


def settings(*sm: str, **changes: Any) -> BuildSettings:
    made = BuildSettings("rtx", sm or ("sm86",), default_profiles(ARCH, 4, 64), 64)
    return dataclasses.replace(made, **changes)


def is_a_plan(plan: memoryview) -> bool:
    """The library reads its header, as far as it does without a GPU."""
    flavour = load_flavour("rtx")
    runtime = flavour.trt.Runtime(flavour.logger(MessageLog()))
    wrong_file = 1 << 5  # the bit that it sets for files that are no engines
    return not int(runtime.get_engine_validity(bytes(plan))[1]) & wrong_file


@pytest.mark.parametrize("sm", ["sm86", "sm89", "sm120"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_decoder_engines(tmp_path: Path, sm: str, dtype: str) -> None:
    path = graphs.save(graphs.decoder(dtype, (None, 8)), tmp_path)
    built = build_plan(path, ARCH, settings(sm, dtype=dtype))
    facts = built.facts
    assert is_a_plan(built.plan) and not is_a_plan(memoryview(b"no engine" * 100))
    assert facts.fused_attention == 2 and facts.layers["kv_cache_update"] == 4
    assert facts.engine_bytes == built.plan.nbytes > facts.weight_bytes > 0
    assert (facts.target, facts.sm, facts.warnings) == ("rtx", (sm,), ())
    assert built.proof.ok and built.timing_cache is None
    assert json.loads(json.dumps(to_dict(facts)))["version"] == load_flavour("rtx").version


def test_encoder_engine(tmp_path: Path) -> None:
    arch = graphs.arch((None, None), "encoder")
    wanted = BuildSettings("rtx", ("sm89",), default_profiles(arch, 8), optimization_level=1, workspace=1 << 28)
    built = build_plan(graphs.save(graphs.encoder(layers=2), tmp_path), arch, wanted)
    assert built.facts.fused_attention == 2 and "kv_cache_update" not in built.facts.layers


def test_weights_inside_the_graph_file(tmp_path: Path) -> None:
    path = graphs.save(graphs.decoder(windows=(None, 8)), tmp_path, external=False)
    assert not (tmp_path / "weights.bin").exists()
    assert build_plan(path, ARCH, settings()).facts.weight_bytes > 50_000


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the library got in the latest build: ``parsed`` and ``config``."""
    kept: dict[str, Any] = {}
    configure = building._configure

    def spy(parsed: Any, *rest: Any) -> Any:
        kept["parsed"], kept["config"] = parsed, configure(parsed, *rest)
        return kept["config"]

    monkeypatch.setattr(building, "_configure", spy)
    return kept


def sms_of(config: Any) -> list[str]:
    return [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)]


def test_several_sms_in_one_engine_or_one_each(decoder: Path, given: dict[str, Any]) -> None:
    both = settings("sm86", "sm120")
    built = build_plan(decoder, ARCH, both)
    assert sms_of(given["config"]) == ["SM86", "SM120"] and built.facts.sm == ("sm86", "sm120")
    assert is_a_plan(built.plan)
    for single, sm in zip(per_sm(both), ("SM86", "SM120")):
        assert is_a_plan(build_plan(decoder, ARCH, single).plan) and sms_of(given["config"]) == [sm]


def test_profiles_and_capacity_reach_the_library(decoder: Path, given: dict[str, Any]) -> None:
    build_plan(decoder, ARCH, settings("sm89", optimization_level=2, workspace=1 << 26))
    network, config = given["parsed"].network, given["config"]
    assert config.num_optimization_profiles == 2 and config.builder_optimization_level == 2
    assert config.get_memory_pool_limit(given["parsed"].flavour.trt.MemoryPoolType.WORKSPACE) == 1 << 26
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    assert tuple(inputs["past.1.value"].shape) == (-1, graphs.KV_HEADS, 64, graphs.HEAD_DIM)


def test_the_plan_outlives_everything_else(decoder: Path, tmp_path: Path) -> None:
    plan = build_plan(decoder, ARCH, settings(), scratch=tmp_path).plan
    gc.collect()
    assert is_a_plan(plan) and not list(tmp_path.iterdir())  # the scratch file has no name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sm": ("sm90",)}, InputError, "does not support sm90.*target='tensorrt'"),
        ({"sm": ()}, InputError, "No SM"),
        ({"target": "trt"}, InputError, "no target 'trt'"),
        ({"optimization_level": 6}, InputError, "no optimization level 6"),
        ({"workspace": 0}, InputError, "at least 1 byte"),
        ({"hardware_compatibility": "same"}, InputError, "no hardware compatibility"),
        ({"capacity": None}, InputError, "fixed number of cache slots"),
        ({"capacity": 1024}, InputError, "more than the model's 512 positions"),
        ({"profiles": (Profile("odd", Range(4, 2, 1), Range(1, 1, 1)),)}, InputError, "not 4, 2, 1.*profile odd"),
        ({"profiles": (Profile("long", Range(1, 1, 1), Range(1, 64, 65)),)}, InputError, "to 65, the capacity to 64"),
        ({"dtype": "bfloat16"}, EngineProofError, r"\['bfloat16', .* is \['float16'.*layer 0"),
    ],
)
def test_refuses_wrong_settings(decoder: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_plan(decoder, ARCH, settings(**changes))


def test_refuses_what_needs_a_gpu(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the graph was read")

    monkeypatch.setattr(building, "GraphSource", never)
    monkeypatch.setattr("accel.engines.tensorrt.adapter.current_sm", lambda: None)
    with pytest.raises(EngineBuildError, match="refittable weights on a GPU.*at refittable"):
        build_plan(decoder, ARCH, settings(refittable=True))


def test_missing_package_says_what_to_install(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    with pytest.raises(DependencyError, match='pip install "tensorrt>=10.15.1"'):
        build_plan(decoder, ARCH, settings(target="tensorrt"))


def test_a_bad_graph_is_not_built(tmp_path: Path) -> None:
    path = graphs.save(graphs.decoder(causal=True), tmp_path)
    with pytest.raises(EngineProofError, match=r"is_causal = 1.*layers\.0\.attention, layer 0"):
        build_plan(path, graphs.arch(), settings())


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    """A head size without a fused kernel parses and proves well; only the builder knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "HEAD_DIM", 20)
        path = graphs.save(graphs.decoder(scale=20**-0.5), tmp_path)
        arch = graphs.arch()
    with pytest.raises(EngineBuildError, match=r"could not build the engine: .*Error Code 1: Myelin") as caught:
        build_plan(path, arch, settings())
    assert "CUDA driver" not in str(caught.value)


def test_a_full_disk_is_said(decoder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
        with pytest.raises(StorageError, match="The disk is full"):
            build_plan(decoder, ARCH, settings())


def test_a_scratch_folder_that_is_not_there(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        build_plan(decoder, ARCH, settings(), scratch=tmp_path / "nowhere")


MEMORY = """
import sys
from pathlib import Path
from accel.builder.build import BuildSettings, build_plan
from accel.builder.profiles import default_profiles
from tests.builder import graphs
arch = graphs.arch((None,) * 3, hidden_size=1536)
settings = BuildSettings("rtx", ("sm86",), default_profiles(arch, 2, 64), 64)
built = build_plan(Path(sys.argv[1]), arch, settings)
print(built.facts.weight_bytes, built.facts.peak_rss_bytes)
"""


@pytest.mark.slow
def test_memory_of_a_build(tmp_path: Path) -> None:
    """At most 2.5 times the weights, the interpreter and the libraries included."""
    path = graphs.save(graphs.decoder(windows=(None,) * 3, hidden=1536, vocab=40000), tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    weights, peak = map(int, done.stdout.split())
    assert weights > 300e6
    assert weights < peak <= 2.5 * weights, f"{peak / weights:.2f} x the weights"
