"""Norms and activations -> ONNX Runtime's fused CPU kernels, where they are faster than their parts.

A residual add stays an Add before its norm: ONNX Runtime 1.32's SkipLayerNormalization took
508 us for [128, 384] on one Zen 4 core where Add and LayerNormalization took 32, its
SkipSimplifiedLayerNormalization 53 where the parts took 19, and both lose for one row too.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import last_dim, operands, producer, rank, sole_consumer, substitute

MICROSOFT = "com.microsoft"


def lower_rms_norm(model: ir.Model) -> int:
    """RMSNormalization-23 -> SimplifiedLayerNormalization, ONNX Runtime's own name for the same formula."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        made = ir.node("SimplifiedLayerNormalization", node.inputs, {**node.attributes, "stash_type": 1})
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        substitute(node, [made], [made.outputs[0]])
        count += 1
    return count


def _biased(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    pair = operands(producer(value, "Add"), "Add")
    if pair is None or sole_consumer(value) is None:
        return None
    for x, bias in (pair, pair[::-1]):
        whole = bias.is_initializer() and rank(bias) == 1 and bias.shape[0] == last_dim(x)  # type: ignore[index]
        if whole and producer(x, "FusedMatMul", "MatMul") is not None:
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
