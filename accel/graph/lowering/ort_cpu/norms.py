"""LayerNormalization -> the first step of the quantised product that reads it.

The product normalises a row and rounds it while it lies in the core's cache, and gives the normalised rows as a second
output to whatever else reads them: as a node of its own the norm of [1024, 384] took as long again as the rounding.
"""

from __future__ import annotations

import accel_cpu
import onnx_ir as ir

from accel.graph.edit import rank, replace_value

_NORM = 6  # index of the weight's input; the bias follows


def fuse_norms(model: ir.Model) -> int:
    """Fuses every norm whose first reader is a quantised product of it; returns how many."""
    places = {node: place for place, node in enumerate(model.graph)}
    count = 0
    for node in list(model.graph):
        product = _first_reader(node, places) if node.op_type == "LayerNormalization" and not node.domain else None
        if product is not None and _fits(node, product):
            places[_fuse(model.graph, node, product)] = places[product]
            count += 1
    return count


def _first_reader(norm: ir.Node, places: dict[ir.Node, int]) -> ir.Node | None:
    """The first one in the order of the graph: only behind it the normalised rows are there."""
    readers = [use.node for use in norm.outputs[0].uses()]
    if not readers or any(reader not in places for reader in readers):  # one in a branch may stand anywhere
        return None
    return min(readers, key=places.__getitem__)


def _fits(norm: ir.Node, product: ir.Node) -> bool:
    output, weight = norm.outputs[0], norm.inputs[1]
    last = norm.attributes.get_int("axis", -1) in (-1, (rank(output) or 0) - 1)
    if (product.domain, product.op_type) != (accel_cpu.DOMAIN, accel_cpu.MATMUL) or not last:
        return False
    one = [value is output for value in product.inputs] == [True] + [False] * (len(product.inputs) - 1)
    return one and len(product.inputs) <= _NORM and weight is not None and rank(weight) == 1


def _fuse(graph: ir.Graph, norm: ir.Node, product: ir.Node) -> ir.Node:
    inputs = [*norm.inputs[:1], *product.inputs[1:], *([None] * (_NORM - len(product.inputs))), *norm.inputs[1:]]
    attributes: dict[str, ir.Attr | float] = {"epsilon": norm.attributes.get_float("epsilon", 1e-5)}
    made = ir.node(
        accel_cpu.MATMUL, inputs, {**product.attributes, **attributes}, domain=accel_cpu.DOMAIN, num_outputs=2
    )
    graph.insert_before(product, made)
    for old, new in ((product.outputs[0], made.outputs[0]), (norm.outputs[0], made.outputs[1])):
        new.type, new.shape = old.type, old.shape
    replace_value(product.outputs[0], made.outputs[0])
    graph.remove(product, safe=True)
    replace_value(norm.outputs[0], made.outputs[1])
    graph.remove(norm, safe=True)
    return made


__all__ = ["fuse_norms"]
