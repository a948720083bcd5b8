"""OpenVINO, every family of encoders: fp32 loses no more than eager fp32, bf16 no more than eager bf16."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import SessionOptions
from accel.spec import OUTPUT_NAMES
from accel.variants import add_variant
from tests.engines.openvino.needs import needs_bfloat16, needs_openvino
from tests.parity.comparison import (
    deviation,
    encoder_batches,
    encoder_outputs,
    encoder_references,
    excess,
    flatten_real,
    widest,
)
from tests.parity.families import ENCODERS, HEADS
from tests.parity.test_tensorrt_graph import SLACK, half_encoder

pytestmark = needs_openvino
NAMES = [*ENCODERS, *HEADS]
BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]
Opened = Callable[[str, str], Any]


@pytest.fixture
def opened(bundle_of: BundleOf, tmp_path: Path) -> Iterator[Opened]:
    """``opened(family, variant)`` is a session on OpenVINO."""
    sessions = []

    def get(name: str, variant: str) -> Any:
        folder = shutil.copytree(bundle_of(name), tmp_path / name)
        bundle: Bundle = add_variant(folder, variant, target="openvino", check=False)
        found = open_session(bundle, engine="openvino", variant=variant, options=SessionOptions(1))
        sessions.append(found.session)
        return found.session

    yield get
    for session in sessions:
        session.close()


@pytest.mark.parametrize("name", NAMES)
def test_fp32(name: str, opened: Opened, plain_model: ModelOf) -> None:
    session, plain = opened(name, "fp32"), plain_model(name)
    batches = encoder_batches(plain)
    names = list(session.run(next(iter(batches.values()))))
    references = {batch: encoder_references(plain, feeds, names) for batch, feeds in batches.items()}
    flat = {batch: [flatten_real(part, batches[batch]) for part in references[batch]] for batch in batches}
    own = widest(*(deviation(*pair) for pair in flat.values()))
    worst = {}
    for batch, feeds in batches.items():
        found = flatten_real(session.run(feeds), feeds)
        worst[batch] = excess(deviation(found, flat[batch][1]), own)
    assert max(worst.values()) <= 1, worst


@needs_bfloat16
@pytest.mark.parametrize("name", NAMES)
def test_bf16(name: str, opened: Opened, plain_model: ModelOf, bundle_of: BundleOf) -> None:
    session, plain = opened(name, "bf16"), plain_model(name)
    names = list(OUTPUT_NAMES[Bundle.open(bundle_of(name)).manifest.arch.task])
    low, errors = half_encoder(plain, torch.bfloat16), []
    for feeds in encoder_batches(plain).values():
        _, exact = encoder_references(plain, feeds, names)
        eager, found = encoder_outputs(low, feeds, names), session.run(feeds)
        target = flatten_real(exact, feeds)
        pair = [flatten_real({key: part[key] for key in names}, feeds) for part in (found, eager)]
        errors.append([deviation(part, target).rms for part in pair])
    ours, theirs = np.sqrt(np.mean(np.square(errors), axis=0))
    assert ours <= SLACK * theirs, (ours, theirs)
