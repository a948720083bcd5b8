"""Why the cuda engine is passed over."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.capabilities import MINIMUM_ONNXRUNTIME_GPU
from accel.engines import open_session
from accel.engines.cuda import registry
from accel.engines.cuda.device import INTERPRETED, Device
from accel.engines.cuda.program import weight_bytes
from accel.engines.kv_cache import bytes_per_token
from accel.engines.session import SessionOptions
from accel.errors import BundleError, CapacityError, EngineUnavailableError
from accel.variants import add_variant
from tests.engines.captures import DISTURBED, others_may_capture
from tests.graph.test_external import QKV, graph, write
from tests.parity.families import ALL, build_model

interpreted = pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: it is not as the test says")


@pytest.mark.parametrize(
    "lacking,said",
    [("there is no GPU", "there is no GPU"), (None, "triton and onnx_ir missing: pip install triton onnx-ir")],
)
def test_what_is_missing_is_named_where_there_is_a_gpu(
    lacking: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one: the extra would bring onnxruntime-gpu into the folder of onnxruntime."""
    bundle: Any = None
    monkeypatch.setattr(registry, "pick_precision", lambda *_: "fp16")
    monkeypatch.setattr(registry, "find_spec", lambda name: object() if name == "torch" else None)
    monkeypatch.setattr(registry, "missing_gpu", lambda: lacking)
    assert registry.probe(bundle, "auto") == said


@pytest.fixture(scope="module")
def decoder(made_once: Callable[..., Path]) -> Path:
    """Exported without a comparison, for which the ONNX Runtime beside a GPU may be too old."""
    unchecked, task = {"parity": {"enabled": False}}, ALL["llama"].task
    return made_once("unchecked-llama", lambda out: accel.export(build_model("llama"), out, unchecked, task=task))


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("w4g32", "no graph of the cuda engine for variant 'w4g32': {command} w4g32 --target cuda adds one"),
        ("fp32+kv8", "no graph of the cuda engine for variant 'fp32+kv8': {command} fp16+kv8 --target cuda adds one"),
        ("fp32+kv4", "the cuda engine does not run 'fp32+kv4': its caches are floats, of 8 bits too, or int8"),
        ("w8a8-dyn", "the cuda engine does not run 'w8a8-dyn': its kernels take floats times integer weights"),
        ("mine", "no graph of the cuda engine for variant 'mine': {command} mine --target cuda adds one"),
    ],
)
def test_no_command_is_advised_that_is_refused(
    decoder: Path, variant: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "missing_gpu", lambda: None)
    opened = Bundle.open(decoder)
    variants = {**opened.manifest.variants, variant: opened.variant("fp32")}
    bundle = Bundle(opened.path, dataclasses.replace(opened.manifest, variants=variants))
    assert said.format(command=f"accel quantize {opened.path} --variant") in str(registry.probe(bundle, variant))
    monkeypatch.setattr(registry, "missing_gpu", lambda: "there is no GPU")
    without = str(registry.probe(bundle, variant))
    assert without == "there is no GPU" or without.startswith("the cuda engine does not run"), "no graph would help"


def test_weights_take_what_the_graph_reads_and_not_their_files(tmp_path: Path) -> None:
    """One file may hold another graph's weights too."""
    write(tmp_path, "all", graph(QKV))
    write(tmp_path, "some", graph({"q": QKV["q"], "k": QKV["k"]}), "all")
    assert weight_bytes(tmp_path / "some.onnx") == QKV["q"].nbytes + QKV["k"].nbytes
    assert weight_bytes(tmp_path / "all.onnx") == sum(array.nbytes for array in QKV.values())
    (tmp_path / "some.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot be read"):
        weight_bytes(tmp_path / "some.onnx")


@pytest.fixture(scope="module")
def bundles(tiny_decoder_bundle: Path, minilm_bundle: Path, tmp_path_factory: Any) -> dict[str, Bundle]:
    """Each with a graph for this engine and one for a CPU."""
    made = {}
    for kind, source in (("decoder", tiny_decoder_bundle), ("encoder", minilm_bundle)):
        folder = shutil.copytree(source, tmp_path_factory.mktemp("room") / kind)
        made[kind] = add_variant(folder, "fp16", target="cuda", check=False)
    return made


