"""Norms, skips and activations -> ONNX Runtime's fused CPU kernels."""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import operands, producer, rank, replace_value, sole_consumer, substitute

MICROSOFT = "com.microsoft"


def lower_rms_norm(model: ir.Model) -> int:
    """RMSNormalization-23 -> SimplifiedLayerNormalization, the same formula, which the skip fusion builds on."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        made = ir.node("SimplifiedLayerNormalization", node.inputs, {**node.attributes, "stash_type": 1})
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        substitute(node, [made], [made.outputs[0]])
        count += 1
    return count


def fuse_skip_norms(model: ir.Model) -> int:
    """norm(x + skip) -> Skip(Simplified)LayerNormalization, which also hands the sum on; returns how many."""
    return sum(
        _fuse_skip(node)
        for node in list(model.graph)
        if node.op_type in ("LayerNormalization", "SimplifiedLayerNormalization")
    )


def _fuse_skip(norm: ir.Node) -> bool:
    add = producer(norm.inputs[0], "Add")
    pair = operands(add, "Add")
    if add is None or pair is None or not _same_rows(*pair):
        return False
    x, skip, bias = _with_bias(*pair)
    simplified = norm.op_type == "SimplifiedLayerNormalization"
    weights = [norm.inputs[1]] if simplified else [norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None]
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    made = ir.node(
        "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization",
        [x, skip, *weights, *([bias] if bias is not None else [])],
        {"epsilon": epsilon},
        domain=MICROSOFT,
        num_outputs=4,
    )
    total = made.outputs[3]
    for value in (made.outputs[0], total):
        value.type, value.shape = norm.outputs[0].type, norm.outputs[0].shape
    graph = norm.graph
    assert graph is not None
    # At the sum's place, so that readers of the sum between it and the norm stay behind their input.
    graph.insert_before(add, made)
    replace_value(norm.outputs[0], made.outputs[0])
    replace_value(add.outputs[0], total)
    graph.remove([norm, add], safe=True)
    return True


def _same_rows(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and b.shape is not None and list(a.shape) == list(b.shape) and len(a.shape) == 3


def _with_bias(a: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """(x, skip, bias) where one summand is a product plus a bias vector that nothing else reads."""
    for x, skip in ((a, b), (b, a)):
        found = _biased(x)
        if found is not None:
            return found[0], skip, found[1]
    return a, b, None


def _biased(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    pair = operands(producer(value, "Add"), "Add")
    if pair is None or sole_consumer(value) is None:
        return None
    for x, bias in (pair, pair[::-1]):
        if bias.is_initializer() and rank(bias) == 1 and producer(x, "FusedMatMul", "MatMul") is not None:
            return x, bias
    return None


def fuse_bias_gelu(model: ir.Model) -> int:
    """Gelu(x + bias) -> BiasGelu (erf form) or FastGelu (tanh form); the two formulas are never exchanged."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Gelu" or node.domain:
            continue
        found = _biased(node.inputs[0])  # type: ignore[arg-type]
        if found is None:
            continue
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        made = ir.node("FastGelu" if tanh else "BiasGelu", list(found), domain=MICROSOFT)
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        substitute(node, [made], [made.outputs[0]])
        count += 1
    return count


def fuse_silu(model: ir.Model) -> int:
    """x * Sigmoid(x) -> QuickGelu(alpha=1), ONNX Runtime's name for x * sigmoid(alpha x)."""
    count = 0
    for node in list(model.graph):
        pair = operands(node, "Mul")
        if pair is None:
            continue
        for x, gate in (pair, pair[::-1]):
            sigmoid = producer(gate, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] is x:
                made = ir.node("QuickGelu", [x], {"alpha": 1.0}, domain=MICROSOFT)
                made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
                substitute(node, [made], [made.outputs[0]])
                count += 1
                break
    return count
