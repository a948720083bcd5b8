"""The cuda engine itself, every family, on Triton's interpreter: as near to fp64 as eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import INTERPRETED, open_device
from accel.engines.cuda.encoder import CudaEncoderSession
from accel.engines.kv_cache import CacheShape
from accel.graph.external import write_external
from accel.graph.save import save_graph
from accel.spec import OUTPUT_NAMES
from tests.parity.comparison import (
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
from tests.parity.test_cuda_graph import lowered

BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]
# A prompt beside another, a step together, one row waits, one joins with a prompt, tokens of three rows, a long chunk.
COURSE = [(5, 7, 0), (1, 1, 0), (1, 0, 0), (4, 0, 9), (1, 1, 1), (0, 12, 1)]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """The interpreter computes on masked lanes, whose rubbish may overflow."""
    if not INTERPRETED:
        pytest.skip("there is a GPU: tests/parity/test_gpu_engines.py runs it")
    np.seterr(all="ignore")


def graph_file(name: str, bundle_of: BundleOf, folder: Path) -> tuple[Path, Any]:
    model, arch = lowered(bundle_of(name), ir.DataType.FLOAT)
    write_external(model, folder / "weights")
    save_graph(model, folder / "graph.onnx", (), (), "0")
    return folder / "graph.onnx", arch


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    path, arch = graph_file(name, bundle_of, tmp_path)
    session = CudaDecoderSession(path, arch, "fp32", CacheShape(3, 64), open_device(), torch.float32)
    rows = draw_rows()
    own, exact = decoder_yardstick(plain_model(name), rows)
    found = run_course(session, rows, COURSE)
    session.close()
    assert excess(deviation(np.concatenate(found), select(found, exact)), own) <= 1


@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_encoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    path, arch = graph_file(name, bundle_of, tmp_path)
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    program, plan = session._executor.program, session._plan
    per_token = {node for node in program.matrices if len(node.outputs[0].shape or ()) == 3}
    assert plan is not None and per_token and all(node.outputs[0] in plan.values for node in per_token)
    plain, names = plain_model(name), list(OUTPUT_NAMES[arch.task])
    batches = encoder_batches(plain)
    references = {batch: encoder_references(plain, feeds, names) for batch, feeds in batches.items()}
    flat = {batch: [flatten_real(part, batches[batch]) for part in references[batch]] for batch in batches}
    own = widest(*(deviation(*pair) for pair in flat.values()))
    worst = {}
    for batch in ("short and long", "one token"):  # the interpreter takes its time; the graph's test has them all
        found = flatten_real(session.run(batches[batch]), batches[batch])
        worst[batch] = excess(deviation(found, flat[batch][1]), own)
    session.close()
    assert max(worst.values()) <= 1, worst
