"""``accel.load``: which class comes back, what its properties say, which arguments are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

import accel
from accel.bundle import BundleWriter
from accel.errors import BundleError, CapacityError, EngineUnavailableError, InputError
from accel.manifest import GraphEntry, Variant
from accel.runtime.decoder import Decoder
from accel.runtime.encoder import Encoder
from accel.spec import TensorSpec
from tests import bundle_samples
from tests.engines import test_encoder_sessions as tiny_encoder
from tests.engines.tiny_llama import ARCH, POSITIONS, draw_weights, write_bundle


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("load") / "bundle", draw_weights()).path


def test_a_decoder_says_what_it_is(path: Path) -> None:
    with accel.load(path, max_batch=2, threads=1) as lm:
        assert isinstance(lm, Decoder)
        assert lm.engine.name == "ort-cpu" and lm.engine.threads == 1 and lm.fallbacks == ()
        assert lm.arch == ARCH
        assert (lm.capacity, lm.max_batch) == (POSITIONS, 2)


def test_arguments_reach_the_engine(path: Path) -> None:
    with accel.load(str(path), device="cpu", engine="torch", variant="fp32", capacity=20, strict=True) as lm:
        assert isinstance(lm, Decoder)
        assert lm.engine.name == "torch" and lm.capacity == 20


def test_bad_arguments(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="exceeds the 512 positions"):
        accel.load(path, capacity=POSITIONS + 1)
    with pytest.raises(InputError, match="max_batch must be"):
        accel.load(path, max_batch=0)
    with pytest.raises(InputError, match="unknown engine 'orr'"):
        accel.load(path, engine="orr")
    with pytest.raises(EngineUnavailableError, match="ort-cpu: it runs on cpu only, not on cuda"):
        accel.load(path, device="cuda", engine="ort-cpu")
    with pytest.raises(BundleError, match="no variant 'int4'"):
        accel.load(path, variant="int4")
    with pytest.raises(BundleError, match="no bundle directory"):
        accel.load(tmp_path / "nothing")


def test_an_encoder_comes_back_as_one_and_takes_no_cache_options(tmp_path: Path) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    with BundleWriter(tmp_path / "bundle") as writer:
        onnx.save(tiny_encoder.graph(), writer.path / "g.onnx")
        variants = {"fp32": Variant("float32", (), {"ort-cpu": GraphEntry("g.onnx", 20, inputs, (), ())})}
        arch = dataclasses.replace(bundle_samples.ARCH, vocab_size=tiny_encoder.VOCAB)
        manifest = dataclasses.replace(bundle_samples.manifest(), arch=arch, variants=variants, parameters={})
        path = writer.commit(manifest).path
    with accel.load(path, threads=2) as encoder:
        assert isinstance(encoder, Encoder) and encoder.engine.name == "ort-cpu"
        feeds = tiny_encoder.batch([5, 3])
        tiny_encoder.check(feeds, dict(encoder(**feeds)))
    for option in ("capacity", "max_batch"):
        with pytest.raises(InputError, match=f"{option} sizes a decoder's cache"):
            accel.load(path, **{option: 4})
