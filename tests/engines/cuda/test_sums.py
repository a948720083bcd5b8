"""Residual streams that a product adds itself, where that is faster, on SM 90; elsewhere its kernel is simulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from accel_kernels import specialized_gemm as made
from accel_kernels.device import has_warp_jobs
from accel_kernels.packing import pack, unpack
from accel_kernels.tiles import LAYER_NORM

import accel
from accel.bundle import Bundle
from accel.engines.cuda import products
from accel.engines.cuda.contest import Contest
from accel.engines.cuda.device import INTERPRETED, Device, open_device
from accel.engines.cuda.encoder import CudaEncoderSession
from accel.engines.cuda.operator_times import _moved
from accel.engines.cuda.products import SPECIALIZED, Products
from accel.engines.cuda.program import Matrix
from accel.engines.cuda.values import Normed, Product, Sum
from accel.graph.external import write_external
from accel.graph.lowering.cuda import lower
from accel.graph.save import load_canonical, save_graph
from tests.exporter.models import make_encoder
from tests.kernels.comparing import Maker, assert_close
from tests.kernels.warp_jobs import simulated

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes on masked lanes
ROWS, SIZE, COUNT = 150, 72, 40
LONGEST = 128  # tokens of an encoder's row


@pytest.fixture(params=["simulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest) -> Maker:
    simulates = request.param == "simulated"
    if simulates != INTERPRETED:
        pytest.skip(f"kernels run {'in the interpreter' if INTERPRETED else 'on the GPU'} here")
    if not simulates and not has_warp_jobs(open_device().torch):
        pytest.skip("the kernel runs on SM 90 alone")
    return Maker(open_device().torch, torch.float16)


@pytest.fixture
def preferred(make: Maker, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The product that adds is taken wherever it competes; the keys of what was picked."""
    picked: list[str] = []

    def pick(self: Contest, key: str, ways: dict[str, Any]) -> str:
        picked.append(key)
        adds = "added to a stream" in key
        return SPECIALIZED if adds else next(iter(ways))

    monkeypatch.setattr(Contest, "pick", pick)
    monkeypatch.setattr(products, "WIDE_ROWS", 1)
    with simulated(made, "specialized_gemm_kernel", seed=3, programs=2) if INTERPRETED else nullcontext():
        yield picked


def multiplier(make: Maker, warp_jobs: bool = True) -> Products:
    return Products(torch.float16, False, Contest(open_device()), warp_jobs=warp_jobs)


def operands(make: Maker, biased: bool = True) -> tuple[Any, Matrix, Any]:
    bias = make.normal(COUNT, dtype=torch.float32) if biased else None
    matrix = Matrix(make.normal(COUNT, SIZE), bias, low_bias=None if bias is None else bias.half())
    return make.normal(ROWS, SIZE), matrix, make.normal(ROWS, COUNT, scale=5.0)


def expected(x: Any, matrix: Matrix, stream: Any) -> Any:
    total = x.double() @ matrix.weight.double().T + stream.double()
    return total if matrix.bias is None else total + matrix.bias.double()


@pytest.mark.parametrize("biased", [False, True])
def test_the_norm_reads_one_tensor(make: Maker, preferred: list[str], biased: bool) -> None:
    x, matrix, stream = operands(make, biased)
    total = multiplier(make).sum(x, matrix, stream, kept=False)
    assert len(preferred) == 1 and total.result is not None and total.result.dtype == torch.float16
    assert_close(total.result, expected(x, matrix, stream), 1e-3)
    by = Normed(torch.empty(0), make.normal(COUNT), make.normal(COUNT), 1e-5, LAYER_NORM)
    wanted = torch.nn.functional.layer_norm(
        expected(x, matrix, stream), (COUNT,), by.weight.double(), by.bias.double(), 1e-5
    )
    assert_close(multiplier(make).norm(total, by), wanted, 3e-3)


