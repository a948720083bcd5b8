"""Integers and 8-bit floats in TensorRT's dialect: the forms that are written, and their numbers on ONNX Runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from accel.errors import FusionError
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.external import write_external
from accel.graph.lowering.tensorrt.linear import lower_linear
from accel.graph.lowering.tensorrt.precision import set_precision
from accel.graph.lowering.tensorrt.quantized import LEAST_STEP, lower_quantized
from accel.graph.quantized import QuantizedWeight
from accel.quantized_tensor import QuantizedTensor, float8_scale, round_float8
from accel.scheme import parse_scheme
from tests.graph.small import assert_close, make, normal, ops

ROWS, COLUMNS, STEP = 6, 64, 0.01
WEIGHTS = [(8, 0), (8, 32), (4, 32), (4, 64), (4, 0)]


def quantized(bits: int, group: int) -> QuantizedTensor:
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    values = np.random.default_rng(bits).integers(low, high, (ROWS, COLUMNS), np.int8, endpoint=True)
    scales = (normal(ROWS, COLUMNS // group if group else 1, seed=1) / 40).astype(np.float16)
    return QuantizedTensor(values, scales.astype(np.float32), bits, group)


def product(weight: QuantizedTensor, transposed: int = 1, rank: int = 3) -> ir.Model:
    batch, shape = "1," * (rank - 2), f"{ROWS},{COLUMNS}" if transposed else f"{COLUMNS},{ROWS}"
    text = f"""main (float[{batch}S,{COLUMNS}] x, float[{shape}] w, float[{ROWS}] b) => (float[{batch}S,{ROWS}] y) {{
      y = accel.Linear <transposed = {transposed}> (x, w, b)
    }}"""
    wide = weight.dequantize()
    return annotated(make(text, w=wide if transposed else wide.T.copy(), b=normal(ROWS)), weight, transposed)


def tied(weight: QuantizedTensor) -> ir.Model:
    text = f"""main (int64[S] ids, float[1,S,{COLUMNS}] x, float[{ROWS},{COLUMNS}] w)
      => (float[1,S,{ROWS}] y, float[S,{COLUMNS}] rows) {{
      rows = Gather <axis = 0> (w, ids)
      y = accel.Linear <transposed = 1> (x, w)
    }}"""
    return annotated(make(text, w=weight.dequantize()), weight, 1)


def annotated(model: ir.Model, weight: QuantizedTensor, transposed: int) -> ir.Model:
    model.graph.initializers["w"].const_value = QuantizedWeight(weight, transposed, "w")
    return model


def lowered(model: ir.Model, variant: str = "w4g32", steps: dict[str, float] | None = None) -> ir.Model:
    assert lower_quantized(model, parse_scheme(variant), steps or {}) == 1
    lower_linear(model)
    model.graph.initializers.pop("w", None)
    model.opset_imports[""] = 24
    return model


def run(model: ir.Model, **feeds: NDArray) -> list[NDArray]:
    """On ONNX Runtime as it stands: optimised, a product of dequantised weights would round its input too."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    return list(ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds))


def rounded(x: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    return np.clip(np.rint(x / np.float32(step)), -128, 127) * np.float32(step)


def stored(model: ir.Model, dtype: ir.DataType) -> ir.TensorProtocol:
    """The one initializer that is dequantised."""
    (node,) = (n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer())  # type: ignore[union-attr]
    value = node.inputs[0]
    assert value is not None and value.const_value is not None and value.dtype == value.const_value.dtype == dtype
    return value.const_value


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("bits", "group"), WEIGHTS)
def test_products_of_integers(bits: int, group: int, transposed: int, rank: int) -> None:
    weight = quantized(bits, group)
    model, x = lowered(product(weight, transposed, rank)), normal(*[1] * (rank - 2), 3, COLUMNS)
    tensor = stored(model, ir.DataType.INT4 if bits == 4 and group else ir.DataType.INT8)
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), weight.values.T)
    assert "Transpose" not in ops(model)
    expected = [x @ weight.dequantize().T + normal(ROWS)]
    assert_close(run(model, x=x), expected)
    assert_close(list(TorchGraph(model).run({"x": x}).values()), expected)


@pytest.mark.parametrize(("bits", "group"), WEIGHTS)
def test_a_tied_table_is_stored_once_by_rows(bits: int, group: int) -> None:
    weight = quantized(bits, group)
    model, x, ids = lowered(tied(weight)), normal(1, 3, COLUMNS), np.array([5, 0, 5])
    tensor = stored(model, ir.DataType.INT4 if bits == 4 and group else ir.DataType.INT8)
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), weight.values)
    wide = weight.dequantize()
    assert_close(run(model, x=x, ids=ids), [x @ wide.T, wide[ids]])


