"""The registry: order, reasons, strictness, names."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import accel.engines as engines
import accel.machine as machine
from accel.bundle import Bundle
from accel.engines import Engine, open_session
from accel.engines.ort import common
from accel.engines.session import Fallback, SessionOptions
from accel.errors import BundleError, DependencyError, EngineError, EngineUnavailableError, InputError
from tests.engines.tiny_llama import draw_weights, write_bundle

OPTIONS = SessionOptions(threads=1, capacity=32, max_batch=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("registry") / "bundle", draw_weights())


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DependencyError("onnxruntime cannot be imported: gone", remedy=f"Install it: {common.INSTALL}")

    monkeypatch.setattr(common, "import_onnxruntime", fail)


def test_onnxruntime_comes_first(bundle: Bundle) -> None:
    opened = open_session(bundle, options=OPTIONS)
    assert opened.session.info.name == "ort-cpu"
    assert opened.session.info.threads == 1 and opened.session.info.variant == "fp32"
    assert opened.fallbacks == ()
    opened.session.close()


@pytest.mark.usefixtures("without_onnxruntime")
def test_the_reference_is_the_fallback_and_says_why(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        opened = open_session(bundle, options=OPTIONS)
    assert opened.session.info.name == "torch"
    assert [fallback.engine for fallback in opened.fallbacks] == ["ort-cpu", "openvino"]
    assert 'pip install "accelrt[cpu]"' in opened.fallbacks[0].reason
    assert "gone" in caplog.text


@pytest.mark.usefixtures("without_onnxruntime")
def test_strict_and_named_engines_do_not_fall_back(bundle: Bundle) -> None:
    with pytest.raises(EngineUnavailableError, match="first engine cannot.*gone"):
        open_session(bundle, options=OPTIONS, strict=True)
    with pytest.raises(EngineUnavailableError, match="ort-cpu: .*gone"):
        open_session(bundle, engine="ort-cpu", options=OPTIONS)


def test_cuda_has_an_honest_reason_per_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_nvidia_device", lambda: True)
    monkeypatch.setattr(engines, "hidden_gpu", lambda: None)
    with pytest.raises(EngineUnavailableError) as caught:
        open_session(bundle, device="cuda", options=OPTIONS)
    assert "ort-cpu: it runs on cpu only" in str(caught.value) and "torch: it runs on cpu only" in str(caught.value)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("hidden", [None, "no device files"])
def test_cuda_without_a_gpu_is_said_in_a_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, strict: bool, hidden: str | None
) -> None:
    """What each engine lacks would be of no use, and installing it could cost the engine that runs here."""
    monkeypatch.setattr(engines, "has_nvidia_device", lambda: False)
    monkeypatch.setattr(engines, "hidden_gpu", lambda: hidden)
    with pytest.raises(EngineUnavailableError, match=f"^{hidden or 'There is no NVIDIA GPU here'}") as caught:
        open_session(bundle, device="cuda", options=OPTIONS, strict=strict)
    assert 'device="cpu"' in str(caught.value) and "pip" not in str(caught.value)
    with pytest.raises(EngineUnavailableError, match="ort-cpu: it runs on cpu only, not on cuda"):
        open_session(bundle, device="cuda", engine="ort-cpu", options=OPTIONS)


@pytest.mark.parametrize("name", ["tensorrt", "rtx", "cuda", "ort-cuda"])
def test_an_engine_by_name_without_a_gpu_says_what_helps(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In the same words for each: no package would."""
    monkeypatch.setattr(machine, "hidden_gpu", lambda: None)
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: False)
    monkeypatch.setattr("accel.engines.tensorrt.registry.current_sm", lambda: None)
    with pytest.raises(EngineUnavailableError, match=rf"\({name}: there is no NVIDIA GPU or driver here\)") as caught:
        open_session(bundle, engine=name, options=OPTIONS)
    told = caught.value.remedy or ""
    assert told.startswith("Run it where this process sees an NVIDIA GPU, or leave the engine out (--engine")
    assert "the device" not in told
    with pytest.raises(EngineUnavailableError, match="and the device: then"):
        open_session(bundle, device="cuda", engine=name, options=OPTIONS)


def with_fp16(bundle: Bundle, target: str) -> Bundle:
    """With one graph more, as if it were fp16's for a target."""
    manifest = bundle.manifest
    graphs = {target: manifest.variants["fp32"].graphs["ort-cpu"]}
    fp16 = dataclasses.replace(manifest.variants["fp32"], graphs=graphs)
    return Bundle(bundle.path, dataclasses.replace(manifest, variants={**manifest.variants, "fp16": fp16}))


