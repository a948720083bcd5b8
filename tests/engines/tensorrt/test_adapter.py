"""The adapter: packages, SMs, caches. RTX is the real library; for full TensorRT a module stands in."""

from __future__ import annotations

import enum
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from accel.engines.tensorrt import adapter, packages
from accel.engines.tensorrt.adapter import Flavour, MessageLog, TensorRT, load_flavour
from accel.errors import DependencyError, EngineBuildError, InputError

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    return load_flavour("rtx")


def stand_in(version: str) -> SimpleNamespace:
    """What the adapter reads of ``tensorrt``, with the names and numbers of its headers."""
    flags = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0})
    levels = enum.Enum("HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1, "SAME_COMPUTE_CAPABILITY": 2})
    return SimpleNamespace(
        __version__=version,
        Builder=object,
        OnnxParser=object,
        NetworkDefinitionCreationFlag=flags,
        HardwareCompatibilityLevel=levels,
    )


def full(monkeypatch: pytest.MonkeyPatch, version: str = "11.1.0.106", sm: str | None = "sm90") -> Flavour:
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in(version))  # type: ignore[arg-type]
    monkeypatch.setattr(adapter, "current_sm", lambda: sm)
    return load_flavour("tensorrt")


def test_rtx_is_the_installed_library(rtx: Flavour) -> None:
    import tensorrt_rtx

    assert rtx.trt is tensorrt_rtx and rtx.version == tensorrt_rtx.__version__
    assert rtx.release >= (1, 7) and not rtx.needs_gpu and rtx.cache_kind == "runtime"
    assert {"sm86", "sm89", "sm120"} <= set(rtx.known_sms())


@pytest.mark.parametrize(
    ("target", "module", "command"),
    [
        ("tensorrt", "tensorrt", 'pip install "tensorrt>=10.15.1"'),
        ("rtx", "tensorrt_rtx", 'pip install "tensorrt-rtx-cu13>=1.7"'),
    ],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, target: str, module: str, command: str) -> None:
    def missing(name: str) -> Any:
        assert name == module
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    with pytest.raises(DependencyError, match="is not installed") as caught:
        load_flavour(target)
    assert caught.value.remedy == f"Run: {command}"


