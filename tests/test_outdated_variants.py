"""Variants that another version of the lowering made: known as such, and lowered again where that can be done."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.cli import main
from accel.errors import BundleError, StorageError
from accel.graph.lowering.tensorrt import VERSION
from accel.graph.lowering.versions import VERSIONS
from accel.variants import add_variant, is_current
from tests.test_bundle_extension import content
from tests.test_variants import is_complete, locations


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder"))


def say_lowering(bundle: Path, variant: str, version: int | None, target: str = "tensorrt") -> None:
    """The manifest says that another version of the lowering made the variant."""
    data = json.loads((bundle / "manifest.json").read_text())
    data["variants"][variant]["graphs"][target]["lowering"] = version
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_the_lowering_is_recorded(decoder: Path) -> None:
    bundle = add_variant(decoder, "fp16", check=False)
    assert bundle.graph("fp16", "tensorrt").lowering == VERSION and is_current(bundle, "fp16")
    assert bundle.graph("fp32", "ort-cpu").lowering is None and not is_current(bundle, "fp32")
    assert not is_current(bundle, "bf16")


@pytest.mark.parametrize("version", [None, VERSION - 1, VERSION + 1])
@pytest.mark.parametrize("variant", ["fp16", "fp32"])
def test_an_outdated_variant_is_lowered_again(decoder: Path, variant: str, version: int | None) -> None:
    before = content(decoder)
    first = add_variant(decoder, variant)
    old = content(decoder)
    say_lowering(decoder, variant, version)
    assert not is_current(Bundle.open(decoder), variant)
    bundle = add_variant(decoder, variant)
    assert is_current(bundle, variant) and is_complete(decoder, variant)
    after, entry = content(decoder), bundle.graph(variant, "tensorrt")
    assert entry.file == f"{variant}.tensorrt.2.onnx" and first.graph(variant, "tensorrt").file not in after
    assert len(after) == len(old) and set(bundle.manifest.files) == set(after) - {"manifest.json"}
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert locations(bundle, variant) <= set(bundle.variant(variant).weights) <= set(after)
    assert bundle.manifest.parity == first.manifest.parity
    assert bundle.graph("fp32", "ort-cpu")
    say_lowering(decoder, variant, version)
    third = add_variant(decoder, variant, check=False).graph(variant, "tensorrt").file
    assert third == f"{variant}.tensorrt.3.onnx", "who opened the first would read the third for it"
    unchecked = Bundle.open(decoder).manifest
    assert f"{variant}/tensorrt" not in unchecked.parity  # that was measured on the old one
    assert len(content(decoder)) == len(old)


def test_an_outdated_graph_with_a_file_of_its_own(minilm_bundle: Path, tmp_path: Path) -> None:
    """Other variants read what fp32's graph packed for their target; its own successor does not."""
    folder = Path(shutil.copytree(minilm_bundle, tmp_path / "minilm"))
    first = add_variant(folder, "fp32", target="ort-cuda", check=False)
    (own,) = set(first.weights("fp32", "ort-cuda")) - {"fp32.weights"}
    say_lowering(folder, "fp32", 0, "ort-cuda")
    bundle = add_variant(folder, "fp32", target="ort-cuda", check=False)
    assert is_current(bundle, "fp32", "ort-cuda") and not bundle.has(own)
    assert bundle.variant("fp32").weights == bundle.weights("fp32", "ort-cuda")
    assert set(bundle.manifest.files) | {"manifest.json"} == set(content(folder))


def test_a_newer_lowering_makes_variants_outdated(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = add_variant(decoder, "fp16", check=False)
    monkeypatch.setitem(VERSIONS, "tensorrt", VERSION + 1)
    assert not is_current(bundle, "fp16")
    assert main(["quantize", str(decoder), "--variant", "fp16", "--no-parity"]) == 0
    assert Bundle.open(decoder).graph("fp16", "tensorrt").lowering == VERSION + 1


def test_an_outdated_variant_that_cannot_be_made_new(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_variant(decoder, "fp16", check=False)
    say_lowering(decoder, "fp16", VERSION - 1)
    before, command = content(decoder), rf"accel quantize {decoder} --variant fp16"

    def refuse(*_: object) -> None:
        raise StorageError("read-only", where=str(decoder))

    with monkeypatch.context() as patch:
        patch.setattr("accel.bundle_extension.TemporarySibling.create", refuse)
        told = rf"version {VERSION - 1} of the lowering.*again here: read-only.*{command}"
        with pytest.raises(BundleError, match=told):
            add_variant(decoder, "fp16")
        with pytest.raises(StorageError, match="read-only"):  # one that is not there yet
            add_variant(decoder, "bf16")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "accel.exporter.progress", None)  # as where the export tools are not installed
        with pytest.raises(BundleError, match=rf"cannot be lowered again here: .*{command}"):
            add_variant(decoder, "fp16")
    data = json.loads((decoder / "manifest.json").read_text())
    del data["variants"]["fp32"]["graphs"]["canonical"]
    data["variants"]["fp16"]["graphs"]["tensorrt"]["lowering"] = None
    (decoder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=rf"an older accel.*no graph for target 'canonical'.*{command}"):
        add_variant(decoder, "fp16")
    assert {**content(decoder), "manifest.json": b""} == {**before, "manifest.json": b""}


def test_one_that_is_made_anew_with_other_integers_says_so(decoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = {"algorithm": "rtn", "check": False, "measure": False}
    add_variant(decoder, "w8g32", keep={"*.o_proj.weight": 32}, **plain)
    target = next(iter(Bundle.open(decoder).variant("w8g32").graphs))
    say_lowering(decoder, "w8g32", 0, target)
    add_variant(decoder, "w8g32", keep={"*.o_proj.weight": 32}, **plain)
    assert "otherwise" not in caplog.text
    say_lowering(decoder, "w8g32", 0, target)
    add_variant(decoder, "w8g32", **plain)
    assert "w8g32 is made otherwise than it was: " in caplog.text