def weights_of(bundle: Bundle) -> int:
    return weight_bytes(bundle.file(bundle.graph("fp16", "cuda").file))


def position_of(bundle: Bundle) -> int:
    return bytes_per_token(bundle.manifest.arch, 2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that PyTorch finds, for the engine that runs on Triton's interpreter all the same."""
    monkeypatch.setattr("accel.engines.has_nvidia_device", lambda: True)
    monkeypatch.setattr("accel.engines.hidden_gpu", lambda: None)
    monkeypatch.setattr(registry, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def let_fail(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def ran_out(*names: str) -> Callable[[pytest.MonkeyPatch, Bundle], None]:
    """The GPU's memory runs out where this is called, which nobody could know before."""
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def spoil(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
        for name in names:
            monkeypatch.setattr(f"accel.engines.cuda.{name}", let_fail(error))

    return spoil


def refuses(name: str, said: str) -> Callable[[pytest.MonkeyPatch, Bundle], None]:
    error = RuntimeError(f"CUDA error: {said}\nCUDA kernel errors might be reported later\nFor debugging consider more")
    return lambda monkeypatch, _: monkeypatch.setattr(name, let_fail(error))


def has_free(positions: int, beside_weights: bool = True) -> Callable[[pytest.MonkeyPatch, Bundle], None]:
    """As many positions of one row fit, as the engine counts: not in all that is free."""

    def spoil(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
        room = int(positions * position_of(bundle) / 0.9) + 9
        weights = weights_of(bundle) if beside_weights else 0
        monkeypatch.setattr(Device, "free_memory", lambda _: weights + room)

    return spoil


FULL = "the GPU's memory is full: CUDA "
SPOILED = {
    "weights": (has_free(1, beside_weights=False), "bytes free; the weights take [0-9,]+ bytes"),
    "cache": (has_free(15), "not one cache position fits.*Load with a max_batch of at most 7, or free memory"),
    "context": (
        refuses("torch.cuda.get_device_capability", "out of memory"),
        "the GPU cannot be used now: CUDA error: out of memory",
    ),
    "busy": (
        refuses("accel.engines.cuda.device.open_device", "device(s) is/are busy or unavailable"),
        r"RuntimeError: CUDA error: device\(s\) is/are busy or unavailable \(at loading\)",
    ),
    "asked": (
        refuses("accel.engines.cuda.device.Device.free_memory", "out of memory"),
        rf"{FULL}error: out of memory \(at loading\). Close other programs on this GPU",
    ),
    "loading": (
        ran_out("decoder.load_program"),
        f"{FULL}out of memory. Tried.*Close other programs on this GPU. Ask for a smaller capacity or max_batch",
    ),
    "allocating": (ran_out("decoder.CachedAttention"), f"{FULL}out of memory. Tried to allocate 2.00 GiB"),
}


@interpreted
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_full_or_busy_gpu_is_passed_over(
    spoiled: str, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was asked for, and there is a graph for the CPU."""
    spoil, said = SPOILED[spoiled]
    spoil(monkeypatch, bundles["decoder"])
    with accel.load(bundles["decoder"].path, threads=1) as model:
        assert model.engine.name == "ort-cpu"
        (reason,) = [fallback.reason for fallback in model.fallbacks if fallback.engine == "cuda"]
        assert re.search(said, reason) and "\n" not in reason
        assert model.generate("hello", max_new_tokens=2).ids


@interpreted
@pytest.mark.parametrize("spoiled", [name for name in SPOILED if name != "context"])
def test_it_is_the_engine_that_is_unavailable(
    spoiled: str, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one run of it that failed, nor an engine that broke."""
    spoil, said = SPOILED[spoiled]
    spoil(monkeypatch, bundles["decoder"])
    with pytest.raises(EngineUnavailableError, match=said):
        registry.open_cuda(bundles["decoder"], "auto", SessionOptions())


@interpreted
@pytest.mark.usefixtures("gpu")
def test_what_was_asked_for_and_does_not_fit(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the caller's to change, unless not even the weights fit."""
    has_free(100)(monkeypatch, bundles["decoder"])
    fits = "Ask for a capacity of at most 33 with max_batch 3, or for a max_batch of at most 2 with capacity 48"
    with pytest.raises(CapacityError, match=f"a cache of 3 rows of 48 positions takes.*{fits}"):
        open_session(bundles["decoder"], options=SessionOptions(capacity=48, max_batch=3))
    with pytest.raises(CapacityError, match="not one cache position fits.*Load with a max_batch of at most 50"):
        open_session(bundles["decoder"], options=SessionOptions(max_batch=51))
    has_free(1, beside_weights=False)(monkeypatch, bundles["decoder"])
    opened = open_session(bundles["decoder"], options=SessionOptions(1, 48, 3))
    assert opened.session.info.name == "ort-cpu" and "the weights take" in str(opened.fallbacks)
    opened.session.close()


@interpreted
@pytest.mark.parametrize(
    ("left", "fits"),
    [
        (100, "Ask for a capacity of at most 24 with max_batch 3, or for a max_batch of at most 1 with capacity 48"),
        (40, "Ask for a capacity of at most 13 with max_batch 3"),
        (2, "Ask for a capacity of at most 2 with max_batch 1"),
    ],
)
def test_what_fits_is_said_where_memory_runs_out_after_all(
    left: int, fits: str, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as is free then: another program may have taken the rest; at most half of what failed."""
    bundle, counts = bundles["decoder"], iter((1000, left))
    room = {count: weights_of(bundle) + int(count * position_of(bundle) / 0.9) + 9 for count in (1000, left)}
    monkeypatch.setattr(Device, "free_memory", lambda _: room[next(counts)])
    ran_out("decoder.CachedAttention")(monkeypatch, bundle)
    with pytest.raises(CapacityError, match=rf"^{FULL}out of memory.* \(at capacity, max_batch\). {fits}$"):
        registry.open_cuda(bundle, "auto", SessionOptions(capacity=48, max_batch=3))


@interpreted
def test_where_the_weights_fit_no_more_nothing_asked_for_is_to_blame(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter((1 << 30, 1000))
    monkeypatch.setattr(Device, "free_memory", lambda _: next(free))
    ran_out("decoder.load_program")(monkeypatch, bundles["decoder"])
    with pytest.raises(EngineUnavailableError, match=f"{FULL}out of memory.*; the weights take"):
        registry.open_cuda(bundles["decoder"], "auto", SessionOptions(capacity=48, max_batch=3))


@interpreted
def test_a_kernel_that_fails_is_no_question_of_room(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.engines.cuda.decoder.CachedAttention", let_fail(ValueError("it does not compile")))
    with pytest.raises(EngineUnavailableError, match="the CUDA engine failed: ValueError: it does not compile"):
        registry.open_cuda(bundles["decoder"], "auto", SessionOptions(capacity=48, max_batch=3))


@interpreted
def test_an_encoder_says_what_it_needs(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    needs = f"; the weights take {weights_of(bundles['encoder']):,} bytes"
    ran_out("encoder.load_program")(monkeypatch, bundles["encoder"])
    with pytest.raises(EngineUnavailableError, match=f"{FULL}out of memory. Tried to allocate 2.00 GiB{needs}"):
        registry.open_cuda(bundles["encoder"], "auto", SessionOptions())
    monkeypatch.setattr(Device, "free_memory", lambda _: 1000)
    with pytest.raises(EngineUnavailableError, match=f"the GPU has 1,000 bytes free{needs}"):
        registry.open_cuda(bundles["encoder"], "auto", SessionOptions())


@interpreted
def test_a_load_that_failed_keeps_no_memory(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next engine may run on the same GPU, and what fits is counted by what is free."""
    made: list[weakref.ref[torch.Tensor]] = []
    done: list[str] = []

    def fail(caches: dict[Any, Any], products: Any) -> None:
        made.extend(weakref.ref(cache) for pair in caches.values() for cache in pair)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def release(_: Device) -> None:
        done.append("released" if made and all(cache() is None for cache in made) else "held")

    monkeypatch.setattr("accel.engines.cuda.decoder.CachedAttention", fail)
    monkeypatch.setattr(Device, "release", release)
    monkeypatch.setattr(Device, "free_memory", lambda _: done.append("counted") or 1 << 30)
    with pytest.raises(CapacityError):
        registry.open_cuda(bundles["decoder"], "auto", SessionOptions(capacity=48, max_batch=3))
    assert done == ["counted", "released", "counted"]


@interpreted
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_load_amid_anothers_capture_is_tried_again(
    kind: str, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's, while another model is loaded: CUDA gives no memory then."""
    tries: list[bool] = []
    module = importlib.import_module(f"accel.engines.cuda.{kind}")
    load = module.load_program

    def disturbed(*arguments: Any) -> Any:
        tries.append(others_may_capture())
        if len(tries) == 1:
            raise RuntimeError(DISTURBED["pytorch"])
        return load(*arguments)

    monkeypatch.setattr(module, "load_program", disturbed)
    registry.open_cuda(bundles[kind], "auto", SessionOptions()).close()
    assert tries == [True, False], "the second time nobody captures"


@interpreted
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_forks_session_closes_at_once(
    kind: str, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks may be held by threads that did not survive."""
    session: Any = registry.open_cuda(bundles[kind], "auto", SessionOptions())
    waits: list[str] = []
    for name in ("synchronize", "release"):
        monkeypatch.setattr(Device, name, lambda _, name=name: waits.append(name))
    with monkeypatch.context() as forked:
        forked.setattr("accel.engines.lifetime._forks", 1 << 20)
        session.close()
    assert not waits


@interpreted
def test_a_damaged_graph_is_the_bundles_fault(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.engines.cuda.decoder.load_program", let_fail(BundleError("The graph cannot be read")))
    with pytest.raises(BundleError, match="cannot be read"):
        registry.open_cuda(bundles["decoder"], "auto", SessionOptions())


@pytest.mark.usefixtures("gpu")
@interpreted
@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((7, 5), "the GPU is sm75; the kernels need sm80 or later"),
        ((8, 0), None),
    ],
)
def test_a_gpu_that_is_too_old(
    found: tuple[int, int], said: str | None, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    assert registry.probe(bundles["decoder"], "auto") == said


OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version"
)
DRIVER = "PyTorch 2.0 cannot use this machine's NVIDIA driver: "
BEHIND = "Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver combination"


@pytest.mark.usefixtures("gpu")
@interpreted
@pytest.mark.parametrize(
    ("built", "error", "said"),
    [
        (None, AssertionError("Torch not compiled"), "the PyTorch installed here (2.0) was built without CUDA"),
        ("13.0", RuntimeError(OLD), f"{DRIVER}{OLD[:65]}. Install a newer driver, or a PyTorch for this one"),
        ("13.0", RuntimeError(BEHIND), f"{DRIVER}{BEHIND}. Install a newer driver, or a PyTorch for this one"),
        ("13.0", RuntimeError("No CUDA GPUs are available"), "PyTorch finds no CUDA GPU here: No CUDA GPUs are availa"),
        ("13.0", RuntimeError(), "PyTorch finds no CUDA GPU here: RuntimeError"),
        ("13.0", None, "PyTorch finds no CUDA GPU here"),
    ],
)
def test_why_pytorch_finds_no_gpu(
    built: str | None,
    error: Exception | None,
    said: str,
    bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One without CUDA, a driver that it cannot use, or no GPU: each is mended otherwise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch, "__version__", "2.0")
    monkeypatch.setattr(torch.cuda, "init", (lambda: None) if error is None else let_fail(error))
    assert (registry.probe(bundles["decoder"], "auto") or "").startswith(said)
    monkeypatch.setattr(registry, "missing_gpu", lambda: "there is no GPU")
    assert registry.probe(bundles["decoder"], "auto") == "there is no GPU", "no driver and no package would help"


def test_what_is_installed_is_new_enough() -> None:
    needed = ".".join(map(str, MINIMUM_ONNXRUNTIME_GPU))
    assert f'"onnxruntime-gpu>={needed}"' in (Path(__file__).parents[3] / "setup.py").read_text()
