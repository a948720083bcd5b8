"""The engine of ONNX Runtime CUDA, every family, on the CPU provider in fp32; ``test_gpu_engines`` has it on a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.engines.ort_cuda.provider import Provider
from accel.spec import OUTPUT_NAMES
from accel.variants import add_variant
from tests.engines.ort_cuda.stand_in import CPU, fake_gpu, open_decoder, open_encoder
from tests.parity.comparison import (
    COURSES,
    decoder_yardstick,
    deviation,
    draw_rows,
    encoder_batches,
    encoder_references,
    excess,
    flatten_real,
    run_course,
    select,
    widest,
)
from tests.parity.families import DECODERS, ENCODERS, HEADS

BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    """Every course of steps; also as runs that are captured, which get an upper bound for the lengths."""
    bundle = add_variant(shutil.copytree(bundle_of(name), tmp_path / name), "fp32", target="ort-cuda", check=False)
    rows = draw_rows()
    own, exact = decoder_yardstick(plain_model(name), rows)
    worst = {}
    providers: dict[str, Provider] = {"plain": CPU, "captured": fake_gpu()}
    for kind, provider in providers.items():
        session = open_decoder(bundle, 3, 64, provider)
        for course, steps in COURSES.items():
            found = run_course(session, rows, steps)
            worst[kind, course] = excess(deviation(np.concatenate(found), select(found, exact)), own)
        session.close()
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_encoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    bundle = add_variant(shutil.copytree(bundle_of(name), tmp_path / name), "fp32", target="ort-cuda", check=False)
    plain, names = plain_model(name), list(OUTPUT_NAMES[bundle.manifest.arch.task])
    batches = encoder_batches(plain)
    flat = {}
    for batch, feeds in batches.items():
        flat[batch] = [flatten_real(part, feeds) for part in encoder_references(plain, feeds, names)]
    own = widest(*(deviation(*pair) for pair in flat.values()))
    session = open_encoder(bundle)
    worst = {}
    for batch, feeds in batches.items():
        outputs = session.run(feeds)
        found = flatten_real({key: outputs[key] for key in names}, feeds)
        worst[batch] = excess(deviation(found, flat[batch][1]), own)
    session.close()
    assert max(worst.values()) <= 1, worst