@pytest.mark.parametrize(
    ("target", "variant", "on_cpu"),
    [("cuda", "fp16", False), ("ort-cpu", "fp16", True), ("cuda", "fp32", True), ("cuda", "fastest", True)],
)
def test_what_helps_without_a_gpu_depends_on_the_variant(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, target: str, variant: str, on_cpu: bool
) -> None:
    """One that no engine on the CPU runs is left out too, or it takes a GPU."""
    for module in (machine, engines):
        monkeypatch.setattr(module, "hidden_gpu", lambda: None)
        monkeypatch.setattr(module, "has_nvidia_device", lambda: False)
    added = with_fp16(bundle, target)
    with pytest.raises(EngineUnavailableError, match="^There is no NVIDIA GPU here") as caught:
        open_session(added, device="cuda", variant=variant, options=OPTIONS)
    assert ('device="cpu"' in str(caught.value)) is on_cpu
    assert (f"no engine on the CPU runs {variant!r}; or leave the variant and the" in str(caught.value)) is not on_cpu
    for device in ("auto", "cuda"):
        with pytest.raises(EngineUnavailableError, match="leave the engine out.*: then what runs") as caught:
            open_session(added, device=device, engine="cuda", variant=variant, options=OPTIONS)
        assert ("and the variant, which no engine on the CPU runs" in str(caught.value)) is not on_cpu


def flavours(monkeypatch: pytest.MonkeyPatch, *installed: str, runs: tuple[str, ...] = ()) -> None:
    """A registry of both flavours of TensorRT and ONNX Runtime, on a machine with a GPU."""
    ort = next(engine for engine in engines.ENGINES if engine.name == "ort-cpu")

    def flavour(name: str) -> Engine:
        why = "it has no engine" if name in installed else f"{name} is not installed"
        return Engine(name, "cuda", lambda *_: None if name in runs else why, ort.open, lambda: name in installed)

    monkeypatch.setattr(engines, "ENGINES", (flavour("tensorrt"), flavour("rtx"), ort))
    monkeypatch.setattr(engines, "has_nvidia_device", lambda: True)
    monkeypatch.setattr(engines, "hidden_gpu", lambda: None)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_strict_passes_over_a_flavour_that_is_not_installed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    flavours(monkeypatch, "rtx", runs=("rtx",))
    opened = open_session(bundle, device=device, options=OPTIONS, strict=True)
    assert opened.fallbacks == (Fallback("tensorrt", "tensorrt is not installed"),)
    opened.session.close()


@pytest.mark.parametrize(
    ("installed", "named", "reasons"),
    [
        (("rtx",), "auto", r"\(tensorrt: tensorrt is not installed; rtx: it has no engine\)"),
        (("tensorrt", "rtx"), "auto", r"\(tensorrt: it has no engine\)"),
        (("tensorrt",), "auto", r"\(tensorrt: it has no engine\)"),
        ((), "auto", r"\(tensorrt: tensorrt is not installed\)"),
        (("rtx",), "tensorrt", r"\(tensorrt: tensorrt is not installed\)"),
    ],
)
def test_strict_stops_at_the_best_that_is_installed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], named: str, reasons: str
) -> None:
    flavours(monkeypatch, *installed)
    with pytest.raises(EngineUnavailableError, match=reasons):
        open_session(bundle, engine=named, options=OPTIONS, strict=True)


def test_the_packages_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {engine.name: engine for engine in engines.ENGINES}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace())  # type: ignore[arg-type]
    assert [by_name[name].installed() for name in ("tensorrt", "rtx", "ort-cpu")] == [False, True, True]


@pytest.mark.parametrize("strict", [False, True])
def test_a_hidden_gpu_is_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    """Only where the machine chooses: nothing was asked of the GPU, so strict finds nothing wrong either."""
    flavours(monkeypatch, "rtx", runs=("rtx",))
    monkeypatch.setattr(engines, "hidden_gpu", lambda: "no device files")
    opened = open_session(bundle, options=OPTIONS, strict=strict)
    assert opened.fallbacks == (Fallback("cuda", "no device files"),) and opened.session.info.name == "ort-cpu"
    assert "ort-cpu runs because cuda cannot: no device files" in caplog.text
    opened.session.close()
    opened = open_session(bundle, device="cpu", options=OPTIONS, strict=strict, engine="ort-cpu")
    assert opened.fallbacks == ()
    opened.session.close()


def test_engines_of_an_absent_gpu_are_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that the bundle has graphs for: a precision was added for them. Nothing is logged: it is no surprise."""
    monkeypatch.setattr(engines, "has_nvidia_device", lambda: False)
    monkeypatch.setattr(engines, "hidden_gpu", lambda: None)
    added = with_fp16(bundle, "tensorrt")
    with caplog.at_level(logging.INFO):
        opened = open_session(added, options=OPTIONS)
    opened.session.close()
    assert [fallback.engine for fallback in opened.fallbacks] == ["tensorrt", "rtx"] and not caplog.text
    assert all("no NVIDIA GPU here" in fallback.reason for fallback in opened.fallbacks)
    opened = open_session(added, device="cpu", options=OPTIONS)
    assert opened.fallbacks == ()
    opened.session.close()
    missing = "tensorrt: the bundle has graphs for it, and there is no NVIDIA GPU here; "
    with pytest.raises(EngineUnavailableError, match=rf"no engine can run.*\({missing}.*ort-cpu: "):
        open_session(added, variant="fp16", options=OPTIONS)
    for asked in ({"strict": True}, {"device": "cpu"}, {"engine": "ort-cpu"}):  # none of them would take those engines
        with pytest.raises(EngineUnavailableError, match=r"can(not)? run this bundle here \(ort-cpu: "):
            open_session(added, variant="fp16", options=OPTIONS, **asked)


def test_engines_of_an_absent_gpu_are_those_of_the_variant(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has graphs of other variants alone would not run this one with a GPU."""
    monkeypatch.setattr(engines, "has_nvidia_device", lambda: False)
    monkeypatch.setattr(engines, "hidden_gpu", lambda: None)
    added = with_fp16(bundle, "ort-cuda")
    for variant, left_out in (("fp32", []), ("auto", ["ort-cuda"]), ("fastest", ["ort-cuda", "fastest"])):
        opened = open_session(added, variant=variant, options=OPTIONS)
        assert [fallback.engine for fallback in opened.fallbacks] == left_out
        opened.session.close()