@pytest.mark.parametrize("reason", ["kept", "float32 stream", "bfloat16", "integers", "no jobs for warps", "few rows"])
def test_others_leave_it_to_their_reader(
    make: Maker, preferred: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, matrix, stream = operands(make)
    if reason == "few rows":
        monkeypatch.setattr(products, "WIDE_ROWS", ROWS + 1)
    stream = stream.float() if reason == "float32 stream" else stream
    wanted, tolerance, chosen = expected(x, matrix, stream), 1e-3, multiplier(make, reason != "no jobs for warps")
    if reason == "integers":
        x = make.normal(ROWS, 64)
        words, scales = pack(make.normal(COUNT, 64), 8, 32)
        matrix = Matrix(words, scales=scales, bits=8)
        wanted = x.double() @ unpack(words, scales, 8).double().T + stream.double()
    if reason == "bfloat16":
        x, stream, tolerance = x.bfloat16(), stream.bfloat16(), 8e-3
        matrix = Matrix(matrix.weight.bfloat16(), matrix.bias, low_bias=matrix.bias.bfloat16())
        chosen = Products(torch.bfloat16, False, Contest(open_device()), warp_jobs=True)
    total = chosen.sum(x, matrix, stream, kept=reason == "kept")
    assert total.result is None and not any("added to a stream" in key for key in preferred)
    assert_close(total.tensor(), wanted, tolerance)


def test_a_source_is_lowered_once(make: Maker, preferred: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both ways are possible, they share it."""
    x, matrix, stream = operands(make)
    lowered: list[int] = []
    low = Products.low

    def counted(self: Products, value: Any) -> Any:
        result = low(self, value)
        lowered.extend([1] * (result is not value))
        return result

    monkeypatch.setattr(Products, "low", counted)
    monkeypatch.setattr(Contest, "pick", lambda self, key, ways: next(iter(ways)))
    assert multiplier(make).sum(x.float(), matrix, stream, kept=False).result is None
    assert len(lowered) == 1


def test_both_ways_are_timed_with_the_norm_behind_them(make: Maker, preferred: list[str], monkeypatch: Any) -> None:
    """One adds two tensors, the other reads one."""
    x, matrix, stream = operands(make)
    residuals: list[bool] = []
    normalize = Products.norm

    def norm(self: Products, source: Any, by: Normed) -> Any:
        residuals.append(isinstance(source, Sum) and source.result is None)
        return normalize(self, source, by)

    def pick(self: Contest, key: str, ways: dict[str, Any]) -> str:
        if "added to a stream" in key:
            for way in ways.values():
                way()
        return next(iter(ways))

    monkeypatch.setattr(Products, "norm", norm)
    monkeypatch.setattr(Contest, "pick", pick)
    multiplier(make).sum(x, matrix, stream, kept=False)
    assert residuals[:2] == [True, False] and not any(residuals[1:])  # a third way halves tiles, where any are left


def test_the_bytes_of_a_sum_are_its_readers_or_its_own(make: Maker) -> None:
    x, matrix, stream = operands(make)
    out, normed = make.normal(ROWS, COUNT), make.normal(ROWS, COUNT)
    apart, together = Sum(stream, out, kept=False), Sum(stream, None, kept=False, result=out)
    read = {ir.Value(): Product(x, matrix), ir.Value(): stream}
    assert _moved(read, apart) == x.nbytes + out.nbytes
    assert _moved(read, together) == x.nbytes + stream.nbytes + out.nbytes
    assert _moved({ir.Value(): apart}, normed) == stream.nbytes + out.nbytes + normed.nbytes
    assert _moved({ir.Value(): together}, normed) == out.nbytes + normed.nbytes


def bert() -> torch.nn.Module:
    """Two layers whose products are as large as what they are added to; the same one in every run."""
    model = make_encoder(
        hidden_size=384, intermediate_size=768, max_position_embeddings=LONGEST, initializer_range=384**-0.5
    )
    with torch.no_grad():
        for vector in (parameter for parameter in model.parameters() if parameter.ndim == 1):
            vector += torch.randn(vector.shape) * 0.1
    return model


def test_an_encoder(tmp_path: Path, preferred: list[str], monkeypatch: Any) -> None:
    """Attention's output and the second half of each layer, 4 in all, against the sums that their norms add up."""
    accel.export(bert(), tmp_path / "bundle", {"parity": {"enabled": False}})
    bundle = Bundle.open(tmp_path / "bundle")
    arch = bundle.manifest.arch
    model = load_canonical(bundle.file(bundle.graph("fp32", "canonical").file))
    lowered, _ = lower(model, arch, LONGEST, ir.DataType.FLOAT16)
    write_external(lowered, tmp_path / "weights")
    save_graph(lowered, tmp_path / "graph.onnx", (), (), "0")
    rows, width = (2, 12) if INTERPRETED else (5, LONGEST)  # on a GPU WIDE_ROWS and more
    drawn = np.random.default_rng(0)
    ids, kinds = drawn.integers(3, arch.vocab_size, (rows, width)), drawn.integers(0, 2, (rows, width))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": kinds}
    feeds["attention_mask"][1, width * 5 // 8 :] = 0
    results = []
    for jobs in (False, True):
        monkeypatch.setattr(Device, "warp_jobs", jobs)
        session = CudaEncoderSession(tmp_path / "graph.onnx", arch, "fp16", open_device(), torch.float16)
        results.append(session.run(feeds))
        session.close()
    assert sum("added to a stream" in key for key in preferred) == 2 * len(arch.layers)
    for name, plain in results[0].items():
        real = feeds["attention_mask"].astype(bool) if plain.ndim == 3 else slice(None)
        assert_close(torch.from_numpy(results[1][name][real]), torch.from_numpy(plain[real]), 4e-3)
