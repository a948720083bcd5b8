"""Variants that differ in the cache alone read one weight file, as long as their weights are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import accel
from accel.bundle import Bundle
from accel.graph.evaluation.sessions import PackedDecoder
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.inspection import inspect
from accel.variants import add_variant
from tests.engines.cuda.steps import CAPACITY, ROWS, inputs
from tests.test_bundle_extension import content
from tests.test_outdated_variants import say_lowering

PAIRS = [("fp16", "fp16+kv8"), ("bf16", "bf16+kvfp8"), ("w4g32", "w4g32+kv8"), ("fp16+kv8", "fp16+kvfp8")]
ORDERS = [*PAIRS, *(pair[::-1] for pair in PAIRS[:3])]


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder"))


def add(folder: Path, variant: str, target: str = "cuda", **chosen: Any) -> Bundle:
    integers = {"algorithm": "rtn"} | chosen if variant.startswith("w") else chosen
    return add_variant(folder, variant, target=target, check=False, measure=False, **integers)


def anew(folder: Path, variant: str, target: str = "cuda", **chosen: Any) -> Bundle:
    """The graph is lowered again, as the next version of the lowering would."""
    say_lowering(folder, variant, 0, target)
    return add(folder, variant, target, **chosen)


def weight_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.weights")} - {"fp32.weights"}


def tensors(bundle: Bundle, variant: str, target: str = "cuda") -> dict[str, NDArray]:
    found = ir.load(bundle.file(bundle.graph(variant, target).file)).graph.initializers
    return {name: np.array(value.const_value.numpy()) for name, value in found.items()}  # type: ignore[union-attr]


def check_equal(ours: dict[str, NDArray], theirs: dict[str, NDArray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], strict=True)


def logits(bundle: Bundle, variant: str) -> NDArray:
    """Of two steps, with what the caches keep between them."""
    model = ir.load(bundle.file(bundle.graph(variant, "cuda").file))
    kinds = {value.dtype for value in model.graph.inputs if (value.name or "").startswith("past.0")}
    session = PackedDecoder(TorchGraph(model).run, bundle.manifest.arch, ROWS, CAPACITY, kinds.pop())
    return np.concatenate([session.step(inputs({0: [5, 6, 7]}, {})), session.step(inputs({0: [8]}, {0: 3}))])


def check_sound(folder: Path) -> Bundle:
    """Every file is as the manifest says, none is left over, and graphs read what is listed for them."""
    bundle = Bundle.open(folder, verify=True)
    assert set(content(folder)) == {*bundle.manifest.files, "manifest.json"}
    assert inspect(bundle).warnings == ()
    return bundle


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_the_second_reads_what_the_first_wrote(order: tuple[str, str], decoder: Path, tmp_path: Path) -> None:
    alone = add(Path(shutil.copytree(decoder, tmp_path / "alone")), order[1])
    first = add(decoder, order[0])
    before = content(decoder)
    add(decoder, order[1])
    bundle = check_sound(decoder)
    assert weight_files(decoder) == {f"{order[0]}.weights"}
    assert bundle.weights(order[1], "cuda") == bundle.weights(order[0], "cuda") == (f"{order[0]}.weights",)
    assert bundle.variant(order[0]) == first.variant(order[0]) and bundle.variant(order[1]).weights == ()
    after = content(decoder)
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    check_equal(tensors(bundle, order[1]), tensors(alone, order[1]))
    np.testing.assert_array_equal(logits(bundle, order[1]), logits(alone, order[1]))
    reports = {report.variant: report for report in inspect(bundle).weights}
    assert reports[order[1]].files == reports[order[0]].files
    assert reports[order[1]].file_bytes == bundle.manifest.files[f"{order[0]}.weights"].size


def test_on_the_cpu(decoder: Path, tmp_path: Path) -> None:
    """What fp32's graph packed for the target is read from where it lies, and so are integers."""
    before = weight_files(decoder)
    bundle = add(decoder, "fp32+kv8", "ort-cpu")
    assert bundle.weights("fp32+kv8", "ort-cpu") == bundle.weights("fp32", "ort-cpu")
    assert weight_files(decoder) == before
    add(decoder, "w4g32", "ort-cpu")
    bundle = add_variant(decoder, "w4g32+kv8", algorithm="rtn")
    assert bundle.weights("w4g32+kv8", "ort-cpu") == bundle.weights("w4g32", "ort-cpu") == ("w4g32.weights",)
    quality = bundle.variant("w4g32+kv8").quality
    assert quality is not None and 0 < quality.size.bytes < quality.reference_size.bytes / 2
    with accel.load(decoder, variant="w4g32+kv8") as model:
        assert model.engine.name == "ort-cpu" and model.generate("hello", max_new_tokens=3).ids
    alone = add(Path(shutil.copytree(decoder, tmp_path / "alone")), "w4g32+kv8", "ort-cpu")
    check_equal(tensors(bundle, "w4g32+kv8", "ort-cpu"), tensors(alone, "w4g32+kv8", "ort-cpu"))


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2]], ids=" ".join)
def test_what_is_shared_is_compared(pair: tuple[str, str], decoder: Path) -> None:
    chosen: dict[str, Any] = {"algorithm": "rtn"} if pair[0].startswith("w") else {}
    for variant in pair:
        bundle = add_variant(decoder, variant, target="cuda", **chosen)
        parity = bundle.manifest.parity[f"{variant}/cuda"]
        assert 0 < parity.max_rel_error < parity.limit
    assert weight_files(decoder) == {f"{pair[0]}.weights"}


