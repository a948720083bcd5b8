"""The ONNX function of each op, run by ONNX Runtime, against its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import helper

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.bodies import DOMAIN, OPSET, SHARED  # noqa: E402
from accel_kernels.ops import OPS, Op  # noqa: E402
from accel_kernels.packing import pack  # noqa: E402
from accel_kernels.tiles import GELU_ERF, GELU_TANH, LAYER_NORM, NO_ACTIVATION, NO_NORM, RMS_NORM, SILU  # noqa: E402

BY_NAME = {op.name: op for op in OPS}


def evaluate(op: Op, inputs: list[Any], attributes: dict[str, Any], outputs: int = 1) -> list[Any]:
    """The outputs of a model of one node with the op's body and those that it calls."""
    functions = [onnx.parser.parse_function(text) for text in (*SHARED, op.body)]
    names = [f"input{i}" for i in range(len(inputs))]
    results = [f"output{i}" for i in range(outputs)]
    arrays = [tensor.numpy() for tensor in inputs]
    graph = helper.make_graph(
        [helper.make_node(op.function, names, results, domain=DOMAIN, **attributes)],
        "one node",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, arrays)
        ],
        [helper.make_value_info(name, onnx.TypeProto()) for name in results],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, dict(zip(names, arrays)))]


@pytest.fixture
def maker() -> Maker:
    return Maker("cpu")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_bodies_are_functions_of_the_domain(op: Op) -> None:
    function = onnx.parser.parse_function(op.body)
    assert (function.domain, function.name) == (DOMAIN, op.function)
    assert {opset.domain: opset.version for opset in function.opset_import} == {"": OPSET, DOMAIN: 1}


