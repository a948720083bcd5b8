"""nn.Linear and Conv1D -> ``accel::Linear``: one node that names the PyTorch weight itself.

Cases:
    1. ``MatMul(x, Transpose(W))`` with W an initializer [N, K]; a following ``Add`` of a
       vector becomes the bias.
    2. ``Reshape -> Gemm(x, W, b) -> Reshape`` as transformers' Conv1D traces: W is [K, N]
       (attribute ``transposed`` 0); the reshapes only flatten leading dimensions and go.
Refused: anything whose weight is not an initializer, a bias that is not one number per output, Gemm with alpha,
beta or transA.

The node keeps weights out of constant folding (a folded transpose would be a second copy)
and lets each target choose its own matrix product.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import last_dim, producer, replace_value, sole_consumer, substitute

DOMAIN = "accel"


def fuse_linear(model: ir.Model) -> int:
    """Rewrites in place; returns how many linear layers were found."""
    return sum(_fuse_matmul(node) or _fuse_gemm(node) for node in list(model.graph))


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _is_bias(value: ir.Value, weight: ir.Value, axis: int) -> bool:
    """One number per output; a single number or a matrix would broadcast, and could not be merged row-wise."""
    return value.shape is not None and weight.shape is not None and list(value.shape) == [weight.shape[axis]]


def _linear(x: ir.Value, weight: ir.Value, bias: ir.Value | None, transposed: int, like: ir.Value) -> ir.Node:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    node = ir.node("Linear", inputs, {"transposed": transposed}, domain=DOMAIN)
    output = node.outputs[0]
    output.type, output.shape, output.name = like.type, like.shape, like.name
    return node


def _fuse_matmul(node: ir.Node) -> bool:
    if node.op_type != "MatMul":
        return False
    x, right = node.inputs
    transpose = producer(right, "Transpose")
    if x is None or transpose is None or not _is_weight(transpose.inputs[0]):
        return False
    if tuple(transpose.attributes.get_ints("perm", (1, 0))) != (1, 0):
        return False
    weight = transpose.inputs[0]
    assert weight is not None
    last, bias = node, None
    add = sole_consumer(node.outputs[0], "Add")
    if add is not None:
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        if other is not None and other.is_initializer() and _is_bias(other, weight, 0):
            last, bias = add, other
    fused = _linear(x, weight, bias, 1, last.outputs[0])
    substitute(last, [fused], [fused.outputs[0]])
    return True


def _fuse_gemm(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or not _is_weight(node.inputs[1]):
        return False
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA", 0):
        return False
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    assert x is not None and weight is not None
    if bias is not None and not _is_bias(bias, weight, 0 if attributes.get("transB", 0) else 1):
        return False
    before, after = producer(x, "Reshape"), sole_consumer(node.outputs[0], "Reshape")
    output = node.outputs[0]
    if before is not None and after is not None and _only_flattens(before, after):
        source = before.inputs[0]
        assert source is not None
        x, output = source, after.outputs[0]
    fused = _linear(x, weight, bias, 1 if attributes.get("transB", 0) else 0, output)
    last = after if output is not node.outputs[0] and after is not None else node
    graph = node.graph
    assert graph is not None
    graph.insert_before(last, fused)
    replace_value(last.outputs[0], fused.outputs[0])
    return True


def _only_flattens(before: ir.Node, after: ir.Node) -> bool:
    """Whether the pair only folds leading dimensions into one and unfolds them again."""
    outer_in, inner_in = before.inputs[0], before.outputs[0]
    inner_out, outer_out = after.inputs[0], after.outputs[0]
    if outer_in is None or inner_out is None or outer_in.shape is None or outer_out.shape is None:
        return False
    same_width = last_dim(outer_in) == last_dim(inner_in) and last_dim(inner_out) == last_dim(outer_out)
    return same_width and list(outer_in.shape)[:-1] == list(outer_out.shape)[:-1]
