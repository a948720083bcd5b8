"""Every decoder family with caches in int8 and int4: the engine against PyTorch with the same rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from accel.bundle import Bundle
from accel.compress.kv_scales import calibrate_cache
from accel.engines.kv_cache import CacheShape
from accel.engines.ort.decoder import OrtDecoderSession
from accel.graph.evaluation.sessions import PackedDecoder
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.external import StoredTensors, write_external
from accel.graph.lowering.ort_cpu import lower
from accel.graph.quantized_cache import spell_cache
from accel.graph.rotation import key_rotations
from accel.graph.save import load_canonical, save_graph
from accel.kv_quantization import KvQuantization
from tests.parity.comparison import COURSES, draw_rows, open_decoder, run_course
from tests.parity.families import DECODERS

BundleOf = Callable[[str], Path]
NEARER = 0.2  # a key that is a tie may be rounded the other way in another kernel; a wrong scale costs all of it
ROTATED = {"gpt2": (False,) * 3, "smollm3": (True, False, True)}


def canonical_of(bundle: Bundle) -> ir.Model:
    return load_canonical(bundle.file("canonical.onnx"))


def calibrated(bundle: Bundle, bits: int) -> KvQuantization:
    """Scales from random ids: the same kind of input that the courses bring."""
    return calibrate_cache(bundle, canonical_of(bundle), draw_rows((90, 100, 110), seed=11), bits)


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
    spelled = canonical_of(bundle)
    assert spell_cache(spelled, kv) == 3
    for course in ("ragged batch", "rows that join, wait and go"):
        sessions: tuple[Any, ...] = (
            session, PackedDecoder(TorchGraph(spelled).run, bundle.manifest.arch, 3, 128), plain,
        )  # fmt: skip
        found, expected, exact = (np.concatenate(run_course(each, rows, COURSES[course])) for each in sessions)
        error, lost = (np.sqrt(np.mean((each - expected) ** 2)) for each in (found, exact))
        assert error <= NEARER * lost, f"{course}: {error} beside {lost}"
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
