from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel.bundle import Bundle
from accel.errors import BundleError
from tests.bundle_samples import GRAPH, write


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write(tmp_path / "out").path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


def test_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path / "a" / "out")
    opened = Bundle.open(str(tmp_path / "a" / "out"), verify=True)
    assert opened.manifest == written.manifest
    assert opened.manifest.files["fp32.weights"].size == 16
    assert set(opened.manifest.files) == {"g.onnx", "fp32.weights", "1_Pooling/config.json"}
    assert opened.file("g.onnx").read_bytes() == b"graph"
    assert opened.read_json("1_Pooling/config.json") == {"pooling_mode_mean_tokens": True}
    assert opened.graph("fp32", "ort-cpu") == GRAPH
    assert opened.has("g.onnx") and not opened.has("manifest.json") and not opened.has("nothing")
    assert os.listdir(tmp_path / "a") == ["out"]


@pytest.mark.parametrize(
    "name,said",
    [
        ("w8g128", "It has: fp32. accel quantize {path} --variant w8g128 adds it"),
        ("w8g182", "It has: fp32. Did you mean 'w8g128'?"),
        ("fp23", "It has: fp32. Did you mean 'fp32'?"),
        ("fp16+kvv8", "It has: fp32. Did you mean 'fp16+kv8'?"),
        ("fp16+kv8+kvfp8", "It has: fp32. A variant has one cache: fp16+kv8 or fp16+kvfp8"),
        (None, "It has: fp32. Give one of these names"),
        (["fp32"], "It has: fp32. Give one of these names"),
    ],
)
def test_a_variant_that_is_not_there(bundle: Path, name: Any, said: str) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError) as caught:
        opened.variant(name)
    assert caught.value.remedy == said.format(path=opened.path)


def decoder_with(bundle: Path, **targets: str) -> Bundle:
    """The bundle as a decoder's, with variants ``fp16_kv8="cuda"`` that have a graph for one target each."""
    opened = Bundle.open(bundle)
    variants = dict(opened.manifest.variants)
    for name, target in targets.items():
        variants[name.replace("_", "+")] = dataclasses.replace(variants["fp32"], graphs={target: GRAPH})
    arch = dataclasses.replace(opened.manifest.arch, kind="decoder")
    return Bundle(opened.path, dataclasses.replace(opened.manifest, arch=arch, variants=variants))


CPU, GPU = {"fp32_kv8": "ort-cpu"}, {"fp16_kv8": "cuda", "bf16_kv8": "cuda"}
ADDS = "accel quantize {path} --variant"
SHORT = "kv8 is short for 'fp32+kv8', which it has for ort-cpu"


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("kv8", {}, f"{ADDS} kv8 adds 'fp32+kv8', for ort-cpu; for cuda: {ADDS} fp16+kv8"),
        ("kv8", CPU, f"{SHORT}; for cuda: {ADDS} fp16+kv8"),
        ("kv8", GPU, f"{ADDS} kv8 adds 'fp32+kv8', for ort-cpu; for cuda it has 'fp16+kv8', 'bf16+kv8'"),
        ("kv8", CPU | GPU, f"{SHORT}; for cuda it has 'fp16+kv8', 'bf16+kv8'"),
        ("fp16+kv8", CPU, f"{ADDS} fp16+kv8 adds it, for cuda"),
        ("w4g32+kv8", CPU, f"{ADDS} w4g32+kv8 adds it, for ort-cpu; for cuda with --target cuda"),
        ("kvfp8", {}, f"No target runs this decoder so; for cuda: {ADDS} fp16+kvfp8"),
        ("fp16+kv4", GPU, f"No target runs this decoder so; for ort-cpu: {ADDS} fp32+kv4"),
        ("fp16+kv4", {"fp32_kv4": "ort-cpu"}, "No target runs this decoder so; for ort-cpu it has 'fp32+kv4'"),
    ],
)
def test_a_cache_that_is_not_there(bundle: Path, name: str, known: dict[str, str], said: str) -> None:
    """What is there with such a cache and what runs it; of what is not, the commands that work."""
    opened = decoder_with(bundle, **known)
    with pytest.raises(BundleError) as caught:
        opened.variant(name)
    have = f"It has: {', '.join(opened.manifest.variants)}"
    assert caught.value.remedy == f"{have}. {said.format(path=opened.path)}"


def test_an_encoder_is_told_that_it_has_no_cache(bundle: Path) -> None:
    for name in ("kv8", "w4g32+kv8", "fp16+kvfp8"):
        with pytest.raises(BundleError, match="It has: fp32. No target runs this encoder so: an encoder has no cache"):
            Bundle.open(bundle).variant(name)


