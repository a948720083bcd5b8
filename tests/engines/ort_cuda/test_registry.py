"""When the engine is taken, with what variant, and what is said when it cannot be."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import accel
from accel import machine
from accel.bundle import Bundle
from accel.engines import ENGINES, open_session
from accel.engines.gpu_memory import OutOfMemoryError
from accel.engines.kv_cache import bytes_per_token
from accel.engines.ort_cuda import registry
from accel.engines.ort_cuda.decoder import OrtCudaDecoderSession
from accel.engines.session import SessionOptions
from accel.errors import CapacityError, EngineUnavailableError
from accel.variants import add_variant, is_current
from tests.engines.captures import DISTURBED, others_may_capture
from tests.engines.ort_cuda.stand_in import CPU, fake_gpu

GIB = 1 << 30


@pytest.fixture(scope="module")
def decoder(tiny_decoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle = Bundle.open(shutil.copytree(tiny_decoder_bundle, tmp_path_factory.mktemp("registry") / "decoder"))
    for variant in ("bf16", "fp32", "fp16"):
        bundle = add_variant(bundle, variant, target="ort-cuda", check=False)
    return bundle


@pytest.fixture(scope="module")
def encoder(minilm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(minilm_bundle, tmp_path_factory.mktemp("registry") / "encoder")
    return add_variant(folder, "fp32", target="ort-cuda", check=False)


def without(bundle: Bundle, *variants: str) -> Bundle:
    kept = {name: variant for name, variant in bundle.manifest.variants.items() if name not in variants}
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, variants=kept))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which everything is there, but whose provider is the CPU's; fp32 decoders count."""
    monkeypatch.setattr(registry, "import_onnxruntime_gpu", lambda: onnxruntime)
    monkeypatch.setattr(registry, "missing_gpu", lambda: None)
    monkeypatch.setattr(registry, "Provider", lambda ort: fake_gpu())
    monkeypatch.setattr(registry, "free_memory", lambda: 8 * GIB)
    monkeypatch.setattr(registry, "pick_precision", lambda bundle, variant: "fp32")


def test_its_place_in_the_order() -> None:
    names = [engine.name for engine in ENGINES]
    assert names == ["tensorrt", "rtx", "cuda", "ort-cuda", "ort-cpu", "openvino", "torch"]
    assert next(engine for engine in ENGINES if engine.name == "ort-cuda").device == "cuda"


def test_the_variant(decoder: Bundle, encoder: Bundle) -> None:
    pick = registry.pick_precision
    assert pick(decoder, "auto") == "fp16" and pick(without(decoder, "fp16"), "auto") == "bf16"
    assert pick(decoder, "bf16") == "bf16" and pick(encoder, "auto") == "fp32" and pick(encoder, "fp16") is None
    assert pick(decoder, "fp32") is None, "its attention would run on the CPU"
    assert pick(without(decoder, "fp16", "bf16"), "auto") is None


def test_reasons(decoder: Bundle, encoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "missing_gpu", lambda: "there is no GPU")
    assert registry.probe(decoder, "auto") == "there is no GPU", "installing a package would not help"
    monkeypatch.setattr(registry, "missing_gpu", lambda: None)
    assert "onnxruntime-gpu is not installed; onnxruntime" in (registry.probe(decoder, "auto") or "")
    monkeypatch.setattr(registry, "import_onnxruntime_gpu", lambda: onnxruntime)
    assert registry.probe(decoder, "auto") is None
    command = f"accel quantize {encoder.path} --variant fp16 --target ort-cuda adds one"
    assert command in (registry.probe(encoder, "fp16") or "")
    refused = "ONNX Runtime CUDA does not run 'w8a8-dyn': its kernels take floats times integer weights in groups"
    assert refused in (registry.probe(encoder, "w8a8-dyn") or "")
    assert "takes fp16 and bf16, not fp32" in (registry.probe(decoder, "fp32") or "")


