"""ONNX Runtime's own operators, evaluated by PyTorch and by its CPU kernels on the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from accel.errors import FusionError
from accel.graph.evaluation.contrib import CONTRIB
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.ort_cuda.quantized import pack_blocks
from accel.quantized_tensor import QuantizedTensor
from tests.graph.evaluation.test_torch_graph import draw, value_like

Arrays = list[NDArray | None]
HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 32, 12


def graph(op: str, inputs: Arrays, outputs: tuple[str, ...], **attributes: Any) -> ir.Model:
    """One node over graph inputs a, b, ...; an output without a name is left out."""
    values = [None if array is None else value_like(chr(97 + place), array) for place, array in enumerate(inputs)]
    node = ir.node(op, values, attributes, domain="com.microsoft", num_outputs=len(outputs), name="node")
    for value, name in zip(node.outputs, outputs, strict=True):
        value.name = name
    feeds = [value for value in values if value is not None]
    kept = [value for value in node.outputs if value.name]
    opsets = {"": 23, "com.microsoft": 1}
    return ir.Model(ir.Graph(feeds, kept, nodes=[node], opset_imports=opsets, name="g"), ir_version=10)


def check(op: str, inputs: Arrays, outputs: tuple[str, ...] = ("out",), **attributes: Any) -> dict[str, NDArray]:
    model = graph(op, inputs, outputs, **attributes)
    feeds = {chr(97 + place): array for place, array in enumerate(inputs) if array is not None}
    proto = ir.to_proto(model)
    for value in proto.graph.output:  # their types are inferred
        value.ClearField("type")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = TorchGraph(model).run(feeds)
    assert list(found) == [node.name for node in session.get_outputs()]
    for name, theirs in zip(found, session.run(None, feeds), strict=True):
        assert found[name].dtype == theirs.dtype and found[name].shape == theirs.shape
        np.testing.assert_allclose(found[name], theirs, rtol=1e-5, atol=1e-5, err_msg=name)
    return found


@pytest.mark.parametrize("transposed", [0, 1])
def test_fused_mat_mul(transposed: int) -> None:
    check("FusedMatMul", [draw(2, 3, 8), draw(5, 8) if transposed else draw(8, 5)], transB=transposed)


def test_activations() -> None:
    check("BiasGelu", [draw(2, 3, 8), draw(8)])
    check("FastGelu", [draw(2, 3, 8), draw(8)])
    check("FastGelu", [draw(2, 3, 8)])
    check("QuickGelu", [draw(2, 3, 8)], alpha=1.0)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("outputs", [("out",), ("out", "", "", "sum")], ids=["norm", "sum too"])
@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_skip_norms(op: str, outputs: tuple[str, ...], bias: bool) -> None:
    shift: Arrays = [draw(8, low=-0.5)] if op == "SkipLayerNormalization" else []
    more: Arrays = [draw(8, low=-1.0, high=3.0)] if bias else []
    check(op, [draw(2, 3, 8), draw(2, 3, 8, high=5.0), draw(8, low=0.5), *shift, *more], outputs, epsilon=1e-3)


MASKS = {
    "none": None,
    "lengths": np.array([5, 2], np.int32),
    "holes": np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]], np.int32),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("scores", [False, True], ids=["", "score bias"])
def test_multi_head_attention(mask: str, bias: bool, scores: bool) -> None:
    width = HEADS * SIZE
    qkv = [draw(2, 5, width, high=limit) for limit in (1.0, 2.0, 3.0)]
    extra = [draw(3 * width) if bias else None, MASKS[mask], draw(1, HEADS, 5, 5) if scores else None]
    attributes = {"num_heads": HEADS, "scale": 0.3, "mask_filter_value": -30000.0}
    check("MultiHeadAttention", [*qkv, *extra], **attributes)


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("rotated", [0, SIZE, 16], ids=["", "rotated", "partly rotated"])
@pytest.mark.parametrize("extra", [{}, {"local_window_size": 3}, {"softcap": 2.0}], ids=["", "window", "softcap"])
@pytest.mark.parametrize(("taken", "tokens"), [((4, 0, 7), 1), ((5,), 4), ((0,), 6)], ids=["rows", "chunk", "prompt"])
def test_group_query_attention(
    taken: tuple[int, ...], tokens: int, extra: dict[str, Any], rotated: int, packed: bool
) -> None:
    """One token per row, or one row with several tokens on its own past."""
    rows, sizes = len(taken), [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    qkv = draw(rows, tokens, sum(sizes))
    parts: Arrays = [qkv, None, None] if packed else list(np.split(qkv, np.cumsum(sizes)[:-1], axis=-1))
    caches = [draw(rows, KV_HEADS, CAPACITY, SIZE, high=high) for high in (2.0, 3.0)]
    for cache in caches:
        for row, count in enumerate(taken):
            cache[row, :, count:] = 0
    lengths = np.array(taken, np.int32) + tokens
    angles = draw(CAPACITY, max(rotated, 2) // 2)
    tables: Arrays = [np.cos(angles), np.sin(angles)] if rotated else []
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3, "do_rotary": int(rotated > 0), **extra}
    inputs = [*parts, *caches, lengths - 1, np.array(lengths.max(), np.int32), *tables]
    check("GroupQueryAttention", inputs, ("out", "keys", "values"), **attributes)


def test_every_operator_is_compared() -> None:
    attention, norms = {"MultiHeadAttention", "GroupQueryAttention"}, {"SkipLayerNormalization"}
    integers = {"MatMulNBits", "GatherBlockQuantized"}
    assert {"FusedMatMul", "BiasGelu", "FastGelu", "QuickGelu"} | attention | norms | integers == set(CONTRIB) - {
        "SkipSimplifiedLayerNormalization"
    }


def test_attributes_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(FusionError, match="FusedMatMul with transA"):
        TorchGraph(graph("FusedMatMul", [draw(3, 3), draw(3, 3)], ("out",), transA=1))
    with pytest.raises(FusionError, match="no evaluation for com.microsoft::Unheard"):
        TorchGraph(graph("Unheard", [draw(3, 3)], ("out",)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_and_rows_of_integers(bits: int, group: int, dtype: type) -> None:
    """Every integer of the range, scales of both signs; both operators read one initializer."""
    half, (count, size) = 1 << (bits - 1), (33, 256)
    values = (np.arange(count * size) * 7919 % (2 * half) - half).astype(np.int8).reshape(count, size)
    scales = (draw(count, size // group) / half).astype(np.float16).astype(np.float32)
    tensor = QuantizedTensor(values, scales, bits, group)
    blocks, stored = pack_blocks(tensor), scales.astype(dtype)
    x, ids = draw(3, size).astype(dtype), np.array([[32, 0], [5, 5]])
    exact = x.astype(np.float64) @ tensor.dequantize().T
    attributes = {"bits": bits, "block_size": group}
    op = graph("MatMulNBits", [x, blocks, stored], ("out",), N=count, K=size, **attributes)
    for found in both(op, {"a": x, "b": blocks, "c": stored}):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, exact, atol=(2e-6 if dtype == np.float32 else 2e-3) * np.abs(exact).max())
    attributes |= {"gather_axis": 0, "quantize_axis": 2}
    op = graph("GatherBlockQuantized", [blocks, ids, stored[..., None]], ("out",), **attributes)
    for found in both(op, {"a": blocks, "b": ids, "c": stored[..., None]}):
        assert found.shape == (2, 2, size // group, group) and found.dtype == dtype
        np.testing.assert_array_equal(found.reshape(2, 2, size), tensor.dequantize()[ids].astype(dtype))


def both(model: ir.Model, feeds: dict[str, NDArray]) -> list[NDArray]:
    """The output by PyTorch and by ONNX Runtime, whose operators want the integers as initializers."""
    proto = ir.to_proto(model)
    for value in [value for value in proto.graph.input if feeds[value.name].dtype == np.uint8]:
        proto.graph.input.remove(value)
        proto.graph.initializer.append(numpy_helper.from_array(feeds[value.name], value.name))
    for value in proto.graph.output:
        value.ClearField("type")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {node.name: feeds[node.name] for node in session.get_inputs()}
    return [TorchGraph(model).run(feeds)["out"], session.run(None, given)[0]]
