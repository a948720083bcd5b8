"""The cuda engine over integer weights, on Triton's interpreter: what PyTorch makes of the same graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from accel.bundle import Bundle
from accel.engines.cuda import products
from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import INTERPRETED, open_device
from accel.engines.cuda.program import load_program
from accel.engines.cuda.registry import pick_precision
from accel.engines.kv_cache import CacheShape
from accel.graph.evaluation.sessions import PackedDecoder
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.variants import LIMITS, add_variant
from tests.engines.cuda.steps import CAPACITY, ROWS, inputs

LIMIT = 4e-3  # of the largest logit: float16 sums in another order
STEPS = (
    inputs({0: [5, 6, 7, 8], 2: [9, 10]}, {}, wanted=[0, 2, 3, 5]),
    inputs({0: [11], 2: [12]}, {0: 4, 2: 2}),
    inputs({0: [13]}, {0: 5}),
)
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes on masked lanes
]


@pytest.fixture(scope="module", params=["w4g32", "w8g128"])
def quantized(request: pytest.FixtureRequest, tiny_decoder_bundle: Path, tmp_path_factory: Any) -> tuple[Bundle, str]:
    folder = shutil.copytree(tiny_decoder_bundle, tmp_path_factory.mktemp("quantized") / "decoder")
    return add_variant(folder, request.param, target="cuda", algorithm="rtn"), request.param


@pytest.fixture
def session(quantized: tuple[Bundle, str]) -> Any:
    bundle, variant = quantized
    path = bundle.file(bundle.graph(variant, "cuda").file)
    shape = CacheShape(ROWS, CAPACITY)
    made = CudaDecoderSession(path, bundle.manifest.arch, variant, shape, open_device(), torch.float16)
    yield made
    made.close()


def evaluated(bundle: Bundle, variant: str) -> PackedDecoder:
    model = ir.load(bundle.file(bundle.graph(variant, "cuda").file))
    return PackedDecoder(TorchGraph(model).run, bundle.manifest.arch, ROWS, CAPACITY, ir.DataType.FLOAT16)


def compare(session: Any, reference: PackedDecoder) -> None:
    for step in STEPS:
        ours, theirs = session.step(step), reference.step(step)
        assert ours.shape == theirs.shape and np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=LIMIT * np.abs(theirs).max(), rtol=0)


def test_steps(session: Any, quantized: tuple[Bundle, str]) -> None:
    """Prompts, two rows, and one alone: products of several rows and of one."""
    compare(session, evaluated(*quantized))


def test_matrices_dequantised_as_a_whole(
    session: Any, quantized: tuple[Bundle, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where that is measured to be faster: the contest's choice stands for it."""
    monkeypatch.setattr(products, "FEW", 1)
    monkeypatch.setattr(products.Products, "fastest", lambda self, key, ways, x: list(ways)[-1])
    whole: list[int] = []
    dequantized = products.Products._dequantized
    monkeypatch.setattr(
        products.Products, "_dequantized", lambda self, matrix: (whole.append(1), dequantized(self, matrix))[1]
    )
    compare(session, evaluated(*quantized))
    assert whole


def test_sums_in_parts(session: Any, quantized: tuple[Bundle, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise."""
    monkeypatch.setattr(products.Products, "fastest", lambda self, key, ways, x: list(ways)[-1])
    splits: list[int] = []
    kernel = products.quantized_gemm
    monkeypatch.setattr(
        products,
        "quantized_gemm",
        lambda *operands, tile, **options: (splits.append(tile.splits), kernel(*operands, tile=tile, **options))[1],
    )
    compare(session, evaluated(*quantized))
    assert max(splits) > 1


@pytest.mark.parametrize(("inputs", "outputs", "norms"), [(8, 8, 2), (1 << 15, 8, 1), (8, 1 << 15, 1)])
def test_rows_that_are_too_long_for_a_norm_are_timed_without(
    monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, norms: int
) -> None:
    found: list[int] = []
    monkeypatch.setattr(products, "norm", lambda x, *_, **__: found.append(x.shape[1]))
    made = products.Products(torch.float16, tensor_memory=False)
    made._between_norms(torch.empty(2, inputs), lambda: torch.empty(2, outputs))
    assert found == [8] * norms


def test_rows_with_gaps_are_timed() -> None:
    """cuBLAS multiplies them; the norm that is timed before must not make every way fail."""
    made, done = products.Products(torch.float16, tensor_memory=False), []
    made._between_norms(torch.ones(2, 32)[:, ::2], lambda: done.append(1) or torch.ones(2, 16, dtype=torch.float16))
    assert done


def test_the_parity_is_recorded(quantized: tuple[Bundle, str]) -> None:
    bundle, variant = quantized
    parity = bundle.manifest.parity[f"{variant}/cuda"]
    assert parity.reference == "PyTorch on the same integers"
    assert 0 < parity.max_rel_error < parity.limit == 2 * LIMITS["fp16"]


def test_weights_are_on_the_device_once(quantized: tuple[Bundle, str]) -> None:
    bundle, variant = quantized
    program = load_program(bundle.file(bundle.graph(variant, "cuda").file), torch.device("cpu"), torch.float16)
    assert program.matrices and all(matrix.scales is not None for matrix in program.matrices.values())
    assert {matrix.bits for matrix in program.matrices.values()} <= {4, 8}
    gather = next(node for node in program.nodes if node.op_type == "Gather" and len(node.inputs) == 3)
    table = program.constants[gather.inputs[0]]  # type: ignore[index]
    assert table.dtype == torch.int32 and table.is_contiguous()
    widths = {matrix.inputs for matrix in program.matrices.values()}
    assert widths == {64, 96}, "the rows of weights, not of words"


def test_integers_run_when_they_are_asked_for(quantized: tuple[Bundle, str]) -> None:
    bundle, variant = quantized
    assert pick_precision(bundle, variant) == variant
    assert pick_precision(bundle, "auto") is None
    assert pick_precision(add_variant(bundle, "fp16", target="cuda", check=False), "auto") == "fp16"
