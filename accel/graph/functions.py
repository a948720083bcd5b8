"""The private ops' meaning, in standard ONNX: bodies that make a canonical graph run on any runtime.

Each distinct signature of a private op (its attributes, shapes and optional inputs) gets one
function overload with its numbers written in. The bodies are the definition of the ops; they
favour clearness over speed, targets replace them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "accel"


def attach(model: ir.Model) -> int:
    """Adds a body for every private node; returns how many functions the model has now.

    Attach right before saving: optimisers inline a function as soon as it has a body.
    """
    builders: dict[str, Callable[[ir.Node], ir.Function]] = {
        "Linear": _linear,
        "Attention": _attention,
        "CachedAttention": _cached_attention,
        "QuantizedLinear": _quantized_linear,
        "QuantizedGather": _quantized_gather,
    }
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        node.overload = _signature(node)
        key = (DOMAIN, node.op_type, node.overload)
        if key not in model.functions:
            model.functions[key] = builders[node.op_type](node)
    model.opset_imports[DOMAIN] = 1
    return len(model.functions)


def _signature(node: ir.Node) -> str:
    """A short stable name of everything that the body depends on."""
    parts = {name: attribute.value for name, attribute in sorted(node.attributes.items())}
    shape = _head_dim(node) if "num_heads" in node.attributes else None
    text = json.dumps([parts, len(node.inputs), shape, *_quantized_form(node)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _quantized_form(node: ir.Node) -> list[bool]:
    """Of a quantised product: which of its inputs are there."""
    return [value is not None for value in node.inputs] if node.op_type.startswith("Quantized") else []


def _head_dim(node: ir.Node) -> int:
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    width = query.shape[-1]
    assert isinstance(width, int)
    return width // node.attributes["num_heads"].as_int()


class _Ops:
    """``ops.MatMul(a, b)`` appends a node and returns its output."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def append(*inputs: ir.Value, **attributes: Any) -> ir.Value:
            node = ir.node(op_type, inputs, attributes)
            node.outputs[0].name = f"v{len(self.nodes)}"
            self.nodes.append(node)
            return node.outputs[0]

        return append


class _Body:
    """Collects a function's nodes; constants by value."""

    def __init__(self, inputs: list[str]) -> None:
        self.op = _Ops()
        self.inputs = [ir.Value(name=name) for name in inputs]

    def const(self, value: object, dtype: type) -> ir.Value:
        return self.op.Constant(value=ir.tensor(np.array(value, dtype)))

    def ints(self, *values: int) -> ir.Value:
        return self.const(list(values), np.int64)

    def function(self, node: ir.Node, outputs: list[ir.Value]) -> ir.Function:
        graph = ir.Graph(self.inputs, outputs, nodes=self.op.nodes, opset_imports={"": 23}, name=node.op_type)
        names = [ir.Attr(name, attribute.type, None) for name, attribute in node.attributes.items()]
        return ir.Function(DOMAIN, node.op_type, node.overload, graph=graph, attributes=names)


def _linear(node: ir.Node) -> ir.Function:
    """y = x W^T + b with W [N, K] (transposed 1), or x W + b with W [K, N] (transposed 0)."""
    body = _Body(["x", "weight", "bias"][: len(node.inputs)])
    op, (x, weight, *bias) = body.op, body.inputs
    if node.attributes["transposed"].as_int():
        weight = op.Transpose(weight, perm=[1, 0])
    product = op.MatMul(x, weight)
    return body.function(node, [op.Add(product, bias[0]) if bias else product])


def _dequantized(body: _Body, node: ir.Node, weight: ir.Value, scale: ir.Value) -> ir.Value:
    """weight[n, k] * scale[n, k / block_size]; block_size 0: scale[n, 0]."""
    block = node.attributes["block_size"].as_int()
    if block:
        return body.op.DequantizeLinear(weight, scale, axis=1, block_size=block)
    return body.op.DequantizeLinear(weight, body.op.Squeeze(scale, body.ints(1)), axis=0)