def test_unknown_names_suggest_the_nearest(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="unknown engine 'ort-cup'.*'ort-cpu'"):
        open_session(bundle, engine="ort-cup")
    with pytest.raises(InputError, match="unknown device 'cuda:0'.*'cuda'"):
        open_session(bundle, device="cuda:0")
    for name in ("gpu", "GPU", "gpu:0"):
        with pytest.raises(InputError, match=f"unknown device '{name}'.*Did you mean 'cuda'"):
            open_session(bundle, device=name)
    with pytest.raises(BundleError, match="no variant 'int8'"):
        open_session(bundle, variant="int8")
    with pytest.raises(InputError, match="threads must be an integer of at least 1"):
        open_session(bundle, options=SessionOptions(threads=0))
    with pytest.raises(InputError, match="threads must be at most 1024, not 100000"):
        open_session(bundle, options=SessionOptions(threads=100_000))


def test_a_bundle_without_a_lowered_graph_runs_on_the_reference(bundle: Bundle) -> None:
    variant = dataclasses.replace(bundle.manifest.variants["fp32"], graphs={})
    bare = Bundle(bundle.path, dataclasses.replace(bundle.manifest, variants={"fp32": variant}))
    opened = open_session(bare, options=OPTIONS)
    assert opened.session.info.name == "torch"
    assert "no ort-cpu graph" in opened.fallbacks[0].reason


def test_a_graph_that_does_not_open_is_a_reason(bundle: Bundle, tmp_path: Path) -> None:
    damaged = write_bundle(tmp_path / "bundle", draw_weights())
    graph = damaged.path / "ort-cpu.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(EngineUnavailableError, match="ONNX Runtime failed"):
        open_session(damaged, options=OPTIONS, strict=True)
    assert open_session(damaged, options=OPTIONS).fallbacks[0].engine == "ort-cpu"


def test_old_onnxruntime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    with pytest.raises(DependencyError, match=r"1\.31\.1 is too old.*--upgrade"):
        common.import_onnxruntime()


def test_the_reference_needs_its_parameters(bundle: Bundle) -> None:
    bare = Bundle(bundle.path, dataclasses.replace(bundle.manifest, parameters={}))
    with pytest.raises(EngineUnavailableError, match="where the PyTorch parameters lie"):
        open_session(bare, engine="torch", options=OPTIONS)


def test_only_a_model_class_is_built(bundle: Bundle) -> None:
    arch = dataclasses.replace(bundle.manifest.arch, architecture="AutoConfig")
    forged = Bundle(bundle.path, dataclasses.replace(bundle.manifest, arch=arch))
    with pytest.raises(EngineUnavailableError, match="no model 'AutoConfig'"):
        open_session(forged, engine="torch")


def test_parameters_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    entry = bundle.manifest.parameters["lm_head.weight"]
    wrong = {**bundle.manifest.parameters, "lm_head.weight": dataclasses.replace(entry, shape=(32, 61))}
    with pytest.raises(BundleError, match="lm_head.weight has shape"):
        open_session(Bundle(bundle.path, dataclasses.replace(bundle.manifest, parameters=wrong)), engine="torch")
    fewer = {name: entry for name, entry in bundle.manifest.parameters.items() if name != "model.norm.weight"}
    with pytest.raises(BundleError, match=r"lacks the parameter model\.norm\.weight"):
        open_session(Bundle(bundle.path, dataclasses.replace(bundle.manifest, parameters=fewer)), engine="torch")


def test_ort_errors_become_engine_errors() -> None:
    with pytest.raises(EngineError, match="ran out of memory.*smaller batch"), common.translated_errors("here"):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
    with pytest.raises(EngineError, match=r"RuntimeError: odd \(at here\)"), common.translated_errors("here"):
        raise RuntimeError("odd")


def test_registry_names_are_what_sessions_say(bundle: Bundle) -> None:
    for engine in (engine for engine in engines.ENGINES if engine.name in ("ort-cpu", "torch")):
        opened = open_session(bundle, engine=engine.name, options=OPTIONS)
        assert opened.session.info.name == engine.name and opened.session.info.device == engine.device
        opened.session.close()
