"""``accel::Linear`` -> ``FusedMatMul`` on the PyTorch weight as it lies in the file."""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import substitute
from accel.graph.lowering.packed import rows_of
from accel.spec import ArchSpec

MICROSOFT = "com.microsoft"
LARGEST_BYTES = 64 << 20  # of one range: while ONNX Runtime packs it, it is in memory twice


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


def split_head(model: ir.Model, arch: ArchSpec) -> int:
    """Gives the product over the vocabulary initializers of its own, in ranges of rows; returns how many heads.

    ONNX Runtime packs a constant weight into a copy of its own, which streams a fifth faster than the file's
    layout does, and lets go of the mapped pages afterwards. Two things would keep them: another reader (a tied
    embedding), so the product reads initializers of its own over the same bytes; and sheer size, so a decoder,
    which wants few rows of logits and can afford to join them, packs one range after the other.
    """
    count = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "FusedMatMul" else None
        if weight is None or not weight.is_initializer() or weight.shape is None:
            continue
        tied = any(use.node.op_type == "Gather" for use in weight.uses())
        large = weight.shape[0] == arch.vocab_size and _bytes(weight) > LARGEST_BYTES
        if tied or (large and arch.kind == "decoder"):
            _split(model.graph, node, weight, -(-_bytes(weight) // LARGEST_BYTES) if arch.kind == "decoder" else 1)
            count += 1
    return count


def _bytes(weight: ir.Value) -> int:
    tensor = weight.const_value
    return 0 if tensor is None else tensor.nbytes


def _split(graph: ir.Graph, node: ir.Node, weight: ir.Value, pieces: int) -> None:
    assert weight.shape is not None and isinstance(weight.shape[0], int)
    rows = weight.shape[0]
    step = -(-rows // max(1, pieces))
    step += -step % 16  # whole panels of the packed layout
    output = node.outputs[0]
    made = []
    for start in range(0, rows, step):
        part = rows_of(graph, weight, start, min(start + step, rows))
        product = ir.node("FusedMatMul", [node.inputs[0], part], dict(node.attributes), domain=MICROSOFT)
        product.outputs[0].type = output.type
        if output.shape is not None:
            product.outputs[0].shape = ir.Shape([*output.shape[:-1], part.shape[0]])  # type: ignore[index]
        made.append(product)
    last = made[0].outputs[0]
    if len(made) > 1:
        joined = ir.node("Concat", [product.outputs[0] for product in made], {"axis": -1})
        joined.outputs[0].type, joined.outputs[0].shape = output.type, output.shape
        made.append(joined)
        last = joined.outputs[0]
    substitute(node, made, [last])
