"""A small decoder on the cuda engine, on Triton's interpreter, and beside it on ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import open_device
from accel.engines.kv_cache import CacheShape
from accel.engines.session import SessionOptions
from accel.graph.external import write_external
from accel.graph.lowering.cuda import lower
from accel.graph.save import load_canonical, save_graph
from accel.spec import ArchSpec
from tests.engines.cuda.steps import CAPACITY, ROWS


@pytest.fixture(scope="module")
def graph(tiny_decoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArchSpec]:
    bundle = Bundle.open(tiny_decoder_bundle)
    arch = bundle.manifest.arch
    model = load_canonical(bundle.file(bundle.graph("fp32", "canonical").file))
    lowered, _ = lower(model, arch, arch.max_positions, ir.DataType.FLOAT)
    folder = tmp_path_factory.mktemp("cuda")
    write_external(lowered, folder / "weights")
    save_graph(lowered, folder / "graph.onnx", (), (), "0")
    return folder / "graph.onnx", arch


@pytest.fixture
def session(graph: tuple[Path, ArchSpec]) -> Iterator[CudaDecoderSession]:
    path, arch = graph
    made = CudaDecoderSession(path, arch, "fp32", CacheShape(ROWS, CAPACITY), open_device(), torch.float32)
    yield made
    made.close()


@pytest.fixture
def reference(tiny_decoder_bundle: Path) -> Iterator[Any]:
    options = SessionOptions(threads=1, capacity=CAPACITY, max_batch=ROWS)
    opened = open_session(Bundle.open(tiny_decoder_bundle), engine="ort-cpu", options=options).session
    yield opened
    opened.close()
