"""Every operator of TensorRT's dialect, evaluated by PyTorch and by ONNX Runtime on the same numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from accel.engines.torch_operators import OPERATORS, TYPES, to_numpy, to_torch
from accel.errors import FusionError
from accel.graph.evaluation.torch_graph import TorchGraph

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def draw(*shape: int, low: float = -2.0, high: float = 2.0) -> NDArray[np.float32]:
    seed = sum(size * 7**place for place, size in enumerate(shape))
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def bools(*shape: int) -> NDArray[np.bool_]:
    """Random, but the first of each row is true: a softmax over nothing is no number."""
    drawn = draw(*shape) > 0
    drawn[..., 0] = True
    return drawn


def value_like(name: str, array: NDArray) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Value(name=name, type=kind, shape=ir.Shape(array.shape))


def graph(op: str, inputs: list[NDArray | None], outputs: int = 1, **attributes: Any) -> ir.Model:
    """One node over graph inputs a, b, ...; None is an input that is left out."""
    values = [None if array is None else value_like(chr(97 + place), array) for place, array in enumerate(inputs)]
    node = ir.node(op, values, attributes, num_outputs=outputs, name="node")
    for place, value in enumerate(node.outputs):
        value.name = f"out{place}"
    feeds = [value for value in values if value is not None]
    return ir.Model(ir.Graph(feeds, node.outputs, nodes=[node], opset_imports={"": 24}, name="g"), ir_version=11)


def compute(model: ir.Model, inputs: list[NDArray | None]) -> tuple[list[NDArray], list[NDArray]]:
    """What PyTorch and what ONNX Runtime say."""
    feeds = {chr(97 + place): array for place, array in enumerate(inputs) if array is not None}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    for value in proto.graph.output:  # their types are inferred
        value.ClearField("type")
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = TorchGraph(model).run(feeds)
    assert list(found) == [value.name for value in session.get_outputs()]
    return list(found.values()), session.run(None, feeds)


def check(op: str, inputs: list[NDArray | None], outputs: int = 1, **attributes: Any) -> None:
    found, expected = compute(graph(op, inputs, outputs, **attributes), inputs)
    assert len(found) == len(expected) == outputs
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


UNARY = {
    "Neg": draw(3, 4), "Abs": draw(3, 4), "Sigmoid": draw(3, 4), "Tanh": draw(3, 4), "Relu": draw(3, 4),
    "Round": np.array([[-1.5, -0.5, 0.5, 1.5, 2.5, 0.4, -0.6]], np.float32),
    "Sqrt": draw(3, 4, low=0.0), "Exp": draw(3, 4), "Log": draw(3, 4, low=0.1), "Cos": draw(3, 4), "Sin": draw(3, 4),
    "Erf": draw(3, 4), "Reciprocal": draw(3, 4, low=0.5), "Identity": draw(3, 4), "Not": bools(3, 4),
}  # fmt: skip
BINARY = {
    **{name: (draw(3, 4), draw(2, 1, 4)) for name in ("Add", "Sub", "Mul", "Div", "Min", "Max")},
    "Pow": (draw(3, 4, low=0.1), np.array(3.0, np.float32)),
    "MatMul": (draw(2, 3, 4), draw(4, 5)),
    "And": (bools(3, 4), bools(1, 4)),
    "Or": (bools(3, 4), bools(1, 4)),
    "Equal": (ints(1, 2, 3), ints(1, 5, 3)),
    **{name: (ints(1, 2, 3), ints(2, 2, 2)) for name in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
}
INT8S = np.random.default_rng(0).integers(-128, 128, (6, 8), np.int8)
INT4S = np.random.default_rng(1).integers(-8, 8, (6, 8)).astype(ml_dtypes.int4)
FLOAT8S = draw(6, 8, low=-500.0, high=448.0).astype(ml_dtypes.float8_e4m3fn)
TO_INT8, TO_FLOAT8 = ({"output_dtype": int(dtype)} for dtype in (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN))
HALF = draw(6, 8).astype(np.float16)
# Operator, inputs, attributes; in forms that the dialect uses and in those that differ only in a default.
FORMS: list[tuple[str, list[NDArray | None], dict[str, Any]]] = [
    *((name, [array], {}) for name, array in UNARY.items()),
    *((name, list(pair), {}) for name, pair in BINARY.items()),
    ("Div", [ints(-7, 7, 9), ints(2, -2, 3)], {}),
    ("Where", [bools(3, 4), draw(3, 4), np.array(-5.0, np.float32)], {}),
    *(("Cast", [array], {"to": int(to)})
      for array in (draw(3, 4, high=9.0), bools(3, 4), ints(0, 3, -2))
      for to in (FLOAT, ir.DataType.FLOAT16, INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.DOUBLE)),
    ("Concat", [draw(2, 3), draw(2, 5)], {"axis": -1}),
    ("Range", [np.array(2, np.int64), np.array(11, np.int64), np.array(3, np.int64)], {}),
    ("Transpose", [draw(2, 3, 4)], {"perm": [0, 2, 1]}),
    ("Transpose", [draw(2, 3, 4)], {}),
    ("Reshape", [draw(2, 3, 4), ints(0, -1)], {}),
    ("Unsqueeze", [draw(3, 4), ints(0, -1)], {}),
    ("Unsqueeze", [draw(3, 4), ints(2, 0)], {}),
    ("Squeeze", [draw(1, 3, 1), ints(-1)], {}),
    ("Squeeze", [draw(1, 3, 1)], {}),
    ("Shape", [draw(2, 3, 4)], {}),
    ("Shape", [draw(2, 3, 4)], {"start": 1}),
    ("Shape", [draw(2, 3, 4)], {"start": -2, "end": -1}),
    ("Gather", [draw(5, 3), ints([0, 4], [-1, 2])], {}),
    ("Gather", [draw(5, 3), np.array(1, np.int64)], {"axis": -1}),
    ("GatherElements", [draw(3, 4), ints([0, 1], [2, 3], [3, 0])], {"axis": 1}),
    ("GatherElements", [draw(3, 4), ints([0, -1], [2, -3], [3, 0])], {"axis": 1}),
    ("Slice", [draw(4, 6), ints(1), ints(2**62), ints(1)], {}),
    ("Slice", [draw(4, 6), ints(-3, 0), ints(-1, 6), ints(0, 1), ints(1, 2)], {}),
    ("Slice", [draw(4, 6), ints(-1), ints(-(2**62)), ints(1), ints(-1)], {}),
    ("Slice", [draw(4, 6), ints(1, 2), ints(3, 5)], {}),
    ("Expand", [draw(3, 1), ints(2, 1, 4)], {}),
    ("CumSum", [ints([1, 2, 3], [4, 5, 6]), np.array(1, np.int64)], {}),
    *((name, [draw(2, 3, 4), ints(-1)], {"keepdims": keep}) for name in ("ReduceMean", "ReduceSum") for keep in (0, 1)),
    *((name, [draw(2, 3, 4)], {}) for name in ("ReduceMean", "ReduceSum")),
    ("LayerNormalization", [draw(2, 3, 8), draw(8), draw(8, low=0.0)], {"epsilon": 1e-3}),
    ("LayerNormalization", [draw(2, 3, 8), draw(8)], {}),
    ("RMSNormalization", [draw(2, 3, 8), draw(8)], {"epsilon": 1e-3}),
    ("RMSNormalization", [draw(2, 3, 8), draw(8)], {}),
    ("Softmax", [draw(2, 3, 4)], {}),
    ("Softmax", [draw(2, 3, 4)], {"axis": 1}),
    ("Gelu", [draw(3, 4)], {}),
    ("Gelu", [draw(3, 4)], {"approximate": "tanh"}),
    ("Gemm", [draw(3, 4), draw(5, 4), draw(5)], {"transB": 1}),
    ("Gemm", [draw(3, 4), draw(4, 5)], {}),
    ("QuantizeLinear", [draw(6, 8), np.array(0.013, np.float32)], TO_INT8),
    ("QuantizeLinear", [np.array([0.5, 1.5, -2.5, 200, -200], np.float32), np.array(1.0, np.float32)], TO_INT8),
    ("QuantizeLinear", [HALF, np.array(0.015625, np.float16)], TO_INT8),
    ("QuantizeLinear", [draw(6, 8), draw(8, low=0.01)], {"axis": -1, **TO_INT8}),
    ("DequantizeLinear", [INT8S, np.array(0.013, np.float32)], {}),
    ("DequantizeLinear", [INT8S, np.array(0.013, np.float16)], {}),
    ("DequantizeLinear", [INT8S, draw(6)], {"axis": 0}),
    ("DequantizeLinear", [INT8S, draw(8)], {}),
    ("DequantizeLinear", [INT8S, draw(2, 8)], {"axis": 0, "block_size": 3}),
    ("DequantizeLinear", [INT8S, draw(6, 2)], {"axis": -1, "block_size": 4}),
    ("ArgMax", [draw(3, 40)], {"axis": -1, "keepdims": 0}),
    ("ArgMax", [ints([1, 5, 5], [5, 1, 5])], {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "attributes"), FORMS, ids=lambda item: item if isinstance(item, str) else "")
def test_operator(op: str, inputs: list[NDArray | None], attributes: dict[str, Any]) -> None:
    check(op, inputs, **attributes)


@pytest.mark.parametrize(
    ("array", "scale", "attributes"),
    [
        (INT4S, np.array(0.013, np.float32), {}),
        (INT4S, draw(2, 8), {"axis": 0, "block_size": 3}),
        (INT4S, draw(6, 2), {"axis": -1, "block_size": 4}),
        (FLOAT8S, np.array(0.013, np.float32), {}),
        (FLOAT8S, np.array(0.5, np.float16), {}),
    ],
    ids=["int4", "int4 in blocks of rows", "int4 in blocks of columns", "float8", "float8 to half"],
)
def test_stored_numbers(array: NDArray, scale: NDArray, attributes: dict[str, Any]) -> None:
    """Types that NumPy does not hand to ONNX Runtime are initializers."""
    model = graph("DequantizeLinear", [array, scale], **attributes)
    value = model.graph.inputs.pop(0)
    value.const_value = ir.tensor(array, name=value.name)
    model.graph.register_initializer(value)
    found, expected = compute(model, [None, scale])
    np.testing.assert_array_equal(found[0], expected[0], strict=True)


def test_rounding_to_float8() -> None:
    """There and back, as its numbers do not come out of ONNX Runtime; beyond the range lies its end."""
    x, scale = draw(6, 8, low=-900.0, high=900.0), np.array(1.5, np.float32)
    model = graph("QuantizeLinear", [x, scale], **TO_FLOAT8)
    few = model.graph.outputs[0]
    few.dtype = ir.DataType.FLOAT8E4M3FN
    back = ir.node("DequantizeLinear", [few, model.graph.inputs[1]], name="back")
    back.outputs[0].name = "wide"
    model.graph.append(back)
    model.graph.outputs[0] = back.outputs[0]
    found, expected = compute(model, [x, scale])
    np.testing.assert_array_equal(found[0], expected[0], strict=True)
    assert np.abs(found[0]).max() == 448 * 1.5


@pytest.mark.parametrize("sizes", [ints(1, 4, 2), None], ids=["sizes", "equal parts"])
def test_split(sizes: NDArray | None) -> None:
    array = draw(2, 7) if sizes is not None else draw(2, 6)
    given = {} if sizes is not None else {"num_outputs": 3}
    check("Split", [array, sizes] if sizes is not None else [array], 3, axis=-1, **given)


def test_split_into_unequal_parts() -> None:
    check("Split", [draw(2, 7)], 3, axis=1, num_outputs=3)


def test_every_operator_is_compared() -> None:
    elsewhere = {"Split", "RotaryEmbedding", "TensorScatter", "Attention"}
    assert {op for op, _, _ in FORMS} | elsewhere == set(OPERATORS)


HEADS, ROWS, TOKENS, SIZE = 3, 2, 4, 16
POSITIONS = ints([0, 1, 2, 3], [5, 9, 6, 0])


@pytest.mark.parametrize("rotated", [SIZE, 8], ids=["whole", "partial"])
@pytest.mark.parametrize("interleaved", [0, 1], ids=["halves", "interleaved"])
@pytest.mark.parametrize("positions", [POSITIONS, None], ids=["positions", "rows"])
@pytest.mark.parametrize("flat", [False, True], ids=["4D", "3D"])
def test_rotary(rotated: int, interleaved: int, positions: NDArray | None, flat: bool) -> None:
    x = draw(ROWS, TOKENS, HEADS * SIZE) if flat else draw(ROWS, HEADS, TOKENS, SIZE)
    angles = draw(10, rotated // 2) if positions is not None else draw(ROWS, TOKENS, rotated // 2)
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": 0 if rotated == SIZE else rotated}
    if flat:
        attributes["num_heads"] = HEADS
    inputs = [x, np.cos(angles), np.sin(angles)] + ([positions] if positions is not None else [])
    check("RotaryEmbedding", inputs, **attributes)


@pytest.mark.parametrize("starts", [(0, 0), (3, 1), (5, 0)])
def test_tensor_scatter(starts: tuple[int, int]) -> None:
    """Each row has its own place; the last takes what is left of the cache."""
    check("TensorScatter", [draw(2, 3, 7, 4), draw(2, 3, 2, 4), ints(*starts)], axis=-2, mode="linear")


def test_tensor_scatter_leaves_the_old_cache() -> None:
    past, update = draw(1, 1, 3, 2), draw(1, 1, 1, 2)
    kept = past.copy()
    found, _ = compute(graph("TensorScatter", [past, update, ints(1)], axis=-2), [past, update, ints(1)])
    assert (past == kept).all() and (found[0] != past).any()


MASKS = {
    "none": None, "bool": bools(2, 1, 3, 5), "bool per head": bools(2, 4, 3, 5), "bool row": bools(2, 1, 1, 5),
    "float": draw(2, 1, 3, 5), "float per head": draw(1, 4, 3, 5),
}  # fmt: skip


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["as many heads", "grouped", "one"])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_attention(heads: int, scale: float | None, mask: str) -> None:
    arrays = [draw(2, 4, 3, 8), draw(2, heads, 5, 8), draw(2, heads, 5, 8, high=3.0), MASKS[mask]]
    if mask == "bool row":  # the standard lets a mask be broadcast
        arrays[3] = np.broadcast_to(arrays[3], (2, 1, 3, 5)).copy()  # type: ignore[arg-type]
        row = [*arrays[:3], MASKS[mask]]
        given = {} if scale is None else {"scale": scale}
        names = dict(zip("abcd", row))
        narrow = TorchGraph(graph("Attention", row, **given)).run(names)["out0"]  # type: ignore[arg-type]
        wide = TorchGraph(graph("Attention", arrays, **given)).run(dict(zip("abcd", arrays)))["out0"]  # type: ignore[arg-type]
        assert (narrow == wide).all()
    inputs = arrays if arrays[3] is not None else arrays[:3]
    check("Attention", inputs, **({} if scale is None else {"scale": scale}))


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(FusionError, match="no evaluation for Celu.*at evaluation"):
        TorchGraph(graph("Celu", [draw(2)]))


def test_attributes_that_would_be_ignored_are_refused() -> None:
    """Causal attention, softcaps and so on: their numbers would be wrong without a word."""
    arrays: list[NDArray | None] = [draw(1, 2, 3, 8)] * 3
    for attributes in ({"is_causal": 1}, {"softcap": 2.0}):
        with pytest.raises(FusionError, match=f"no evaluation for Attention with {next(iter(attributes))}"):
            TorchGraph(graph("Attention", arrays, **attributes))
    with pytest.raises(FusionError, match="TensorScatter with mode"):
        TorchGraph(graph("TensorScatter", [draw(1, 1, 3, 2), draw(1, 1, 1, 2), ints(1)], mode="circular"))
    with pytest.raises(FusionError, match="CumSum with exclusive"):
        TorchGraph(graph("CumSum", [draw(3), np.array(0, np.int64)], exclusive=1))
    with pytest.raises(FusionError, match="Gemm with alpha"):
        TorchGraph(graph("Gemm", [draw(3, 4), draw(4, 5)], alpha=2.0))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=lambda dtype: dtype.name.lower())
def test_rounds_after_every_operator(dtype: ir.DataType) -> None:
    """(a + b) - a loses what the type cannot hold; float32 in between would keep it."""
    a, b = ir.Value(name="a", type=ir.TensorType(dtype)), ir.Value(name="b", type=ir.TensorType(dtype))
    add = ir.node("Add", [a, b])
    back = ir.node("Sub", [add.outputs[0], a])
    add.outputs[0].name, back.outputs[0].name = "sum", "rest"
    model = ir.Model(ir.Graph([a, b], back.outputs, nodes=[add, back], opset_imports={"": 24}), ir_version=11)
    kind = np.float16 if dtype == ir.DataType.FLOAT16 else ml_dtypes.bfloat16
    large, small = np.array([1024.0, 1.0], kind), np.array([0.25, 0.25], kind)
    found = TorchGraph(model).run({"a": large, "b": small})["rest"]
    assert found.dtype == kind and found.astype(np.float32).tolist() == [0.0, 0.25]


def test_weights_are_read_once_and_inputs_stay_as_they_are() -> None:
    weight, x = draw(4, 5), draw(3, 4)
    x.flags.writeable = False
    value = ir.Value(name="w", const_value=ir.tensor(weight, name="w"), type=ir.TensorType(FLOAT))
    given = ir.Value(name="x", type=ir.TensorType(FLOAT))
    node = ir.node("MatMul", [given, value])
    node.outputs[0].name = "y"
    plain = ir.Graph([given], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 24})
    run = TorchGraph(ir.Model(plain, ir_version=11)).run
    first, second = run({"x": x})["y"], run({"x": x})["y"]
    np.testing.assert_allclose(first, x @ weight, rtol=1e-5, atol=1e-5)
    assert (first == second).all()


@pytest.mark.parametrize("dtype", [*TYPES], ids=lambda dtype: dtype.name.lower())
def test_arrays_and_tensors(dtype: ir.DataType) -> None:
    array = np.array([[0, 1], [1, 3]]).astype(dtype.numpy())
    tensor = to_torch(array)
    assert tensor.dtype == TYPES[dtype] and isinstance(tensor, torch.Tensor)
    assert to_numpy(tensor).dtype == array.dtype and (to_numpy(tensor) == array).all()