@pytest.mark.parametrize("activation", [NO_ACTIVATION, SILU, GELU_ERF, GELU_TANH])
@pytest.mark.parametrize("norm", [NO_NORM, RMS_NORM, LAYER_NORM])
@pytest.mark.parametrize("gated", [False, True])
def test_gemv(maker: Maker, norm: int, activation: int, gated: bool) -> None:
    x, weight = maker.normal(1, 20), maker.normal(12 * (1 + gated), 20)
    options: dict[str, Any] = {
        "norm_weight": maker.normal(20), "norm_bias": maker.normal(20), "bias": maker.normal(len(weight)),
        "residual": maker.normal(12),
    }  # fmt: skip
    attributes: dict[str, Any] = {"norm": norm, "eps": 1e-3, "gated": gated, "stripe": 4, "activation": activation}
    stripe = attributes["stripe"] if gated else 12
    (out,) = evaluate(BY_NAME["gemv"], [x, weight, *options.values()], {**attributes, "stripe": stripe})
    assert_close(out[0], BY_NAME["gemv"].reference(x, weight, **options, **attributes), 1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_products_of_several_rows(maker: Maker, gated: bool) -> None:
    x, weight, residual = maker.normal(3, 20), maker.normal(12 * (1 + gated), 20), maker.normal(3, 12)
    bias, stripe = maker.normal(len(weight)), 6 if gated else 12
    attributes = {"gated": gated, "stripe": stripe, "activation": SILU}
    options: dict[str, Any] = {"bias": bias, "residual": residual, **attributes}
    for name in ("narrow_gemm", "specialized_gemm"):
        (out,) = evaluate(BY_NAME[name], [x, weight, bias, residual], attributes)
        assert_close(out, BY_NAME[name].reference(x, weight, **options), 1e-5)
    (out,) = evaluate(BY_NAME["wide_gemm"], [x, weight, bias], attributes)
    assert_close(out, BY_NAME["wide_gemm"].reference(x, weight, bias=bias, **attributes), 1e-5)
    if not gated:
        (out,) = evaluate(BY_NAME["block_gemm"], [x, weight, bias, residual], {"stripe": 12, "activation": SILU})
        expected = BY_NAME["block_gemm"].reference(x, weight, bias=bias, residual=residual, activation=SILU)
        assert_close(out, expected, 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_quantized_gemv(maker: Maker, bits: int, gated: bool) -> None:
    x, residual = maker.normal(1, 64), maker.normal(10)
    words, scales = pack(maker.normal(10 * (1 + gated), 64), bits, 16)
    bias = maker.normal(len(words))
    attributes: dict[str, Any] = {"bits": bits, "gated": gated, "stripe": 5 if gated else 10, "activation": SILU}
    (out,) = evaluate(BY_NAME["quantized_gemv"], [x, words, scales, bias, residual], attributes)
    expected = BY_NAME["quantized_gemv"].reference(x, words, scales, bias=bias, residual=residual, **attributes)
    assert_close(out[0], expected, 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_products_of_several_rows(maker: Maker, bits: int) -> None:
    x, bias, residual = maker.normal(3, 64), maker.normal(20), maker.normal(3, 10)
    words, scales = pack(maker.normal(20, 64), bits, 32)
    attributes: dict[str, Any] = {"bits": bits, "gated": True, "stripe": 5, "activation": SILU}
    op = BY_NAME["quantized_gemm"]
    (out,) = evaluate(op, [x, words, scales, bias, residual], attributes)
    assert_close(out, op.reference(x, words, scales, bias=bias, residual=residual, **attributes), 1e-5)


@pytest.mark.parametrize("kind", [RMS_NORM, LAYER_NORM])
def test_norm(maker: Maker, kind: int) -> None:
    x, residual, weight, bias = maker.normal(3, 20), maker.normal(2, 3, 20), maker.normal(20), maker.normal(20)
    outputs = evaluate(BY_NAME["norm"], [x, residual, weight, bias], {"kind": kind, "eps": 1e-3}, 2)
    expected = BY_NAME["norm"].reference(x, weight, eps=1e-3, kind=kind, bias=bias, residual=residual)
    for out, wanted in zip(outputs, expected):
        assert_close(out, wanted, 1e-5)


@pytest.mark.parametrize("kind", [SILU, GELU_ERF, GELU_TANH])
@pytest.mark.parametrize("gated", [False, True])
def test_activation(maker: Maker, kind: int, gated: bool) -> None:
    x = maker.normal(3, 20)
    attributes = {"kind": kind, "gated": gated, "stripe": 5 if gated else 20}
    (out,) = evaluate(BY_NAME["activation"], [x], attributes)
    assert_close(out, BY_NAME["activation"].reference(x, **attributes), 1e-5)


# How caches round: the attribute, the type that does, and the type that holds it for ONNX Runtime, whose kernels that
# move tensors know no 8-bit floats.
ROUNDINGS = {
    "floats": (0, torch.float32, torch.float32),
    "int8": (1, torch.int8, torch.int8),
    "float8": (2, torch.float8_e4m3fn, torch.float32),
}
rounding_kinds = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))


def draw_cache(maker: Maker, rounding: tuple[int, Any, Any], rows: int, kv_heads: int, dim: int) -> tuple[Any, Any]:
    """(keys and values [rows, kv_heads, 9, dim] in the type that rounds, their scales)."""
    kind, dtype, _ = rounding
    caches = [(maker.normal(rows, kv_heads, 9, dim, scale=60 if kind else 1)).to(dtype) for _ in range(2)]
    return caches, [maker.normal(kv_heads, dim).abs() * 0.02 + 0.005 if kind else None for _ in range(2)]


def neutral(scales: list[Any], kv_heads: int, dim: int) -> list[Any]:
    return [torch.ones(kv_heads, dim) if part is None else part for part in scales]


@rounding_kinds
def test_rotary_append(maker: Maker, rounding: tuple[int, Any, Any]) -> None:
    heads, kv_heads, dim = 4, 2, 8
    qkv, (cos, sin) = maker.normal(4, (heads + 2 * kv_heads) * dim), maker.angles(9, dim // 2)
    (keys, values), scales = draw_cache(maker, rounding, 2, kv_heads, dim)
    rows, slots = maker.ints(1, 0, -1, 1), maker.ints(3, 8, 0, 4)  # one token is padding
    op, given = BY_NAME["rotary_append"], [part.to(rounding[2]) for part in (keys, values)]
    inputs = [qkv, *given, rows, slots, cos, sin, *neutral(scales, kv_heads, dim)]
    outputs = evaluate(op, inputs, {"heads": heads, "rounding": rounding[0]}, 3)
    options = {"heads": heads, "cos": cos, "sin": sin, "key_scales": scales[0], "value_scales": scales[1]}
    for out, wanted in zip(outputs, op.reference(qkv, keys, values, rows, slots, **options)):
        assert_close(out, wanted, 1e-6)


@rounding_kinds
@pytest.mark.parametrize("options", [{}, {"softcap": 0.7, "window": 3}], ids=["plain", "capped"])
def test_decode_attention(maker: Maker, options: dict[str, Any], rounding: tuple[int, Any, Any]) -> None:
    heads, kv_heads, dim = 6, 2, 8
    qkv, (cos, sin) = maker.normal(2, 3, (heads + 2 * kv_heads) * dim), maker.angles(9, dim // 2)
    (keys, values), scales = draw_cache(maker, rounding, 3, kv_heads, dim)
    past, options = maker.ints(0, -1, 8), {"heads": heads, "scale": 0.5, **options}
    op, given = BY_NAME["decode_attention"], [part.to(rounding[2]) for part in (keys, values)]
    inputs = [qkv, *given, past, cos, sin, *neutral(scales, kv_heads, dim)]
    outputs = evaluate(op, inputs, {**options, "rounding": rounding[0]}, 3)
    options |= {"cos": cos, "sin": sin, "key_scales": scales[0], "value_scales": scales[1]}
    for out, wanted in zip(outputs, op.reference(qkv, keys, values, past, **options)):
        assert_close(out, wanted, 1e-5)


SEEN: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "near": {"window": 2},
    "causal, near, capped": {"causal": True, "window": 2, "softcap": 0.7},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", SEEN.values(), ids=list(SEEN))
def test_varlen_attention(maker: Maker, packed: bool, options: dict[str, Any]) -> None:
    heads, kv_heads, dim, tokens = 4, 2, 8, 8
    starts, stops, past = maker.ints(0, 3, 4), maker.ints(3, 3, 7), maker.ints(2, 5, 0)  # a row without tokens
    query, op = maker.normal(tokens, heads * dim), BY_NAME["varlen_attention"]
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": 0.5}
    if packed:
        keys, values, bias = (
            maker.normal(tokens, kv_heads * dim),
            maker.normal(tokens, kv_heads * dim),
            maker.normal(4, 5, 5),
        )
        given = [tensor.reshape(1, tokens, kv_heads, dim).transpose(1, 2) for tensor in (keys, values)]
        past = torch.zeros_like(past)
        expected = op.reference(query, keys, values, starts, stops, bias=bias, **sizes, **options)
    else:
        keys, values, bias = maker.normal(3, kv_heads, 9, dim), maker.normal(3, kv_heads, 9, dim), torch.zeros(4, 1, 1)
        given = [keys, values]
        expected = op.reference(query, keys, values, starts, stops, past_lengths=past, **sizes, **options)
    attributes = {"heads": heads, "scale": 0.5, "packed": packed, **options}
    ones = [torch.ones(kv_heads, dim) for _ in range(2)]
    (out,) = evaluate(op, [query, *given, starts, stops, past, bias, *ones], attributes)
    assert_close(out, expected, 1e-5)


@rounding_kinds
def test_varlen_attention_over_a_cache_in(maker: Maker, rounding: tuple[int, Any, Any]) -> None:
    heads, kv_heads, dim = 4, 2, 8
    rows = maker.ints(0, 3, 4), maker.ints(3, 3, 7), maker.ints(2, 5, 0)
    query, op = maker.normal(8, heads * dim), BY_NAME["varlen_attention"]
    caches, scales = draw_cache(maker, rounding, 3, kv_heads, dim)
    given = [part.to(rounding[2]) for part in caches]
    inputs = [query, *given, *rows, torch.zeros(4, 1, 1), *neutral(scales, kv_heads, dim)]
    (out,) = evaluate(op, inputs, {"heads": heads, "scale": 0.5, "causal": True})
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": 0.5, "causal": True}
    options = {"past_lengths": rows[2], "key_scales": scales[0], "value_scales": scales[1]}
    assert_close(out, op.reference(query, *caches, *rows[:2], **sizes, **options), 1e-5)


def test_argmax(maker: Maker) -> None:
    logits = maker.normal(4, 30)
    logits[0, [4, 9]], logits[1, 2], logits[1, 3], logits[2] = 9.0, float("nan"), float("inf"), float("-inf")
    ids, values = evaluate(BY_NAME["argmax"], [logits], {}, 2)
    expected, best = BY_NAME["argmax"].reference(logits)
    assert torch.equal(ids, expected) and ids[:3].tolist() == [4, 2, 0]
    assert torch.equal(values.nan_to_num(nan=7.0), best.nan_to_num(nan=7.0))


def test_sample(maker: Maker) -> None:
    draws = torch.tensor(
        [
            [1.0, 0, 1, 0, 0.3], [0.8, 5, 0.7, 0.1, 0.9], [0.0, 0, 1, 0, 0.5], [1.0, 0, 0.5, 0, 0.999],
            [1.0, 99, 0.0, 0, 0.5], [2.0, 0, 0.9, 0.3, 0.6], [1.0, 0, 1, 0, 0.5], [1.0, 0, 1, 0, 0.5],
        ], dtype=torch.float64,
    )  # fmt: skip
    logits = maker.normal(len(draws), 30, scale=2.0)
    logits[3], logits[4, [4, 9]], logits[6, 7], logits[7, 3] = 0.5, 9.0, float("nan"), float("inf")
    ids, values = evaluate(BY_NAME["sample"], [logits, draws], {}, 2)
    expected, chosen = BY_NAME["sample"].reference(logits, draws)
    assert torch.equal(ids, expected) and ids[[3, 4, 6, 7]].tolist() == [29, 9, 7, 3]
    assert torch.equal(values.nan_to_num(nan=7.0), chosen.nan_to_num(nan=7.0))


def test_gather(maker: Maker) -> None:
    table, ids = maker.normal(9, 5), maker.ints(8, 0, 8)
    nothing, norm = [torch.zeros(1, 5), maker.ints(0)], [maker.normal(5), maker.normal(5)]
    (out,) = evaluate(BY_NAME["gather"], [table, ids, torch.zeros(len(ids), 5), *nothing, *nothing, *norm], {})
    assert torch.equal(out.double(), BY_NAME["gather"].reference(table, ids))
    added = maker.normal(2 * len(ids), table.shape[1])
    second, third = (maker.normal(4, 5), maker.ints(3, 1)), (maker.normal(2, 5), maker.ints(0, 1, 1))
    for kind in (NO_NORM, LAYER_NORM):
        (out,) = evaluate(
            BY_NAME["gather"], [table, ids, added, *second, *third, *norm], {"norm": kind, "eps": 0.1}
        )
        by = {"norm": kind, "norm_weight": norm[0], "norm_bias": norm[1], "eps": 0.1}
        assert_close(out, BY_NAME["gather"].reference(table, ids, added, second, third, **by), 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_gather(maker: Maker, bits: int) -> None:
    (words, scales), ids = pack(maker.normal(9, 64), bits, 32), maker.ints(8, 0, 8)
    (out,) = evaluate(BY_NAME["quantized_gather"], [words, scales, ids], {"bits": bits})
    assert_close(out, BY_NAME["quantized_gather"].reference(words, scales, ids, bits=bits), 1e-7)