def _quantized_linear(node: ir.Node) -> ir.Function:
    """y = r(x) W^T + b, W = weight * scale by blocks of a row, weight INT8 or INT4 [N, K].

    r is the rounding of x that ``activation`` names. ``none``: x itself. ``static``: x_scale times the nearest
    integers to x / x_scale (halves to the even one) in [-127, 127]. ``dynamic``: the same with a step for each row
    (the last axis) of x: max|x| / 127, or 1 where all are zero.
    """
    body = _Body(["x", "weight", "scale", "bias", "x_scale"][: len(node.inputs)])
    op, (x, weight, scale, *rest) = body.op, body.inputs
    activation = node.attributes["activation"].as_string()
    assert activation != "grouped", "for evaluation alone"
    if activation != "none":
        step = rest[1] if activation == "static" else _row_step(body, x)
        limits = (body.const(limit, np.float32) for limit in (-127, 127))
        x = op.Mul(op.Clip(op.Round(op.Div(x, step)), *limits), step)
    product = op.MatMul(x, op.Transpose(_dequantized(body, node, weight, scale), perm=[1, 0]))
    biased = len(node.inputs) > 3 and node.inputs[3] is not None
    return body.function(node, [op.Add(product, rest[0]) if biased else product])


def _row_step(body: _Body, x: ir.Value) -> ir.Value:
    op = body.op
    step = op.Div(op.ReduceMax(op.Abs(x), body.ints(-1)), body.const(127, np.float32))
    return op.Where(op.Equal(step, body.const(0, np.float32)), body.const(1, np.float32), step)


def _quantized_gather(node: ir.Node) -> ir.Function:
    """Rows of weight * scale by blocks of a row: weight INT8 or INT4 [N, K], ids int64 of any shape."""
    body = _Body(["weight", "scale", "ids"])
    weight, scale, ids = body.inputs
    return body.function(node, [body.op.Gather(_dequantized(body, node, weight, scale), ids, axis=0)])


def _scores(body: _Body, node: ir.Node, query: ir.Value, key: ir.Value) -> ir.Value:
    """softcap(scale * q k^T)."""
    op = body.op
    scores = op.Mul(op.MatMul(query, key), body.const(node.attributes["scale"].as_float(), np.float32))
    if "softcap" in node.attributes:
        cap = body.const(node.attributes["softcap"].as_float(), np.float32)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    return scores


def _attend(body: _Body, scores: ir.Value, visible: ir.Value, value: ir.Value) -> ir.Value:
    """softmax over the visible keys, times the values; a query that sees nothing averages all."""
    op = body.op
    masked = op.Where(visible, scores, body.const(-1e9, np.float32))
    return op.MatMul(op.Softmax(masked, axis=-1), value)


