"""Integer and 8-bit float variants for TensorRT: added, compared, and built into engines of TensorRT-RTX."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import accel
from accel.bundle import Bundle
from accel.engine_build import EngineReport, build
from accel.engine_request import prepare
from accel.engines.tensorrt.adapter import load_flavour
from accel.errors import InputError, ParityError
from accel.graph.lowering.tensorrt import quantized
from accel.scheme import parse_scheme
from accel.variant_targets import TENSORRT, default_targets, sensible_targets
from accel.variants import add_variant
from tests.test_engine_build import SMALL, own_cache

__all__ = ["own_cache"]  # fixture
pytest.importorskip("tensorrt_rtx")
TEXT = [list(range(3, 60)) * 6]  # token ids
VARIANTS = ("w8a8", "w8g128", "w4g32", "fp8")
WEIGHTS = {"w8a8": "int8", "w8g128": "int8", "w4g32": "int4", "fp8": "float8_e4m3fn"}


def added(bundle: Path, folder: Path, variant: str, **options: Any) -> Bundle:
    algorithm = {} if variant == "fp8" else {"algorithm": "rtn"}
    copied = shutil.copytree(bundle, folder / variant)
    return add_variant(copied, variant, target=TENSORRT, **{"calibration": TEXT, **algorithm, **options})


def built(bundle: Bundle, variant: str, tmp_path: Path, **options: Any) -> EngineReport:
    asked = {**SMALL, "sm": "sm89", "precision": variant, "store": tmp_path / "store", "measure": False, **options}
    (report,) = build(bundle, **asked)
    return report


def counted(report: EngineReport, check: str) -> str | None:
    lines = report.facts["proof"]["table"].splitlines()
    return next((line.split()[-2] for line in lines if f"  {check}  " in line), None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoder_s_engine(tiny_decoder_bundle: Path, tmp_path: Path, variant: str) -> None:
    choices = {"head_bits": 8} if variant == "w4g32" else {}
    bundle = added(tiny_decoder_bundle, tmp_path, variant, **choices)
    parity = bundle.manifest.parity[f"{variant}/tensorrt"]
    assert 0 < parity.max_rel_error < parity.limit == {"w8g128": 4e-2, "w4g32": 4e-2}.get(variant, 3e-1)
    record = bundle.variant(variant).quantization
    assert record is not None and record.layers
    report = built(bundle, variant, tmp_path)
    assert report.built and report.facts["fused_attention"] == 2 and "FAILED" not in report.facts["proof"]["table"]
    head = 0 if variant == "fp8" else 1
    products = {"w4g32": "14", "fp8": "14"}.get(variant, "15")
    assert counted(report, f"products with {WEIGHTS[variant]} weights") == products
    assert counted(report, "look-ups with int8 weights") == ("1" if head else None)
    inputs = {"w8a8": ("int8", "15"), "fp8": ("float8_e4m3fn", "14")}.get(variant)
    assert inputs is None or counted(report, f"products with {inputs[0]} inputs") == inputs[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_minilm_s_engine(minilm_bundle: Path, tmp_path: Path, variant: str) -> None:
    text = None if variant in ("w8a8", "fp8") else TEXT
    bundle = added(minilm_bundle, tmp_path, variant, calibration=text)
    parity = bundle.manifest.parity[f"{variant}/tensorrt"]
    assert parity.max_rel_error < {"w8a8": 2e-1, "fp8": 2e-1}.get(variant, 5e-3)
    report = built(bundle, variant, tmp_path, capacity=None)
    assert report.facts["fused_attention"] == 6 and "FAILED" not in report.facts["proof"]["table"]
    assert counted(report, f"products with {WEIGHTS[variant]} weights") == "36"
    weights = sum(bundle.manifest.files[name].size for name in bundle.weights(variant, TENSORRT))
    # MiniLM has 22.6 million weights, 11.7 of them in its word table, which is int8 but for fp8.
    assert weights < {"w4g32": 20e6, "fp8": 36e6}.get(variant, 25e6)
    assert report.size < weights + 12e6, "the builder kept the weights as they are; the rest are kernels"


def test_numbers_that_the_file_holds_are_the_calibrated_ones(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    bundle = added(tiny_decoder_bundle, tmp_path, "w8a8")
    model = ir.load(bundle.file(bundle.graph("w8a8", TENSORRT).file))
    pairs = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    scales = [node.inputs[1].const_value for node in pairs]  # type: ignore[union-attr]
    assert len(pairs) == 9  # per layer: q, k and v; out; gate and up; down. And the head
    assert all(scale is not None and scale.dtype == ir.DataType.FLOAT16 and scale.numpy() > 0 for scale in scales)
    back = [use.node for node in pairs for use in node.outputs[0].uses()]
    assert [node.inputs[1] for node in back] == [node.inputs[1] for node in pairs]


@pytest.mark.parametrize("wrong", ["scales", "integers"])
def test_a_wrong_graph_is_not_added(
    tiny_decoder_bundle: Path, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = quantized._integers

    def spoiled(name: str, tensor: Any, table: bool) -> Any:
        values, scales = tensor.values, tensor.scales
        if wrong == "scales":
            scales = np.roll(scales, 1, axis=0)
        else:
            values = values[:, ::-1]
        return right(name, type(tensor)(values, scales, tensor.bits, tensor.group), table)

    monkeypatch.setattr(quantized, "_integers", spoiled)
    with pytest.raises(ParityError, match="w4g32 graph .*the same integers"):
        added(tiny_decoder_bundle, tmp_path, "w4g32")
    assert "w4g32" not in Bundle.open(tmp_path / "w4g32").manifest.variants


def test_beside_the_graph_of_a_cpu(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """Both in one variant, each with its weights; a CPU runs its own, and an engine's key does not know of it."""
    bundle = added(tiny_decoder_bundle, tmp_path, "w4g32")
    asked = {key: value for key, value in SMALL.items() if key != "target"}
    flavour = load_flavour("rtx")
    (before,) = prepare(bundle, flavour, precision="w4g32", **asked)
    bundle = add_variant(bundle, "w4g32", target="ort-cpu", algorithm="rtn", measure=False)
    assert set(bundle.variant("w4g32").graphs) == {"tensorrt", "ort-cpu"}
    (after,) = prepare(bundle, flavour, precision="w4g32", **asked)
    assert before.key.digest == after.key.digest
    with accel.load(bundle.path, variant="w4g32", engine="ort-cpu") as model:
        assert model.generate("hello", max_new_tokens=4, do_sample=False).ids


