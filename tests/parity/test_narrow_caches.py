"""Every decoder family with caches in int8, int4 and fp8: the engines against PyTorch with the same rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from accel.bundle import Bundle
from accel.compress.kv_scales import calibrate_cache
from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import INTERPRETED, open_device
from accel.engines.kv_cache import CacheShape
from accel.engines.ort.decoder import OrtDecoderSession
from accel.graph.evaluation.sessions import PackedDecoder
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.external import StoredTensors, write_external
from accel.graph.lowering import cuda
from accel.graph.lowering.ort_cpu import lower
from accel.graph.quantized_cache import spell_cache
from accel.graph.rotation import key_rotations
from accel.graph.save import load_canonical, save_graph
from accel.kv_quantization import KvQuantization
from tests.parity.comparison import COURSES, Rows, Steps, draw_rows, open_decoder, run_course
from tests.parity.families import DECODERS
from tests.parity.test_cuda_engine import COURSE

BundleOf = Callable[[str], Path]
NEARER = 0.2  # a key that is a tie may be rounded the other way in another kernel; a wrong scale costs all of it
ROTATED = {"gpt2": (False,) * 3, "smollm3": (True, False, True)}


def canonical_of(bundle: Bundle) -> ir.Model:
    return load_canonical(bundle.file("canonical.onnx"))


def calibrated(bundle: Bundle, bits: int, float8: bool = False) -> KvQuantization:
    """Scales from random ids: the same kind of input that the courses bring."""
    return calibrate_cache(bundle, canonical_of(bundle), draw_rows((90, 100, 110), seed=11), bits, float8=float8)


def open_quantized(bundle: Bundle, kv: KvQuantization, folder: Path) -> OrtDecoderSession:
    """The bundle's weights under a graph with integer caches."""
    arch = bundle.manifest.arch
    lowered, _ = lower(canonical_of(bundle), arch, arch.max_positions, bundle.manifest.parameters, kv=kv)
    shutil.copytree(bundle.path, folder, dirs_exist_ok=True)  # a graph and its weights share a directory
    stored = StoredTensors([bundle.file(bundle.graph("fp32", "ort-cpu").file)])
    write_external(lowered, folder / "kv.weights", bundle.path, stored=stored)
    save_graph(lowered, folder / "kv.onnx", (), (), "0")
    return OrtDecoderSession(folder / "kv.onnx", bundle.manifest, "kv", 1, CacheShape(3, 128))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", DECODERS)
def test_family(name: str, bits: int, bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_of(name))
    kv, rows = calibrated(bundle, bits), draw_rows()
    session, plain = open_quantized(bundle, kv, tmp_path), open_decoder(bundle.path)
    for course in ("ragged batch", "rows that join, wait and go"):
        assert_near(session, spelled_session(bundle, kv), plain, rows, COURSES[course])
    session.close()
    plain.close()


def spelled_session(bundle: Bundle, kv: KvQuantization) -> PackedDecoder:
    """What the integers mean, in float32."""
    spelled = canonical_of(bundle)
    assert spell_cache(spelled, kv) == 3
    return PackedDecoder(TorchGraph(spelled).run, bundle.manifest.arch, 3, 128)


def assert_near(session: Any, reference: Any, plain: Any, rows: Rows, steps: Steps) -> None:
    """The session is far nearer to what the integers mean than float32 caches are."""
    found, expected, exact = (np.concatenate(run_course(each, rows, steps)) for each in (session, reference, plain))
    error, lost = (np.sqrt(np.mean((each - expected) ** 2)) for each in (found, exact))
    assert error <= NEARER * lost, f"{error} beside {lost}"


def cuda_graph(bundle: Bundle, kv: KvQuantization) -> ir.Model:
    """The cuda engine's graph in float32: whatever differs is no other precision."""
    arch = bundle.manifest.arch
    return cuda.lower(canonical_of(bundle), arch, arch.max_positions, ir.DataType.FLOAT, kv=kv)[0]


