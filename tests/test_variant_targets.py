"""One precision for several targets: its weights are written once, whichever target comes first."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import accel
from accel import capabilities
from accel.bundle import Bundle
from accel.capabilities import version_of
from accel.cli import main
from accel.errors import EngineUnavailableError, FusionError, InputError
from accel.graph.external import INLINE_BYTES
from accel.graph.lowering import ort_cuda, tensorrt
from accel.graph.save import load_canonical
from accel.variant_checks import quantize_command
from accel.variant_targets import sensible_targets
from accel.variants import LIMITS, add_variant, is_current
from tests.test_bundle_extension import content
from tests.test_outdated_variants import say_lowering

ORDERS = [("tensorrt", "ort-cuda"), ("ort-cuda", "tensorrt")]
LOWERINGS = {"tensorrt": tensorrt, "ort-cuda": ort_cuda}


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder"))


def weight_bytes(bundle: Bundle, variant: str) -> dict[str, int]:
    return {file: bundle.manifest.files[file].size for file in bundle.variant(variant).weights}


def expected(bundle: Bundle, target: str, dtype: ir.DataType) -> dict[str, NDArray]:
    """The lowered graph's initializers, computed anew."""
    arch, entry = bundle.manifest.arch, bundle.graph("fp32", "canonical")
    model, _ = LOWERINGS[target].lower(load_canonical(bundle.file(entry.file)), arch, arch.max_positions, dtype)
    return {key: value.const_value.numpy() for key, value in model.graph.initializers.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("name", ["decoder", "minilm"])
def test_weights_are_written_once(
    order: tuple[str, str], name: str, tiny_decoder_bundle: Path, minilm_bundle: Path, tmp_path: Path
) -> None:
    source = {"decoder": tiny_decoder_bundle, "minilm": minilm_bundle}[name]
    first = add_variant(shutil.copytree(source, tmp_path / "both"), "fp16", target=order[0], check=False)
    before = {key: data for key, data in content(first.path).items() if key != "manifest.json"}
    bundle = add_variant(first, "fp16", target=order[1], check=False)
    after = content(bundle.path)
    assert {key: after[key] for key in before} == before
    alone = add_variant(shutil.copytree(source, tmp_path / "alone"), "fp16", target=order[1], check=False)
    both, needed = weight_bytes(bundle, "fp16"), weight_bytes(alone, "fp16")
    assert set(both) <= {"fp16.weights", f"fp16.{order[1]}.weights"} and set(needed) == {"fp16.weights"}
    more = sum(both.values()) - both["fp16.weights"]
    assert more < 0.002 * sum(needed.values()), (both, needed)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("variant", LIMITS)
def test_what_is_shared_is_what_each_target_wants(decoder: Path, variant: str, order: tuple[str, str]) -> None:
    for target in order:
        bundle = add_variant(decoder, variant, target=target, check=False)
    dtype = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[variant]
    for target in order:
        stored = ir.load(bundle.file(bundle.graph(variant, target).file)).graph.initializers
        wanted = expected(bundle, target, dtype)
        assert stored.keys() == wanted.keys()
        for key, value in stored.items():
            np.testing.assert_array_equal(value.const_value.numpy(), wanted[key], strict=True)  # type: ignore[union-attr]
            assert value.const_value.nbytes < INLINE_BYTES or isinstance(value.const_value, ir.ExternalTensor)  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", LIMITS)
def test_ort_cuda_is_compared(decoder: Path, variant: str) -> None:
    bundle = add_variant(decoder, variant, target="ort-cuda")
    entry, parity = bundle.graph(variant, "ort-cuda"), bundle.manifest.parity[f"{variant}/ort-cuda"]
    assert entry.file == f"{variant}.ort-cuda.onnx" and entry.lowering == ort_cuda.VERSION
    assert parity.reference == "ort-cpu fp32" and 0 < parity.max_rel_error < parity.limit == LIMITS[variant]
    assert is_current(bundle, variant, "ort-cuda") and not is_current(bundle, variant, "tensorrt")
    assert Bundle.open(decoder, verify=True).manifest == bundle.manifest


def test_an_encoder_is_compared(minilm_bundle: Path, tmp_path: Path) -> None:
    bundle = add_variant(shutil.copytree(minilm_bundle, tmp_path / "minilm"), "fp16", target="ort-cuda")
    assert bundle.manifest.parity["fp16/ort-cuda"].max_rel_error < 5e-3


def test_a_graph_names_its_own_weight_files(decoder: Path) -> None:
    """What one target adds must not change what another's engines are made from."""
    bundle = add_variant(decoder, "fp16", check=False)
    before = bundle.weights("fp16", "tensorrt")
    bundle = add_variant(decoder, "fp16", target="ort-cuda", check=False)
    assert bundle.weights("fp16", "tensorrt") == before == ("fp16.weights",)
    assert set(bundle.weights("fp16", "ort-cuda")) == set(bundle.variant("fp16").weights)


def test_an_outdated_graph_leaves_what_the_other_target_reads(decoder: Path) -> None:
    add_variant(decoder, "fp16", check=False)
    add_variant(decoder, "fp16", target="ort-cuda", check=False)
    say_lowering(decoder, "fp16", 0)
    bundle = add_variant(decoder, "fp16", check=False)
    assert is_current(bundle, "fp16", "tensorrt") and is_current(bundle, "fp16", "ort-cuda")
    assert bundle.has("fp16.weights"), "the other target's graph reads it"
    for target in ("tensorrt", "ort-cuda"):
        for value in ir.load(bundle.file(bundle.graph("fp16", target).file)).graph.initializers.values():
            value.const_value.numpy()  # type: ignore[union-attr]
    Bundle.open(decoder, verify=True)


def test_the_command_adds_all_that_make_sense(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(decoder), "--variant", "fp16", "--variant", "fp32", "--no-parity"]) == 0
    variants = Bundle.open(decoder).manifest.variants
    assert set(variants["fp16"].graphs) == {"tensorrt", "cuda", "ort-cuda"}
    assert set(variants["fp32"].graphs) == {"canonical", "ort-cpu", "tensorrt"}
    assert main(["quantize", str(decoder), "--variant", "bf16", "--target", "ort-cuda", "--no-parity"]) == 0
    assert set(Bundle.open(decoder).variant("bf16").graphs) == {"ort-cuda"}
    assert main(["quantize", str(decoder), "--variant", "bf16", "--target", "ort-rocm"]) == 1
    assert "unknown target 'ort-rocm'" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_the_command_says_where_a_precision_runs(
    decoder: Path, gpu: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = capabilities.probe()
    engines = tuple(dataclasses.replace(row, available=gpu or row.name != "cuda") for row in found.engines)
    engines = tuple(row for row in engines if row.name in ("ort-cpu", "cuda"))
    monkeypatch.setattr(capabilities, "probe", lambda: dataclasses.replace(found, engines=engines))
    assert main(["quantize", str(decoder), "--variant", "bf16", "--target", "cuda", "--no-parity"]) == 0
    said = "bf16: nothing here runs it; for cuda on an NVIDIA GPU\n"
    assert (said in capsys.readouterr().out) != gpu
    accel.add_variant(decoder, "bf16", target="tensorrt", check=False)
    assert main(["quantize", str(decoder), "--variant", "bf16", "--target", "cuda", "--json"]) == 0
    elsewhere = json.loads(capsys.readouterr().out)["elsewhere"]
    said = "for tensorrt, rtx, cuda on an NVIDIA GPU (tensorrt and rtx with engines that accel build makes)"
    assert elsewhere == ({} if gpu else {"bf16": said})
    if not gpu:
        with pytest.raises(EngineUnavailableError, match="ort-cpu graph for variant 'bf16'; its graphs are for cuda"):
            accel.load(decoder, variant="bf16", device="cpu")


def test_sensible_targets(minilm_bundle: Path, decoder: Path) -> None:
    encoder, arch = Bundle.open(minilm_bundle).manifest.arch, Bundle.open(decoder).manifest.arch
    openvino = ("openvino",) if version_of("openvino") is not None else ()
    assert sensible_targets(encoder, "fp32") == ("tensorrt", "ort-cuda", *openvino)
    assert sensible_targets(arch, "fp16") == ("tensorrt", "cuda", "ort-cuda")
    assert sensible_targets(arch, "fp32") == ("tensorrt",)


def test_the_command_that_adds_a_graph_adds_that_one(decoder: Path) -> None:
    """Without ``--target`` integers would go to the CPU."""
    bundle = Bundle.open(decoder)
    for variant, target, more in (
        ("fp16", "tensorrt", ""), ("fp8", "tensorrt", ""), ("w4g32", "tensorrt", " --target tensorrt"),
        ("fp16", "cuda", " --target cuda"), ("w4g32+kv8", "cuda", " --target cuda"),
    ):  # fmt: skip
        assert quantize_command(bundle, variant, target) == f"accel quantize {bundle.path} --variant {variant}{more}"


def test_an_unknown_target(decoder: Path) -> None:
    with pytest.raises(InputError, match="unknown target 'tensort'.*tensorrt"):
        accel.add_variant(decoder, "fp16", target="tensort")


def test_a_layer_without_a_kernel_adds_nothing(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise FusionError("no CUDA kernel for it", where="layer 0, ort-cuda")

    before = content(decoder)
    monkeypatch.setattr(ort_cuda, "lower", refuse)
    with pytest.raises(FusionError, match="no CUDA kernel"):
        add_variant(decoder, "fp16", target="ort-cuda")
    assert content(decoder) == before