def test_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DependencyError, match=r"10\.14\.1\.48 is too old: 10\.15\.1 or newer") as caught:
        full(monkeypatch, "10.14.1.48")
    assert caught.value.remedy == 'Run: pip install --upgrade "tensorrt>=10.15.1"'
    assert full(monkeypatch, "10.15.1.29").version == "10.15.1.29"


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libnvinfer.so.11: cannot open shared object file"),
        OSError("libcudart.so.13: wrong ELF class"),
        ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
    ],
)
def test_broken_package(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(packages.importlib, "import_module", broken)
    with pytest.raises(DependencyError) as caught:
        load_flavour("rtx")
    assert str(error) in caught.value.what
    # The distribution that is installed here is named, so that its CUDA version stays.
    assert caught.value.remedy == 'Run: pip install --force-reinstall --no-cache-dir "tensorrt-rtx-cu13>=1.7"'


def test_half_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(DependencyError, match="cannot be imported"):
        load_flavour("tensorrt")


def test_unknown_target() -> None:
    with pytest.raises(InputError, match=r"no target 'trt'.*Targets: tensorrt, rtx"):
        load_flavour("trt")


@pytest.mark.parametrize(
    ("sms", "message"),
    [
        ((), "No SM is given"),
        (("sm90",), "does not support sm90.*sm120"),
        (("SM86",), "'SM86' is not the name of an SM.*like sm86"),
        (("8.6",), "'8.6' is not the name"),
        (("sm86", "sm86"), "stands twice"),
    ],
)
def test_rtx_refuses_wrong_sms(rtx: Flavour, sms: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rtx.check_sms(sms)


def test_rtx_has_no_compatibility_levels(rtx: Flavour) -> None:
    with pytest.raises(InputError, match="no hardware compatibility"):
        rtx.check_sms(("sm86",), "ampere+")


def test_rtx_sets_sms_and_keeps_types_strong(rtx: Flavour) -> None:
    builder = rtx.trt.Builder(rtx.logger(MessageLog()))
    config = builder.create_builder_config()
    rtx.set_sms(config, ("sm86", "sm120"))
    found = [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)]
    assert found == ["SM86", "SM120"]
    assert rtx.create_network(builder).get_flag(rtx.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert not rtx.load_timing_cache(config, b"") and rtx.timing_cache_of(config) is None
    rtx.set_workspace(config, 1 << 20)
    assert config.get_memory_pool_limit(rtx.trt.MemoryPoolType.WORKSPACE) == 1 << 20


def test_tensorrt_builds_for_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    flavour = full(monkeypatch)
    flavour.check_sms(("sm90",))
    flavour.check_sms(("sm90",), "same")
    flavour.check_sms(("sm80", "sm90"), "ampere+")
    with pytest.raises(EngineBuildError, match=r"GPU at hand \(sm90\) only"):
        flavour.check_sms(("sm89",))
    with pytest.raises(EngineBuildError, match="for one SM"):
        flavour.check_sms(("sm89", "sm90"))
    with pytest.raises(EngineBuildError, match="only"):
        flavour.check_sms(("sm75",), "ampere+")
    with pytest.raises(EngineBuildError, match="there is none here.*target='rtx'"):
        full(monkeypatch, sm=None).check_sms(("sm89",))


@pytest.mark.parametrize(("version", "flags"), [("10.16.1.11", 1), ("11.1.0.106", 0)])
def test_tensorrt_asks_for_strong_types_where_they_are_a_choice(
    monkeypatch: pytest.MonkeyPatch, version: str, flags: int
) -> None:
    builder = SimpleNamespace(create_network=lambda value: value)
    assert full(monkeypatch, version).create_network(builder) == flags


def test_timing_cache_of_another_machine_is_left_aside() -> None:
    class Config:
        """Refuses what it cannot use, as ``set_timing_cache(cache, ignore_mismatch=False)`` does."""

        taken: bytes | None = None

        def create_timing_cache(self, data: bytes) -> bytes:
            return data

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            if ignore_mismatch or cache == b"another GPU":
                return False
            self.taken = cache
            return True

    flavour, config = TensorRT(stand_in("11.1.0.106"), "11.1.0.106"), Config()
    assert flavour.load_timing_cache(config, b"another GPU") and config.taken == b""
    assert flavour.load_timing_cache(config, b"mine") and config.taken == b"mine"


def test_attention_without_causal_kind_is_read_by_its_boolean() -> None:
    old = TensorRT(stand_in("10.16.1.11"), "10.16.1.11")
    assert old.causal_kind(SimpleNamespace(causal=True)) == "upper-left"
    assert old.causal_kind(SimpleNamespace(causal=False)) == "none"
    assert old.lengths(SimpleNamespace()) == (None, None)


def test_attention_of_the_real_library(rtx: Flavour) -> None:
    trt, log = rtx.trt, MessageLog()
    logger = rtx.logger(log)
    builder = trt.Builder(logger)
    network = rtx.create_network(builder)
    q, k, v = (network.add_input(name, rtx.data_type("float16"), (1, 2, 4, 32)) for name in "qkv")
    attention = network.add_attention_v2(q, k, v, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.LOWER_RIGHT)
    attention.key_value_lengths = network.add_input("lengths", trt.int32, (1,))
    layers = [rtx.typed(network.get_layer(index)) for index in range(network.num_layers)]
    (inlet,) = (layer for layer in layers if layer.type.name == "ATTENTION_INPUT")
    assert rtx.causal_kind(inlet.attention) == "lower-right"
    query_lengths, key_lengths = rtx.lengths(inlet.attention)
    assert query_lengths is None and key_lengths.name == "lengths"
    assert rtx.dtype_name(q.dtype) == "float16"


def test_messages_are_collected_from_the_given_severity_on(rtx: Flavour) -> None:
    log = MessageLog(minimum="error")
    logger = rtx.logger(log)
    builder = rtx.trt.Builder(logger)
    config = builder.create_builder_config()
    config.set_compute_capability(rtx.trt.ComputeCapability.SM86, 0)  # no room was made for it
    assert any("setComputeCapability" in text for text in log.errors) and not log.warnings
    logger.log(rtx.trt.ILogger.Severity.WARNING, "kept out")
    assert not log.warnings


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64", "int32", "int8", "bool"])
def test_dtype_names_go_both_ways(rtx: Flavour, name: str) -> None:
    assert rtx.dtype_name(rtx.data_type(name)) == name


def test_the_current_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device, which CUDA_VISIBLE_DEVICES chooses; not nvidia-smi's first."""
    kinds = SimpleNamespace(cudaSuccess=0)
    runtime = SimpleNamespace(
        cudaError_t=kinds, cudaGetDevice=lambda: (0, 1),
        cudaGetDeviceProperties=lambda device: (0, SimpleNamespace(name=b"NVIDIA %d" % device)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))  # type: ignore[arg-type]
    assert packages.current_gpu() == "NVIDIA 1"
    runtime.cudaGetDevice = lambda: (35, None)
    assert packages.current_gpu() is None
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert packages.current_gpu() is None