def test_a_graph_of_an_older_accel_is_passed_over(decoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next engine runs; what is said makes it anew."""
    monkeypatch.setattr(registry, "import_onnxruntime_gpu", lambda: onnxruntime)
    monkeypatch.setattr(registry, "missing_gpu", lambda: None)
    fp16 = decoder.manifest.variants["fp16"]
    graph = fp16.graphs["ort-cuda"]
    older = dataclasses.replace(graph, outputs=tuple(o for o in graph.outputs if o.name != "token_logit"), lowering=1)
    known = dataclasses.replace(fp16, graphs={**fp16.graphs, "ort-cuda": older})
    variants = {**decoder.manifest.variants, "fp16": known}
    bundle = Bundle(decoder.path, dataclasses.replace(decoder.manifest, variants=variants))
    command = f"accel quantize {decoder.path} --variant fp16 --target ort-cuda"
    assert registry.probe(bundle, "auto") == f"an older accel made its graph: {command} makes it anew"
    assert not is_current(bundle, "fp16", "ort-cuda") and registry.probe(bundle, "bf16") is None


def test_it_is_passed_over_here_with_its_reason(decoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_session(decoder, device="auto", options=SessionOptions(1, 32, 2))
    assert opened.session.info.name == "ort-cpu" and opened.session.info.variant == "fp32", "never fp16 on a CPU"
    opened.session.close()
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: False)
    monkeypatch.setattr(machine, "hidden_gpu", lambda: None)
    with pytest.raises(EngineUnavailableError, match=r"\(ort-cuda: there is no NVIDIA GPU or driver here\)") as caught:
        open_session(decoder, engine="ort-cuda")
    assert "pip" not in str(caught.value)


@pytest.mark.usefixtures("gpu")
def test_a_decoder_through_the_public_door(decoder: Bundle) -> None:
    with accel.load(decoder.path, engine="ort-cpu", threads=1, capacity=64, max_batch=2) as model:
        expected = [result.ids for result in model.generate(["hello", "you"], max_new_tokens=8, do_sample=False)]
    with accel.load(decoder.path, engine="ort-cuda", capacity=64, max_batch=2) as model:
        assert model.engine.name == "ort-cuda"
        found = [result.ids for result in model.generate(["hello", "you"], max_new_tokens=8, do_sample=False)]
    assert found == expected


@pytest.mark.usefixtures("gpu")
def test_an_encoder_through_the_public_door(encoder: Bundle) -> None:
    texts = ["a sentence", "another one, longer than that"]
    with accel.load(encoder.path, engine="ort-cpu", threads=1) as model:
        expected = model.embed(texts)
    with accel.load(encoder.path, engine="ort-cuda") as model:
        assert model.engine.name == "ort-cuda"
        assert np.abs(model.embed(texts) - expected).max() < 1e-4


@pytest.mark.usefixtures("gpu")
def test_a_sequence_goes_on_elsewhere_when_cuda_fails(decoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def fail(io: Any, options: Any) -> None:
        if steps and len(steps) > 3:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    plain = OrtCudaDecoderSession.greedy
    monkeypatch.setattr(registry, "Provider", lambda ort: fake_gpu(fail))
    monkeypatch.setattr(
        OrtCudaDecoderSession, "greedy", lambda self, inputs: plain(self, inputs) if not steps.append(1) else None
    )
    monkeypatch.setattr("accel.engines.has_nvidia_device", lambda: True)
    monkeypatch.setattr("accel.engines.hidden_gpu", lambda: None)
    with accel.load(decoder.path, engine="ort-cpu", threads=1, capacity=64, max_batch=1) as model:
        expected = model.generate("hello", max_new_tokens=10, do_sample=False).ids
    with accel.load(decoder.path, threads=1, capacity=64, max_batch=1) as model:
        assert model.engine.name == "ort-cuda"
        assert model.generate("hello", max_new_tokens=10, do_sample=False).ids == expected
        assert model.engine.name == "ort-cpu"
        assert any("illegal memory access" in fallback.reason for fallback in model.fallbacks)


def test_capacity_comes_from_the_gpus_memory(decoder: Bundle) -> None:
    room = registry.RESERVE + registry._weight_bytes(decoder, "fp32")
    options = SessionOptions(max_batch=2)
    session: Any = registry.open_on(CPU, decoder, "fp32", options, 8 * GIB)
    assert session.capacity == decoder.manifest.arch.max_positions
    session.close()
    row = 2 * bytes_per_token(decoder.manifest.arch, 4)  # of both rows
    small: Any = registry.open_on(CPU, decoder, "fp32", options, room + 200 * row)
    assert small.capacity == 100, "half of what is free"
    small.close()


def test_what_does_not_fit(decoder: Bundle, encoder: Bundle) -> None:
    room = registry.RESERVE + registry._weight_bytes(decoder, "fp32")
    row = 2 * bytes_per_token(decoder.manifest.arch, 4)
    fits = "Ask for a capacity of at most 50 with max_batch 2, or for a max_batch of at most 1 with capacity 64"
    with pytest.raises(CapacityError, match=f"2 rows of 64 positions.*{fits}"):
        registry.open_on(CPU, decoder, "fp32", SessionOptions(capacity=64, max_batch=2), room + 50 * row)
    with pytest.raises(EngineUnavailableError, match="not one cache position fits"):
        registry.open_on(CPU, decoder, "fp32", SessionOptions(), room + 1)
    for bundle in (decoder, encoder):
        with pytest.raises(EngineUnavailableError, match="the GPU has 1,000 bytes free; the weights take"):
            registry.open_on(CPU, bundle, "fp32", SessionOptions(), 1000)


def test_what_turns_out_not_to_fit(decoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OutOfMemoryError("ONNX Runtime ran out of device memory", where="allocating device memory")

    monkeypatch.setattr("accel.engines.ort_cuda.memory.Allocator.allocate", full)
    room = 200 * bytes_per_token(decoder.manifest.arch, 4)
    weights = registry._weight_bytes(decoder, "fp32")
    monkeypatch.setattr(registry, "free_memory", lambda: registry.RESERVE + weights + room)
    fits = "Ask for a capacity of at most 25 with max_batch 8, or for a max_batch of at most 3 with capacity 64"
    with pytest.raises(CapacityError, match=fits):
        registry.open_on(CPU, decoder, "fp32", SessionOptions(capacity=64), 8 * GIB)
    with pytest.raises(EngineUnavailableError, match="ran out of device memory.*Close other programs.*Ask for a cap"):
        registry.open_on(CPU, decoder, "fp32", SessionOptions(), 8 * GIB)
    monkeypatch.setattr(registry, "free_memory", lambda: registry.RESERVE + weights // 2)
    with pytest.raises(EngineUnavailableError, match=f"out of device memory; the weights take {weights:,} bytes"):
        registry.open_on(CPU, decoder, "fp32", SessionOptions(capacity=64), 8 * GIB)


def test_what_a_load_that_failed_held_is_free_at_once(decoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[OrtCudaDecoderSession]] = []

    def full(io: Any, options: Any) -> None:
        if options is not None and options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("CUDA failure 2: out of memory")

    def opened(self: OrtCudaDecoderSession, *arguments: Any) -> None:
        held.append(weakref.ref(self))
        plain(self, *arguments)

    plain = OrtCudaDecoderSession.__init__
    monkeypatch.setattr(OrtCudaDecoderSession, "__init__", opened)
    monkeypatch.setattr(registry, "free_memory", lambda: [one() for one in held] == [None] and 8 * GIB)
    with pytest.raises(EngineUnavailableError, match="out of device memory"):
        registry.open_on(fake_gpu(full), decoder, "fp32", SessionOptions(), 8 * GIB)
    assert len(held) == 1 and held[0]() is None


def test_a_load_amid_anothers_capture_is_tried_again(decoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[bool] = []

    def disturbed(*_: Any) -> Any:
        tries.append(others_may_capture())
        if len(tries) == 1:
            raise RuntimeError(DISTURBED["onnxruntime"])
        return plain(*_)

    plain = OrtCudaDecoderSession._allocate
    monkeypatch.setattr(OrtCudaDecoderSession, "_allocate", disturbed)
    registry.open_on(CPU, decoder, "fp32", SessionOptions(), 8 * GIB).close()
    assert tries == [True, False], "the second time nobody captures"


def test_an_encoder_that_turns_out_not_to_fit(encoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutOfMemoryError("ONNX Runtime ran out of device memory", where="opening the graph")

    monkeypatch.setattr("accel.engines.ort_cuda.provider.Provider.open", full)
    weights = registry._weight_bytes(encoder, "fp32")
    with pytest.raises(EngineUnavailableError, match=f"out of device memory; the weights take {weights:,} bytes"):
        registry.open_on(CPU, encoder, "fp32", SessionOptions(), 8 * GIB)
