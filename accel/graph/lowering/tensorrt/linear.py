"""``accel::Linear`` -> Gemm, or MatMul where the input has a batch dimension; the weight file's layout stays."""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import rank, replace_value
from accel.graph.lowering.tensorrt.emit import Emitter


def lower_linear(model: ir.Model) -> int:
    """Lowers every linear in place; returns how many.

    Weights are [N, K] as PyTorch keeps them. Gemm takes them as they are; for MatMul a Transpose stands before
    them, which TensorRT's builder folds.
    """
    graph, count = model.graph, 0
    turned: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.domain == "accel" and node.op_type == "Linear"]:
        emit = Emitter(graph, node)
        output = node.outputs[0]
        assert output.shape is not None
        transposed = node.attributes.get_int("transposed", 0) or 0
        if rank(node.inputs[0]) == 2:  # type: ignore[arg-type]
            made = emit("Gemm", list(node.inputs), output.shape, transB=transposed)
        else:
            made = _product(emit, node, transposed, turned)
        replace_value(output, made)
        graph.remove(node, safe=True)
        count += 1
    return count


def _product(emit: Emitter, node: ir.Node, transposed: int, turned: dict[ir.Value, ir.Value]) -> ir.Value:
    x, weight, *bias = node.inputs
    shape = node.outputs[0].shape
    assert weight is not None and weight.shape is not None and shape is not None
    if transposed:
        if weight not in turned:
            turned[weight] = emit("Transpose", [weight], tuple(weight.shape)[::-1], perm=[1, 0])
        weight = turned[weight]
    product = emit("MatMul", [x, weight], shape)
    return emit("Add", [product, bias[0]], shape) if bias else product


__all__ = ["lower_linear"]
