"""The engine of ONNX Runtime CUDA, every family: on the CPU provider in fp32 here, on a GPU in fp16 and bf16."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accel
from accel.engines import open_session
from accel.engines.ort_cuda.provider import Provider
from accel.engines.session import SessionOptions
from accel.spec import OUTPUT_NAMES
from accel.variants import LIMITS, add_variant
from tests.engines.ort_cuda.gpu import needs_gpu
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
from tests.parity.families import ALL, DECODERS, ENCODERS, HEADS, build_model

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


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *HEADS])
def test_on_a_gpu(name: str, variant: str, tmp_path: Path) -> None:
    """Within the variant's limit of PyTorch in fp32; greedy tokens wherever the margin exceeds the error.

    Nothing here needs ONNX Runtime 1.32, which cannot be installed beside onnxruntime-gpu.
    """
    unchecked = {"parity": {"enabled": False}}
    accel.export(build_model(name), tmp_path / name, unchecked, task=ALL[name].task, show_progress=False)
    bundle = add_variant(tmp_path / name, variant, target="ort-cuda", check=False)
    options = SessionOptions(capacity=64, max_batch=3)
    opened: Any = open_session(bundle, engine="ort-cuda", variant=variant, options=options).session
    exact: Any = open_session(bundle, engine="torch", variant="fp32", options=options).session
    if bundle.manifest.arch.kind == "decoder":
        for steps in COURSES.values():
            found, expected = (np.concatenate(run_course(one, draw_rows(), steps)) for one in (opened, exact))
            check(found, expected, LIMITS[variant])
            error = np.abs(found - expected).max()
            best = np.partition(expected, -2, axis=-1)[:, -2:]
            clear = best[:, 1] - best[:, 0] > 2 * error
            assert (found.argmax(-1) == expected.argmax(-1))[clear].all()
        assert not opened.notes, "decode steps are captured"
    else:
        rng = np.random.default_rng(3)
        real = np.arange(30) < np.array([30, 7, 19])[:, None]
        feeds = {
            "input_ids": np.where(real, rng.integers(1, 90, real.shape), 0),
            "attention_mask": real.astype(np.int64),
        }
        outputs, references = opened.run(feeds), exact.run(feeds)
        for key in OUTPUT_NAMES[bundle.manifest.arch.task]:
            found, expected = (flatten_real({key: part[key]}, feeds) for part in (outputs, references))
            check(found, expected, LIMITS[variant])
    opened.close()
    exact.close()


def check(found: np.ndarray, expected: np.ndarray, limit: float) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()
