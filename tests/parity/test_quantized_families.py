"""Integer weights, every family: on ONNX Runtime CPU, and evaluated in the dialects of the engines on GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

import accel
from accel.bundle import Bundle
from accel.scheme import parse_scheme
from accel.variants import LIMITS, add_variant
from tests.parity.families import ALL, FAMILIES

VARIANTS = ("w8a8-dyn", "w4g32")


def operators(bundle: Bundle, variant: str) -> list[ir.Node]:
    model = ir.load(bundle.file(bundle.graph(variant, "ort-cpu").file))
    return [node for node in model.graph if node.domain == "accel.cpu"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ALL)
def test_every_family_is_compared(name: str, variant: str, bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    copied = shutil.copytree(bundle_of(name), tmp_path / name)
    bundle = add_variant(copied, variant, target="ort-cpu", algorithm="rtn", measure=False)
    parity = bundle.manifest.parity[f"{variant}/ort-cpu"]
    assert 0 < parity.max_rel_error < parity.limit and parity.reference == "PyTorch on the same integers"
    nodes = operators(bundle, variant)
    products = [node for node in nodes if node.op_type == "QuantizedMatMul"]
    record = bundle.variant(variant).quantization
    assert record is not None and products
    scheme = parse_scheme(variant)
    assert {node.attributes["block_size"].as_int() for node in products} <= {0, 32, 64, 128}
    assert any(node.attributes["block_size"].as_int() == scheme.group for node in products)
    assert len([node for node in nodes if node.op_type == "QuantizedGather"]) == 1
    with accel.load(copied, variant=variant, engine="ort-cpu") as model:
        assert model.engine.variant == variant


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in ("llama", "qwen3", "gemma3", "phi3", "mistral")])
def test_decoders_are_fused(name: str, bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    copied = shutil.copytree(bundle_of(name), tmp_path / name)
    bundle = add_variant(copied, "w8a8-dyn", target="ort-cpu", algorithm="rtn", check=False, measure=False)
    layers = len(bundle.manifest.arch.layers)
    products = [node for node in operators(bundle, "w8a8-dyn") if node.op_type == "QuantizedMatMul"]
    gated = [node for node in products if node.attributes["gated"].as_int()]
    assert len(gated) == layers
    assert {node.attributes["activation"].as_string() for node in gated} <= {"silu", "gelu_tanh"}
    assert len(products) <= 6 * layers + 1  # q, k, v apart at the worst, out, gate and up as one, down; the head


@pytest.mark.parametrize(("target", "variant"), [("cuda", "w4g32"), ("ort-cuda", "w8g32")])
@pytest.mark.parametrize("name", ALL)
def test_gpu_targets(
    name: str, variant: str, target: str, bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """In fp16 next to the same integers in float32; nothing that was quantised is stored in floats."""
    copied = shutil.copytree(bundle_of(name), tmp_path / name)
    bundle = add_variant(copied, variant, target=target, algorithm="rtn", measure=False)
    parity = bundle.manifest.parity[f"{variant}/{target}"]
    assert 0 < parity.max_rel_error < parity.limit == 2 * LIMITS["fp16"]
    record = bundle.variant(variant).quantization
    model = ir.load(bundle.file(bundle.graph(variant, target).file))
    stored = {value.name or "" for value in model.graph.initializers.values()}
    assert record is not None and record.layers
    for layer in record.layers:
        assert layer.name not in stored and f"{layer.name}.float16" not in stored