def test_names_that_are_not_there(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"no file 'g\.onx'.*Did you mean 'g\.onnx'"):
        opened.file("g.onx")
    with pytest.raises(BundleError, match=r"no variant 'int8'.*It has: fp32"):
        opened.graph("int8", "ort-cpu")
    with pytest.raises(BundleError, match=r"target 'cuda'.*It has: ort-cpu"):
        opened.graph("fp32", "cuda")
    with pytest.raises(BundleError, match="not valid JSON"):
        opened.read_json("g.onnx")


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle directory"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleError, match="no manifest.json.*exported first"):
        Bundle.open(tmp_path)


def test_missing_truncated_and_overlong_file(bundle: Path) -> None:
    weights = bundle / "fp32.weights"
    weights.write_bytes(b"\1" * 15)
    with pytest.raises(BundleError, match="truncated: 15 bytes instead of 16.*Export the model again"):
        Bundle.open(bundle)
    weights.write_bytes(b"\1" * 17)
    with pytest.raises(BundleError, match="longer than it was: 17 bytes"):
        Bundle.open(bundle)
    weights.unlink()
    with pytest.raises(BundleError, match=r"missing \(at .*fp32\.weights"):
        Bundle.open(bundle)
    weights.mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(bundle)


def test_flipped_bit_is_found_on_request(bundle: Path) -> None:
    (bundle / "fp32.weights").write_bytes(b"\1" * 15 + b"\2")
    Bundle.open(bundle)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle, verify=True)


@pytest.mark.parametrize(
    "junk",
    [b"", b"\x80\x04junk", b"{", b"[]", b"null", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"schema_version": NaN}'],
)
def test_junk_manifest(bundle: Path, junk: bytes) -> None:
    (bundle / "manifest.json").write_bytes(junk)
    with pytest.raises(BundleError) as info:
        Bundle.open(bundle)
    assert info.value.remedy and "manifest.json" in str(info.value.where)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_unknown_schema_version(bundle: Path, version: object) -> None:
    def change(data: dict[str, Any]) -> None:
        data["schema_version"] = version
        data["a_key_of_that_schema"] = 1

    edit(bundle, change)
    with pytest.raises(BundleError, match="schema version") as info:
        Bundle.open(bundle)
    assert ("pip install -U accelrt" in str(info.value)) == (version == 2)


def test_unknown_manifest_key(bundle: Path) -> None:
    edit(bundle, lambda data: data.update(sourec="x"))
    with pytest.raises(BundleError, match="Did you mean 'source'"):
        Bundle.open(bundle)


UNSAFE = ["/etc/hostname", "../secret", "a/../../secret", "..", "", ".", "a\\b", "C:/x", "./g.onnx", "a//b", "a\0b"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_path(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes(b"s")
    edit(bundle, lambda data: data["files"].update({name: {"size": 1, "sha256": ""}}))
    with pytest.raises(BundleError, match="unsafe path"):
        Bundle.open(bundle)


def test_links(bundle: Path, tmp_path: Path) -> None:
    graph = bundle / "g.onnx"
    graph.rename(bundle / "inner")
    graph.symlink_to("inner")
    assert Bundle.open(bundle, verify=True).file("g.onnx").read_bytes() == b"graph"  # a link that stays inside
    outside = tmp_path / "outside"
    outside.write_bytes(b"graph")
    graph.unlink()
    graph.symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle)
    graph.unlink()
    graph.symlink_to("g.onnx")
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_linked_directory_and_manifest(bundle: Path, tmp_path: Path) -> None:
    (bundle / "1_Pooling").rename(tmp_path / "pool")
    (bundle / "1_Pooling").symlink_to(tmp_path / "pool")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle)
    (bundle / "manifest.json").rename(tmp_path / "m.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "m.json")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle)


def test_link_swapped_in_after_opening(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    (tmp_path / "outside").write_bytes(b"graph")
    (bundle / "g.onnx").unlink()
    (bundle / "g.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="leads out"):
        opened.file("g.onnx")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["variants"]["fp32"].update(weights=["other"]),
        lambda d: d["variants"]["fp32"]["graphs"]["ort-cpu"].update(file="../g.onnx"),
        lambda d: d["parameters"]["w"].update(file="other"),
        lambda d: d["parameters"]["w"].update(offset=1),
        lambda d: d["parameters"]["w"].update(offset=-4),
        lambda d: d["parameters"]["w"].update(shape=[-2, -2]),
        lambda d: d["parameters"]["w"].update(shape=[2, 3]),
        lambda d: d["parameters"]["w"].update(dtype="object"),
        lambda d: d["tied"].update(v="other"),
        lambda d: d["files"]["g.onnx"].update(size="5"),
        lambda d: d["arch"].update(kind="diffusion"),
        lambda d: d["arch"].update(vocab_size=10**15),
        lambda d: d["arch"].update(max_positions=-5),
        lambda d: d["arch"].update(hidden_size=0),
        lambda d: d["arch"]["layers"][0].update(kv_heads=-1),
        lambda d: d.pop("arch"),
    ],
)
def test_inconsistent_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError) as info:
        Bundle.open(bundle)
    assert info.value.remedy