kinds = pytest.mark.parametrize("kind", [ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN], ids=["int8", "float8"])


@kinds
@pytest.mark.parametrize("name", DECODERS)
def test_family_in_the_graph_of_the_cuda_engine(name: str, kind: ir.DataType, bundle_of: BundleOf) -> None:
    bundle, rows = Bundle.open(bundle_of(name)), draw_rows()
    kv, plain = calibrated(bundle, 8, kind == ir.DataType.FLOAT8E4M3FN), open_decoder(bundle.path)
    run = TorchGraph(cuda_graph(bundle, kv)).run
    for course in ("ragged batch", "rows that join, wait and go"):
        session = PackedDecoder(run, bundle.manifest.arch, 3, 128, kind)
        assert_near(session, spelled_session(bundle, kv), plain, rows, COURSES[course])
        assert {part.dtype for part in session.read_row(0, 4).values()} == {kind.numpy()}
    plain.close()


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes on masked lanes
@kinds
@pytest.mark.parametrize("name", DECODERS)
def test_family_in_the_cuda_engine(name: str, kind: ir.DataType, bundle_of: BundleOf, tmp_path: Path) -> None:
    """On Triton's interpreter; its integers are those of PyTorch."""
    bundle, rows, floats = Bundle.open(bundle_of(name)), draw_rows(), kind == ir.DataType.FLOAT8E4M3FN
    kv, plain, arch = calibrated(bundle, 8, floats), open_decoder(bundle.path), bundle.manifest.arch
    model = cuda_graph(bundle, kv)
    evaluated = PackedDecoder(TorchGraph(model).run, arch, 3, 64, kind)
    write_external(model, tmp_path / "weights")
    save_graph(model, tmp_path / "graph.onnx", (), (), "0")
    session = CudaDecoderSession(
        tmp_path / "graph.onnx", arch, "fp32+kv8", CacheShape(3, 64), open_device(), torch.float32
    )  # fmt: skip
    assert_near(session, spelled_session(bundle, kv), plain, rows, COURSE)
    run_course(evaluated, rows, COURSE)
    filled = np.array(COURSE).sum(0)
    for index, pair in enumerate(session._caches):
        for part, cache in zip(("key", "value"), pair):
            assert cache.dtype == (torch.float8_e4m3fn if floats else torch.int8)
            for row, length in enumerate(filled):
                theirs = evaluated.read_row(row, length)[f"{index}.{part}"].astype(np.float32)
                step = np.maximum(np.abs(theirs), 2.0**-6) / 8 if floats else 1
                assert (np.abs(cache[row, :, :length].float().numpy() - theirs) / step).mean() < 0.02, "but for ties"
    session.close()
    plain.close()


@pytest.mark.parametrize("name", ["llama", "llama_narrow", "gemma3_text", "phi3_partial", "smollm3", "gpt2", "qwen2"])
def test_keys_turn_as_their_rotation_says(name: str, bundle_of: BundleOf) -> None:
    """Where every token is the same one, the first layer's keys differ by their position alone."""
    bundle = Bundle.open(bundle_of(name))
    rotations = key_rotations(canonical_of(bundle), 64)
    expected = ROTATED.get(name, (True,) * 3)
    assert tuple(rotation is not None for rotation in rotations) == expected
    session: Any = open_decoder(bundle.path)
    run_course(session, [np.full(40, 7)] * 3, [(40, 0, 0)])
    keys = session.read_row(0, 40)["0.key"]
    session.close()
    rotation = rotations[0]
    if rotation is None:
        return
    for steps in (1, 7, 30):
        turned = rotation.turn(keys[:, : 40 - steps], steps)
        assert np.abs(turned - keys[:, steps:]).max() < 1e-4 * np.abs(keys).max()
        assert np.abs(keys[:, : 40 - steps] - keys[:, steps:]).max() > 0.1 * np.abs(keys).max()
