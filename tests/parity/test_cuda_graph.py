"""The fused graphs of the cuda engine: no precision loses more than eager PyTorch does in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.graph.evaluation.sessions import PackedDecoder
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.cuda import lower
from accel.graph.save import load_canonical
from accel.spec import OUTPUT_NAMES, ArchSpec
from tests.parity.comparison import (
    COURSES,
    decoder_yardstick,
    deviation,
    draw_rows,
    encoder_batches,
    encoder_outputs,
    encoder_references,
    excess,
    flatten_real,
    run_course,
    select,
    widest,
)
from tests.parity.families import DECODERS, ENCODERS, HEADS
from tests.parity.test_tensorrt_graph import FLOAT, SLACK, TORCH, half_encoder, half_logits

BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]


def lowered(folder: Path, dtype: ir.DataType) -> tuple[ir.Model, ArchSpec]:
    bundle = Bundle.open(folder)
    arch = bundle.manifest.arch
    model = load_canonical(bundle.file(bundle.graph("fp32", "canonical").file))
    return lower(model, arch, arch.max_positions, dtype)[0], arch


def decode(model: ir.Model, arch: ArchSpec, dtype: ir.DataType, course: str) -> list[NDArray[np.float32]]:
    session = PackedDecoder(TorchGraph(model).run, arch, 3, 128, dtype)
    return run_course(session, draw_rows(), COURSES[course])


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    model, arch = lowered(bundle_of(name), FLOAT)
    own, exact = decoder_yardstick(plain_model(name), draw_rows())
    worst = {}
    for course in COURSES:
        found = decode(model, arch, FLOAT, course)
        worst[course] = excess(deviation(np.concatenate(found), select(found, exact)), own)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("name", DECODERS)
def test_low_precision_decoder(name: str, dtype: ir.DataType, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    model, arch = lowered(bundle_of(name), dtype)
    plain, rows = plain_model(name), draw_rows()
    _, exact = decoder_yardstick(plain, rows)
    eager = [logits.astype(np.float32) for logits in half_logits(plain, rows, TORCH[dtype])]
    own = deviation(np.concatenate(eager), np.concatenate(exact))
    found = decode(model, arch, dtype, "rows that join, wait and go")
    assert deviation(np.concatenate(found), select(found, exact)).rms <= SLACK * own.rms


@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_encoder(name: str, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    model, arch = lowered(bundle_of(name), FLOAT)
    plain, names = plain_model(name), list(OUTPUT_NAMES[arch.task])
    batches = encoder_batches(plain)
    references = {batch: encoder_references(plain, feeds, names) for batch, feeds in batches.items()}
    flat = {batch: [flatten_real(part, batches[batch]) for part in references[batch]] for batch in batches}
    own = widest(*(deviation(*pair) for pair in flat.values()))
    run = TorchGraph(model).run
    worst = {
        batch: excess(deviation(flatten_real({key: run(feeds)[key] for key in names}, feeds), flat[batch][1]), own)
        for batch, feeds in batches.items()
    }
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_low_precision_encoder(name: str, dtype: ir.DataType, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    model, arch = lowered(bundle_of(name), dtype)
    plain, names = plain_model(name), list(OUTPUT_NAMES[arch.task])
    low = half_encoder(plain, TORCH[dtype])
    run, errors = TorchGraph(model).run, []
    for feeds in encoder_batches(plain).values():
        _, exact = encoder_references(plain, feeds, names)
        eager, found = encoder_outputs(low, feeds, names), run(feeds)
        target = flatten_real(exact, feeds)
        pair = [flatten_real({key: part[key] for key in names}, feeds) for part in (found, eager)]
        errors.append([deviation(part, target).rms for part in pair])
    ours, theirs = np.sqrt(np.mean(np.square(errors), axis=0))
    assert ours <= SLACK * theirs, (ours, theirs)
