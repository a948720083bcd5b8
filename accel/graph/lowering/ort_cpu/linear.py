"""``accel::Linear`` -> ``FusedMatMul`` on the PyTorch weight as it lies in the file."""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import substitute

MICROSOFT = "com.microsoft"


def lower_linear(model: ir.Model) -> int:
    """A bias becomes an Add, which later passes absorb; returns how many linears were lowered."""
    count = 0
    for node in list(model.graph):
        if node.domain == "accel" and node.op_type == "Linear":
            _lower(node)
            count += 1
    return count


def _lower(node: ir.Node) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    output = node.outputs[0]
    if node.attributes.get_int("transposed", 0):
        product = ir.node("FusedMatMul", [x, weight], {"transB": 1}, domain=MICROSOFT)
    else:
        product = ir.node("MatMul", [x, weight])
    made, last = [product], product.outputs[0]
    if len(node.inputs) > 2:
        add = ir.node("Add", [last, node.inputs[2]])
        made.append(add)
        last = add.outputs[0]
    for step in made:
        step.outputs[0].type, step.outputs[0].shape = output.type, output.shape
    substitute(node, made, [last])


def leave_tied_head_unpacked(model: ir.Model) -> int:
    """Lists a weight that both the embedding and a product read as a graph input too.

    ONNX Runtime prepacks constant weights into a second copy and, because the embedding still
    reads the first, keeps both: 0.5 GB more for a vocabulary of 152k. An initializer that is also
    a graph input is not constant, so the product reads the file's pages directly, at full
    memory bandwidth for the few rows that a step wants.
    """
    count = 0
    for name, value in model.graph.initializers.items():
        readers = {use.node.op_type for use in value.uses()}
        if "Gather" in readers and readers & {"FusedMatMul", "MatMul"} and value not in model.graph.inputs:
            model.graph.inputs.append(value)
            value.name = name
            count += 1
    return count
