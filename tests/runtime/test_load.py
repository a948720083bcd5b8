"""``accel.load``: which class comes back, what its properties say, which arguments are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import accel
from accel.errors import BundleError, CapacityError, EngineUnavailableError, InputError
from accel.runtime.decoder import Decoder
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
    with pytest.raises(EngineUnavailableError, match="no engine for cuda"):
        accel.load(path, device="cuda")
    with pytest.raises(BundleError, match="no variant 'int4'"):
        accel.load(path, variant="int4")
    with pytest.raises(BundleError, match="no bundle directory"):
        accel.load(tmp_path / "nothing")