def test_other_integers_share_nothing(decoder: Path) -> None:
    """Not the norms either, which are the same: they would hold the whole file."""
    add(decoder, "w4g32")
    bundle = add(decoder, "w4g32+kv8", algorithm="gptq")
    assert bundle.weights("w4g32+kv8", "cuda") == bundle.variant("w4g32+kv8").weights == ("w4g32+kv8.weights",)


def test_what_cannot_be_read_is_not_shared(decoder: Path, tmp_path: Path) -> None:
    """A file with two names: its tensors are refused, and the addition does without."""
    add(decoder, "fp16")
    (tmp_path / "another").hardlink_to(decoder / "fp16.weights")
    bundle = add(decoder, "fp16+kv8")
    assert bundle.weights("fp16+kv8", "cuda") == ("fp16+kv8.weights",)


@pytest.mark.parametrize("order", [PAIRS[0], PAIRS[2], PAIRS[2][::-1]], ids=" ".join)
def test_the_first_is_lowered_again_with_the_same_weights(order: tuple[str, str], decoder: Path) -> None:
    add(decoder, order[0])
    before = add(decoder, order[1])
    file, expected = f"{order[0]}.weights", tensors(before, order[1])
    for variant in (*order, order[0]):
        anew(decoder, variant)
        bundle = check_sound(decoder)
        assert weight_files(decoder) == {file}
        assert bundle.variant(order[0]).weights == (file,) and bundle.variant(order[1]).weights == ()
        assert bundle.weights(order[0], "cuda") == bundle.weights(order[1], "cuda") == (file,)
        check_equal(tensors(bundle, order[1]), expected)


@pytest.mark.parametrize("order", [PAIRS[2], PAIRS[2][::-1]], ids=" ".join)
def test_the_first_is_lowered_again_with_other_weights(order: tuple[str, str], decoder: Path) -> None:
    """The second keeps its file and its results; the file goes with its last reader."""
    first, second = order
    add(decoder, first)
    before = add(decoder, second)
    expected, said, old = tensors(before, second), logits(before, second), f"{first}.weights"
    anew(decoder, first, algorithm="gptq")
    bundle = check_sound(decoder)
    assert weight_files(decoder) == {old, f"{first}.2.weights"}
    assert bundle.weights(first, "cuda") == bundle.variant(first).weights == (f"{first}.2.weights",)
    assert bundle.weights(second, "cuda") == (old,) and bundle.variant(second) == before.variant(second)
    check_equal(tensors(bundle, second), expected)
    np.testing.assert_array_equal(logits(bundle, second), said)
    anew(decoder, second, algorithm="gptq")
    bundle = check_sound(decoder)
    assert weight_files(decoder) == {f"{first}.2.weights"}
    assert bundle.weights(second, "cuda") == (f"{first}.2.weights",) and bundle.variant(second).weights == ()
    assert not np.array_equal(logits(bundle, second), said)


def test_the_second_is_lowered_again_with_other_weights(decoder: Path) -> None:
    add(decoder, "w4g32")
    before = add(decoder, "w4g32+kv8")
    anew(decoder, "w4g32+kv8", algorithm="gptq")
    bundle = check_sound(decoder)
    assert weight_files(decoder) == {"w4g32.weights", "w4g32+kv8.weights"}
    assert bundle.weights("w4g32+kv8", "cuda") == bundle.variant("w4g32+kv8").weights == ("w4g32+kv8.weights",)
    assert bundle.variant("w4g32") == before.variant("w4g32")


def test_a_file_of_two_targets_and_two_variants(decoder: Path) -> None:
    """It stays for whichever of its readers is left; only small tensors of one target are written anew."""
    add(decoder, "fp16", "tensorrt")
    add(decoder, "fp16")
    before = add(decoder, "fp16+kv8")
    assert before.weights("fp16+kv8", "cuda") == before.weights("fp16", "cuda")
    size = before.manifest.files["fp16.weights"].size
    expected = tensors(before, "fp16+kv8")
    for variant, target in (("fp16", "tensorrt"), ("fp16", "cuda"), ("fp16+kv8", "cuda"), ("fp16", "tensorrt")):
        anew(decoder, variant, target)
        bundle = check_sound(decoder)
        assert weight_files(decoder) == set(bundle.variant("fp16").weights)
        assert bundle.manifest.files["fp16.weights"] == before.manifest.files["fp16.weights"]
        assert sum(bundle.manifest.files[name].size for name in weight_files(decoder)) < 1.5 * size
        check_equal(tensors(bundle, "fp16+kv8"), expected)


def test_keys_of_other_targets_stay(decoder: Path) -> None:
    """A manifest that does not say what a graph reads: what the next graph borrows is nothing of that one's."""
    before = add(decoder, "fp16", "tensorrt")
    data = json.loads((decoder / "manifest.json").read_text())
    data["variants"]["fp16"]["graphs"]["tensorrt"]["weights"] = None
    (decoder / "manifest.json").write_text(json.dumps(data))
    add(decoder, "fp16+kv8")
    bundle = add(decoder, "fp16")
    assert bundle.weights("fp16", "cuda") == ("fp16+kv8.weights",)
    assert bundle.weights("fp16", "tensorrt") == before.weights("fp16", "tensorrt") == ("fp16.weights",)