def test_nobody_gets_integers_for_gpus_unasked(tiny_decoder_bundle: Path) -> None:
    arch = Bundle.open(tiny_decoder_bundle).manifest.arch
    assert sensible_targets(arch, "w4g32")[:2] == ("ort-cpu", "tensorrt")
    assert default_targets(arch, "w4g32") == ("ort-cpu",) and default_targets(arch, "fp8") == ("tensorrt",)
    assert default_targets(arch, "fp16") == sensible_targets(arch, "fp16")
    assert sensible_targets(arch, "kv8") == ("ort-cpu",) and sensible_targets(arch, "w4g32+kv8") == ("ort-cpu", "cuda")
    assert default_targets(arch, "w4g32+kvfp8") == ("cuda",) == sensible_targets(arch, "fp16+kvfp8")
    assert default_targets(arch, "kv8") == ("ort-cpu",) and default_targets(arch, "bf16+kv8") == ("cuda",)


REFUSED = [
    ({"precision": "w8a8-dyn"}, "no operator that finds a scale per token; w8a8 has .*Targets that can: ort-cpu"),
    ({"precision": "w4g32+kv8"}, "its cache layer takes no integers"),
    ({"precision": "fp8", "sm": "sm86"}, "sm86 does not compute in fp8: sm89 was the first"),
    ({"precision": "fp8", "sm": "sm89,sm80"}, "sm80 does not compute in fp8"),
    ({"precision": "w4g128", "sm": "sm75"}, "sm75 does not compute in int4: sm80 was the first"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_before_anything_is_made(
    tiny_decoder_bundle: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    copied = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle"))
    with pytest.raises(InputError, match=message):
        build(copied, store=tmp_path / "store", **{**SMALL, **changes})
    assert set(Bundle.open(copied).manifest.variants) == {"fp32"}


def test_refused_by_add_variant(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle"))
    with pytest.raises(InputError, match="TensorRT cannot run this decoder as w8a8-dyn.*Targets that can: ort-cpu"):
        add_variant(copied, "w8a8-dyn", target=TENSORRT)
    for options, where in (({"algorithm": "gptq"}, "algorithm"), ({"max_bytes": "1G"}, "max_bytes")):
        with pytest.raises(InputError, match=f"fp8 has no integer weights to choose, and takes no {where}"):
            add_variant(copied, "fp8", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the calibration data is too short"):
        add_variant(copied, "fp8", calibration=[[1, 2, 3]])
    assert set(Bundle.open(copied).manifest.variants) == {"fp32"}


def test_fp16_is_what_is_left() -> None:
    """What GPUs compute in beside the integers."""
    names = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp16", "w4g32": "fp16", "kv8": "fp16"}
    assert {name: parse_scheme(name).gpu_base for name in names} == names