def test_static_inputs_are_rounded_once() -> None:
    text = f"""main (float[1,S,{COLUMNS}] x, float[{ROWS},{COLUMNS}] w, float[{ROWS},{COLUMNS}] v)
      => (float[1,S,{ROWS}] y, float[1,S,{ROWS}] z) {{
      y = accel.Linear <transposed = 1> (x, w)
      z = accel.Linear <transposed = 1> (x, v)
    }}"""
    weight, x = quantized(8, 0), 2 * normal(1, 3, COLUMNS)  # some lie beyond 127 steps
    model = annotated(make(text, w=weight.dequantize(), v=weight.dequantize()), weight, 1)
    model.graph.initializers["v"].const_value = QuantizedWeight(weight, 1, "v")
    assert lower_quantized(model, parse_scheme("w8a8"), {"w": STEP, "v": STEP}) == 2
    lower_linear(model)
    model.opset_imports[""] = 24
    assert ops(model).count("QuantizeLinear") == 1
    (node,) = (node for node in model.graph if node.op_type == "QuantizeLinear")
    assert node.outputs[0].dtype == ir.DataType.INT8
    expected = [rounded(x, STEP) @ weight.dequantize().T] * 2
    assert_close(run(model, x=x), expected)
    assert_close(list(TorchGraph(model).run({"x": x}).values()), expected)


@pytest.mark.parametrize("transposed", [0, 1])
def test_float8(transposed: int) -> None:
    model, x = product(quantized(8, 0), transposed), 3 * normal(1, 3, COLUMNS)
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    wide = value.const_value.numpy()
    value.const_value = ir.tensor(wide, name="w")
    model = lowered(model, "fp8", {"w": STEP})
    tensor, scale = stored(model, ir.DataType.FLOAT8E4M3FN), float8_scale(wide)
    few = (round_float8(wide, scale).T if transposed else round_float8(wide, scale)).astype(np.float32)
    np.testing.assert_array_equal(tensor.numpy().astype(np.float32), few)
    scaled = np.clip(x / np.float32(STEP), -448, 448)
    assert (np.abs(scaled) == 448).any()
    inputs = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(STEP)
    expected = [inputs @ (few * np.float32(scale)) + normal(ROWS)]
    assert_close(list(TorchGraph(model).run({"x": x}).values()), expected)
    assert_close(run(model, x=x), expected)


def test_float8_rounds_to_the_nearest_and_keeps_the_ends() -> None:
    weight = np.array([[448.0, -448.0, 1.0, 1.06, 1.07, 0.0, 2.0**-9, 2.0**-11]], np.float32)
    assert float8_scale(weight) == 1.0 and float8_scale(np.zeros((2, 2), np.float32)) == LEAST_STEP
    found = round_float8(weight, 1.0).astype(np.float32)
    np.testing.assert_array_equal(found, [[448, -448, 1, 1, 1.125, 0, 2.0**-9, 0]])
    assert np.isfinite(round_float8(3 * weight, 1.0).astype(np.float32)).all()


@pytest.mark.parametrize("variant", ["w4g32", "w8a8"])
def test_types_in_fp16(variant: str) -> None:
    model = lowered(product(quantized(4, 32) if variant == "w4g32" else quantized(8, 0)), variant, {"w": 1e-9})
    set_precision(model, ir.DataType.FLOAT16)
    low = ir.DataType.FLOAT16
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1] is not None and node.inputs[1].dtype == low
            assert {node.inputs[0].dtype, node.outputs[0].dtype} & {low}  # type: ignore[union-attr]
    if variant == "w8a8":  # a step that fp16 has no number for does not become zero
        (scale,) = (v for name, v in model.graph.initializers.items() if name.startswith("w.x_scale.float16"))
        assert scale.const_value is not None and scale.const_value.numpy() > 0


def test_files_hold_two_numbers_in_a_byte(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rng, size = np.random.default_rng(0), 96
    weight = QuantizedTensor(
        rng.integers(-8, 7, (size, COLUMNS), np.int8), np.ones((size, 2), np.float32), 4, 32
    )  # fmt: skip
    text = f"""main (float[1,S,{COLUMNS}] x, float[{size},{COLUMNS}] w) => (float[1,S,{size}] y) {{
      y = accel.Linear <transposed = 1> (x, w)
    }}"""
    model = lowered(annotated(make(text, w=weight.dequantize()), weight, 1))
    write_external(model, tmp_path / "weights")
    tensor = stored(model, ir.DataType.INT4)
    assert isinstance(tensor, ir.ExternalTensor) and tensor.length == size * COLUMNS // 2
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), weight.values.T)


def test_what_is_refused() -> None:
    with pytest.raises(FusionError, match="no calibrated scale for this product's input"):
        lower_quantized(product(quantized(8, 0)), parse_scheme("w8a8"), {})
    text = f"main (float[1,{COLUMNS}] x, float[{ROWS},{COLUMNS}] w) => (float[{ROWS},{COLUMNS}] y) {{ y = Add (x, w) }}"
    weight = quantized(4, 32)
    with pytest.raises(FusionError, match="a Add node reads the quantised w"):
        lower_quantized(annotated(make(text, w=weight.dequantize()), weight, 1), parse_scheme("w4g32"), {})
