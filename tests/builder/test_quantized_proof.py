"""The proof of few bits can fail: one mutation for each thing that it says of weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from accel.builder.network import NetworkView
from accel.builder.parse import parse
from accel.builder.proof import Proof, prove
from accel.builder.proof_table import ProofTable
from accel.builder.repair import repair
from accel.builder.source import GraphSource
from accel.engines.tensorrt.adapter import load_flavour
from accel.graph.lowering.tensorrt import lower
from accel.graph.quantized import QuantizedWeight
from accel.quantized_tensor import QuantizedTensor
from accel.scheme import parse_scheme
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import make

pytest.importorskip("tensorrt_rtx")
SIZE = VOCAB = 64  # the table could stand for the product's weight
LAYER = AttentionSpec(heads=2, kv_heads=2, head_dim=32, scale=0.4)
ARCH = ArchSpec("bert", "BertModel", "encoder", "feature-extraction", SIZE, VOCAB, 32, 100, False, (LAYER,))
ENCODER = f"""main (int64[B,S] input_ids, int64[B,S] attention_mask, float[{SIZE}] g, float[{VOCAB},{SIZE}] t,
    float[{SIZE},{SIZE}] w) => (float[B,S,{SIZE}] y)
    <float[B,S,{SIZE}] x, float[B,S,{SIZE}] n, float[B,S,{SIZE}] p, float[B,S,{SIZE}] a> {{
  x = Gather <axis = 0> (t, input_ids)
  n = LayerNormalization <axis = -1> (x, g)
  p = accel.Linear <transposed = 1> (n, w)
  a = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4> (p, n, n, attention_mask)
  y = Add (a, x)
}}"""
Edit = Callable[[NetworkView], None]


def quantized(rows: int, bits: int, group: int) -> QuantizedTensor:
    rng = np.random.default_rng(bits)
    values = rng.integers(-7, 8, (rows, SIZE), np.int8)
    scales = rng.uniform(0.01, 0.02, (rows, SIZE // group if group else 1)).astype(np.float32)
    return QuantizedTensor(values, scales, bits, group)


def encoder(variant: str, folder: Path) -> Path:
    scheme = parse_scheme(variant)
    assert scheme.weight_bits is not None
    weights = {"t": quantized(VOCAB, 8, scheme.group), "w": quantized(SIZE, scheme.weight_bits, scheme.group)}
    floats = {name: weight.dequantize() for name, weight in weights.items()}
    model = make(ENCODER, g=np.ones(SIZE, np.float32), **floats)
    for name, weight in weights.items():
        model.graph.initializers[name].const_value = QuantizedWeight(weight, 1, name)
    steps = {"w": 0.02}
    lowered, _ = lower(model, ARCH, 32, ir.DataType.FLOAT16, scheme=scheme, static_scales=steps)
    ir.save(lowered, folder / "model.onnx", external_data="weights.bin", size_threshold_bytes=256)
    return folder / "model.onnx"


def proven(variant: str, folder: Path, edit: Edit | None = None) -> ProofTable:
    made = parse(load_flavour("rtx"), GraphSource(encoder(variant, folder)))
    repairs = repair(NetworkView(made.flavour, made.network))
    if edit is not None:
        edit(NetworkView(made.flavour, made.network))
    return prove(Proof(NetworkView(made.flavour, made.network), made.source, ARCH, "float16"), repairs)


def found(table: ProofTable, check: str) -> list[str]:
    return [row.found for row in table.rows if row.check == check]


@pytest.mark.parametrize(("variant", "dtype"), [("w8a8", "int8"), ("w8g32", "int8"), ("w4g32", "int4")])
def test_what_is_proven(variant: str, dtype: str, tmp_path: Path) -> None:
    table = proven(variant, tmp_path)
    assert table.ok, table.text()
    assert found(table, f"products with {dtype} weights") == ["1"]
    assert found(table, "look-ups with int8 weights") == ["1"]
    assert found(table, "products with int8 inputs") == (["1"] if variant == "w8a8" else [])
    assert found(table, "operators proven by presence alone") == ["none"]


def layers(view: NetworkView, kind: str) -> list[Any]:
    return view.of_type(kind)


def weight_layer(view: NetworkView) -> Any:
    """The DEQUANTIZE of the product's weight."""
    return view.producer(view.origin(layers(view, "MATRIX_MULTIPLY")[0].get_input(1)))


def other_axis(view: NetworkView) -> None:
    weight_layer(view).axis = 0


def unrounded_input(view: NetworkView) -> None:
    pair = layers(view, "QUANTIZE")[0]
    layers(view, "MATRIX_MULTIPLY")[0].set_input(0, pair.get_input(0))


def other_weight(view: NetworkView) -> None:
    """The table for the product's weight."""
    widened = view.producer(layers(view, "MATRIX_MULTIPLY")[0].get_input(1))
    widened.set_input(0, layers(view, "GATHER")[0].get_input(0))


def other_scale(view: NetworkView) -> None:
    """The table's scales for the product's."""
    table = view.producer(layers(view, "GATHER")[0].get_input(0))
    weight_layer(view).set_input(1, table.get_input(1))


@pytest.mark.parametrize(
    ("variant", "edit", "row"),
    [
        ("w8a8", other_axis, "DequantizeLinear layers"),
        ("w8a8", unrounded_input, "products with int8 inputs"),
        ("w4g32", other_weight, "products with int4 weights"),
        ("w8a8", other_scale, "DequantizeLinear layers"),
    ],
)
def test_mutated_network_is_refused(variant: str, edit: Edit, row: str, tmp_path: Path) -> None:
    table = proven(variant, tmp_path, edit)
    assert any(failed.check.startswith(row) for failed in table.failures), table.text()
