"""The graphs of ONNX Runtime's CUDA dialect: no precision loses more than eager PyTorch does in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.graph.evaluation.sessions import GroupedDecoder, MaskedEncoder, Run
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.ort_cuda import lower
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
from tests.parity.families import ALL, DECODERS, ENCODERS, HEADS
from tests.parity.test_tensorrt_graph import FLOAT, SLACK, TORCH, half_encoder, half_logits, runs

BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]


def lowered(folder: Path, dtype: ir.DataType) -> tuple[ir.Model, ArchSpec]:
    bundle = Bundle.open(folder)
    arch = bundle.manifest.arch
    model = load_canonical(bundle.file(bundle.graph("fp32", "canonical").file))
    return lower(model, arch, arch.max_positions, dtype)[0], arch


def decode(run: Run, arch: ArchSpec, dtype: ir.DataType, course: str) -> list[NDArray[np.float32]]:
    return run_course(GroupedDecoder(run, arch, 3, 128, dtype, max_logits=7), draw_rows(), COURSES[course])


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    """Every course of steps, on PyTorch and on ONNX Runtime's CPU kernels."""
    model, arch = lowered(bundle_of(name), FLOAT)
    own, exact = decoder_yardstick(plain_model(name), draw_rows())
    worst = {}
    for runtime, run in runs(model, tmp_path).items():
        for course in COURSES:
            found = decode(run, arch, FLOAT, course)
            worst[runtime, course] = excess(deviation(np.concatenate(found), select(found, exact)), own)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("name", DECODERS)
def test_low_precision_decoder(name: str, dtype: ir.DataType, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    model, arch = lowered(bundle_of(name), dtype)
    plain, rows = plain_model(name), draw_rows()
    _, exact = decoder_yardstick(plain, rows)
    eager = [logits.astype(np.float32) for logits in half_logits(plain, rows, TORCH[dtype])]
    own = deviation(np.concatenate(eager), np.concatenate(exact))
    found = decode(TorchGraph(model).run, arch, dtype, "rows that join, wait and go")
    assert deviation(np.concatenate(found), select(found, exact)).rms <= SLACK * own.rms


@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_encoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    """Full and padded batches, and masks with holes."""
    model, arch = lowered(bundle_of(name), FLOAT)
    plain, names = plain_model(name), list(OUTPUT_NAMES[arch.task])
    batches = encoder_batches(plain)
    batches["holes"] = {key: array.copy() for key, array in batches["full"].items()}
    batches["holes"]["attention_mask"][:, 3:9] = 0
    references = {batch: encoder_references(plain, feeds, names) for batch, feeds in batches.items()}
    flat = {batch: [flatten_real(part, batches[batch]) for part in references[batch]] for batch in batches}
    own = widest(*(deviation(*pair) for pair in flat.values()))
    worst = {}
    for runtime, run in runs(model, tmp_path).items():
        for batch, feeds in batches.items():
            found = flatten_real(MaskedEncoder(run).run(feeds), feeds)
            worst[runtime, batch] = excess(deviation(found, flat[batch][1]), own)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_low_precision_encoder(name: str, dtype: ir.DataType, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    model, arch = lowered(bundle_of(name), dtype)
    plain, names = plain_model(name), list(OUTPUT_NAMES[arch.task])
    low = half_encoder(plain, TORCH[dtype])
    session, errors = MaskedEncoder(TorchGraph(model).run, dtype), []
    for feeds in encoder_batches(plain).values():
        _, exact = encoder_references(plain, feeds, names)
        eager, found = encoder_outputs(low, feeds, names), session.run(feeds)
        target = flatten_real(exact, feeds)
        pair = [flatten_real({key: part[key] for key in names}, feeds) for part in (found, eager)]
        errors.append([deviation(part, target).rms for part in pair])
    ours, theirs = np.sqrt(np.mean(np.square(errors), axis=0))
    assert ours <= SLACK * theirs, (ours, theirs)


@pytest.mark.parametrize("name", ALL)
def test_types_agree(name: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """Every value's type and shape as ONNX infers them, where it knows the operators."""
    for dtype in (FLOAT, *TORCH):
        model, _ = lowered(bundle_of(name), dtype)
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)  # type: ignore[union-attr]
        onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("name", DECODERS)
def test_the_token_is_the_first_largest_logit(name: str, bundle_of: BundleOf) -> None:
    model, arch = lowered(bundle_of(name), FLOAT)
    decoder = _Remembering(TorchGraph(model).run, arch, 3, 64)
    run_course(decoder, draw_rows(), COURSES["ragged batch"])
    assert decoder.compared > 0


class _Remembering(GroupedDecoder):
    compared = 0

    def __init__(self, run: Run, *rest: Any) -> None:
        def compare(feeds: Any) -> dict[str, NDArray]:
            outputs = run(feeds)
            np.testing.assert_array_equal(outputs["token"], outputs["logits"].argmax(-1))
            self.compared += len(outputs["token"])
            return outputs

        super().__init__(compare, *rest)
