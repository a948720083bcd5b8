from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.errors import BundleError
from accel.manifest import Quantization
from accel.quality.size import covered_bytes, stored_size, target_of
from tests.inspection import decoder_bundle as made

INLINE = 2 * 8  # the shape constant's values


def test_every_byte_counts_once(tmp_path: Path) -> None:
    bundle = made.write(tmp_path / "b")
    size = stored_size(bundle, "fp32", "ort-cpu")
    constants = size.bytes - made.PARAMETERS_END - 256  # parameters, packed ones over them, and the table
    assert INLINE <= constants <= INLINE + 64 and size.exact
    assert size.numbers == made.ARCH.parameters
    assert stored_size(bundle, "fp32", "torch").bytes == made.PARAMETERS_END


def test_scales_are_numbers_too(tmp_path: Path) -> None:
    record = Quantization("w8g32", "rtn", None, 0, (), 100, 30, scales=12)
    base = made.manifest().variants["fp32"]
    bundle = made.write(tmp_path / "b", variants={"fp32": dataclasses.replace(base, quantization=record)})
    assert stored_size(bundle, "fp32", "ort-cpu").numbers == made.ARCH.parameters + 12


def test_a_table_outside_the_graph_is_counted(minilm_bundle: Path, tiny_decoder_bundle: Path) -> None:
    bundle = Bundle.open(tiny_decoder_bundle)
    arch = bundle.manifest.arch
    size = stored_size(bundle, "fp32", "ort-cpu")
    assert 4 * arch.parameters <= size.bytes < 4 * arch.parameters + 200_000  # rotary tables, constants
    pooler = 384 * 385 * 4  # no part of the graph
    encoder = Bundle.open(minilm_bundle)
    whole = 4 * encoder.manifest.arch.parameters
    assert stored_size(encoder, "fp32", "ort-cpu").bytes == pytest.approx(whole - pooler, rel=1e-3)


def test_without_onnx_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = made.write(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "onnx", None)
    size = stored_size(bundle, "fp32", "ort-cpu")
    assert size.bytes == made.SIZE and not size.exact


def test_engines_and_their_graphs(tmp_path: Path) -> None:
    bundle = made.write(tmp_path / "b")
    assert [target_of(bundle, "fp32", name) for name in ("ort-cpu", "canonical", "rtx")] == [
        "ort-cpu", "canonical", "ort-cpu",
    ]  # fmt: skip
    with pytest.raises(BundleError, match="no variant 'w4'"):
        stored_size(bundle, "w4", "ort-cpu")


def test_ranges_that_overlap_count_once() -> None:
    assert covered_bytes([("a", 0, 10), ("a", 5, 12), ("a", 6, 7), ("b", 0, 3), ("a", 20, 21)]) == 16
    assert covered_bytes([]) == 0