def _attention(node: ir.Node) -> ir.Function:
    """Bidirectional attention. query, key, value [B, S, W]; attention_mask int64 [B, S]; bias [B or 1, H, S, S]."""
    names = ["query", "key", "value", "attention_mask", "bias"][: len(node.inputs)]
    body = _Body(names)
    op, dim = body.op, _head_dim(node)
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    query, key, value = body.inputs[:3]
    # [B, KV, G, S, D]: queries in groups that share a key head
    grouped = op.Transpose(op.Reshape(query, body.ints(0, 0, kv_heads, heads // kv_heads, dim)), perm=[0, 2, 3, 1, 4])
    keys = op.Transpose(op.Reshape(key, body.ints(0, 0, kv_heads, 1, dim)), perm=[0, 2, 3, 4, 1])
    values = op.Transpose(op.Reshape(value, body.ints(0, 0, kv_heads, 1, dim)), perm=[0, 2, 3, 1, 4])
    scores = _scores(body, node, grouped, keys)
    if len(body.inputs) > 4:
        split = op.Shape(body.inputs[4])
        size = op.Slice(split, body.ints(2), body.ints(4))
        rows = op.Slice(split, body.ints(0), body.ints(1))
        shape = op.Concat(rows, body.ints(kv_heads, heads // kv_heads), size, axis=0)
        scores = op.Add(scores, op.Reshape(body.inputs[4], shape))
    visible = op.Unsqueeze(op.Equal(body.inputs[3], body.const(1, np.int64)), body.ints(1, 2, 3))
    if "window" in node.attributes:
        length = op.Squeeze(op.Shape(query, start=1, end=2), body.ints(0))
        positions = op.Range(body.const(0, np.int64), length, body.const(1, np.int64))
        distance = op.Abs(op.Sub(op.Unsqueeze(positions, body.ints(1)), positions))
        near = op.LessOrEqual(distance, body.const(node.attributes["window"].as_int(), np.int64))
        visible = op.And(visible, near)
    output = op.Transpose(_attend(body, scores, visible, values), perm=[0, 3, 1, 2, 4])
    return body.function(node, [op.Reshape(output, body.ints(0, 0, heads * dim))])


def _cached_attention(node: ir.Node) -> ir.Function:
    """Causal attention of packed tokens over a cache that it extends.

    query [T, H*D]; key, value [T, KV*D]; past_key, past_value [B, KV, C, D]; past_lengths,
    query_lengths int32 [B]. Row b's tokens stand together, in row order; token t of row b
    lies at position past_lengths[b] + (t - first token of b) and sees positions up to its
    own, at most ``window`` of them. Outputs: [T, H*D] and the two caches with the new tokens.
    """
    body = _Body(["query", "key", "value", "past_key", "past_value", "past_lengths", "query_lengths"])
    op, dim = body.op, _head_dim(node)
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    query, key, value, past_key, past_value, past_lengths, query_lengths = body.inputs
    zero, one = body.const(0, np.int64), body.const(1, np.int64)
    fresh = op.Cast(query_lengths, to=ir.DataType.INT64)
    ends = op.CumSum(fresh, zero)
    tokens = op.Range(zero, op.Squeeze(op.Shape(query, start=0, end=1), body.ints(0)), one)
    passed = op.GreaterOrEqual(op.Unsqueeze(tokens, body.ints(1)), ends)
    row = op.ReduceSum(op.Cast(passed, to=ir.DataType.INT64), body.ints(1), keepdims=0)
    first = op.Sub(op.Cast(past_lengths, to=ir.DataType.INT64), op.Sub(ends, fresh))
    position = op.Add(tokens, op.Gather(first, row))
    place = op.Concat(op.Unsqueeze(row, body.ints(1)), op.Unsqueeze(position, body.ints(1)), axis=1)

    def extend(past: ir.Value, new: ir.Value) -> ir.Value:  # -> [B, C, KV, D]
        rows = op.Reshape(new, body.ints(-1, kv_heads, dim))
        return op.ScatterND(op.Transpose(past, perm=[0, 2, 1, 3]), place, rows)

    keys, values = extend(past_key, key), extend(past_value, value)
    grouped = op.Reshape(query, body.ints(-1, kv_heads, heads // kv_heads, dim))
    by_token = [op.Gather(cache, row) for cache in (keys, values)]  # [T, C, KV, D]
    scores = _scores(body, node, grouped, op.Transpose(by_token[0], perm=[0, 2, 3, 1]))
    slots = op.Range(zero, op.Squeeze(op.Shape(past_key, start=2, end=3), body.ints(0)), one)
    own = op.Unsqueeze(position, body.ints(1))
    visible = op.LessOrEqual(slots, own)
    if "window" in node.attributes:
        oldest = op.Sub(own, body.const(node.attributes["window"].as_int(), np.int64))
        visible = op.And(visible, op.Greater(slots, oldest))
    visible = op.Unsqueeze(visible, body.ints(1, 2))
    output = _attend(body, scores, visible, op.Transpose(by_token[1], perm=[0, 2, 1, 3]))
    present = [op.Transpose(cache, perm=[0, 2, 1, 3]) for cache in (keys, values)]
    return body.function(node, [op.Reshape(output, body.ints(-1, heads * dim)), *present])
