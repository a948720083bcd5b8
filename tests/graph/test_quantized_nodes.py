"""Quantised graphs spelled out: the function bodies on ONNX Runtime beside PyTorch, and both beside the definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.errors import FusionError
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.external import write_external
from accel.graph.quantized import QuantizedWeight
from accel.graph.quantized_nodes import spell_quantized
from accel.quantized_tensor import QuantizedTensor
from tests.graph.small import assert_close, make, normal, ops, run

ROWS, COLUMNS = 6, 64


def quantized(bits: int, group: int) -> QuantizedTensor:
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    values = np.random.default_rng(bits).integers(low, high, (ROWS, COLUMNS), np.int8, endpoint=True)
    scales = normal(ROWS, COLUMNS // group if group else 1, seed=1) / 40  # of either sign
    return QuantizedTensor(values, scales, bits, group)


def graph(weight: QuantizedTensor, transposed: int = 1, bias: bool = True) -> ir.Model:
    """ids look rows up, and the rows' products with the same matrix are logits; biased or not."""
    text = f"""main (int64[S] ids, float[1,S,{COLUMNS}] x, float[{ROWS},{COLUMNS}] w, float[{ROWS}] b)
      => (float[1,S,{ROWS}] y, float[S,{COLUMNS}] rows) {{
      y = accel.Linear <transposed = {transposed}> ({"x, w, b" if bias else "x, w"})
      rows = Gather <axis = 0> (w, ids)
    }}"""
    model = make(text, w=weight.dequantize(), b=normal(ROWS))
    value = model.graph.initializers["w"]
    value.const_value = QuantizedWeight(weight, transposed, "w")
    return model


def rounded(x: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(np.rint(x / step), -127, 127) * step


def expected(x: NDArray[np.float32], weight: QuantizedTensor, bias: bool, activation: str) -> NDArray[np.float32]:
    scales = np.repeat(weight.scales, COLUMNS // weight.scales.shape[1], axis=1)
    if activation == "dynamic":
        peaks = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        x = rounded(x, np.where(peaks == 0, np.float32(1), peaks))
    elif activation == "static":
        x = rounded(x, np.float32(0.01))
    return x @ (weight.values * scales).T + (normal(ROWS) if bias else 0)


@pytest.mark.parametrize("activation", ["none", "dynamic", "static"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32), (4, 32), (4, 64), (4, 0)])
def test_bodies_and_evaluation_agree(bits: int, group: int, bias: bool, activation: str) -> None:
    weight = quantized(bits, group)
    model = graph(weight, bias=bias)
    assert spell_quantized(model, activation, {"w": 0.01}) == 2  # type: ignore[arg-type]
    assert ops(model) == ["QuantizedLinear", "QuantizedGather"] and "w" not in model.graph.initializers
    assert model.graph.initializers[f"w.q{bits}"].dtype == (ir.DataType.INT8 if bits == 8 else ir.DataType.INT4)
    x, ids = normal(1, 3, COLUMNS), np.array([5, 0, 5])
    x[0, 1] = 0.0  # a row without a step of its own
    bodies = run(model, x=x, ids=ids)
    evaluated = TorchGraph(model).run({"x": x, "ids": ids})
    assert_close(bodies, [expected(x, weight, bias, activation), weight.dequantize()[ids]])
    assert_close([evaluated["y"], evaluated["rows"]], bodies)


def test_a_matrix_of_columns_becomes_one_of_rows() -> None:
    """GPT-2's Conv1D: the graph has [K, N], integers lie by outputs."""
    text = f"""main (float[S,{COLUMNS}] x, float[{COLUMNS},{ROWS}] w) => (float[S,{ROWS}] y) {{
      y = accel.Linear <transposed = 0> (x, w)
    }}"""
    weight, x = quantized(4, 32), normal(3, COLUMNS)
    model = make(text, w=weight.dequantize().T.copy())
    model.graph.initializers["w"].const_value = QuantizedWeight(weight, 0, "w")
    before = run(model, x=x)
    assert spell_quantized(model) == 1
    assert list(model.graph.initializers["w.q4"].shape or ()) == [ROWS, COLUMNS]
    assert_close(run(model, x=x), before)


def test_rounding_inputs_changes_the_result() -> None:
    model, x = graph(quantized(8, 0)), normal(1, 3, COLUMNS)
    plain, dynamic = model.clone(), model.clone()
    spell_quantized(plain)
    spell_quantized(dynamic, "dynamic")
    first, second = (run(item, x=x, ids=np.array([0]))[0] for item in (plain, dynamic))
    difference = np.abs(first - second).max() / np.abs(first).max()
    assert 1e-4 < difference < 2e-2


def test_stored_integers_take_half_a_byte(tmp_path: Path) -> None:
    """Written to a weight file and read again, packed."""
    values = np.random.default_rng(0).integers(-8, 7, (64, 64), np.int8, endpoint=True)
    weight = QuantizedTensor(values, np.abs(normal(64, 2)).astype(np.float16).astype(np.float32), 4, 32)
    text = """main (float[S,64] x, float[64,64] w) => (float[S,64] y) { y = accel.Linear <transposed = 1> (x, w) }"""
    model = make(text, w=weight.dequantize())
    model.graph.initializers["w"].const_value = QuantizedWeight(weight, 1, "w")
    spell_quantized(model)
    assert write_external(model, tmp_path / "w4g32.weights") == (64 * 64 // 2)  # scales of 512 bytes stay in the graph
    ir.save(model, tmp_path / "model.onnx")
    again = ir.load(tmp_path / "model.onnx")
    stored = again.graph.initializers["w.q4"].const_value
    assert stored is not None and stored.dtype == ir.DataType.INT4
    assert (stored.numpy().astype(np.int8) == values).all()


def test_refusals() -> None:
    with pytest.raises(FusionError, match="no step is known for the input of w"):
        spell_quantized(graph(quantized(8, 0)), "static", {"other": 1.0})
    model = graph(quantized(8, 0))
    reader = ir.node("Neg", [model.graph.initializers["w"]], name="reader")
    model.graph.append(reader)
    with pytest.raises(FusionError, match="Neg node reads the quantised w"):
        spell_quantized(model)
