"""Matrices, embeddings and caches of floats in a low type; everything small stays float32."""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.lowering.fused_linear import DOMAIN
from accel.graph.lowering.tensorrt.precision import narrow

FLOAT = ir.DataType.FLOAT


def lower_weights(model: ir.Model, dtype: ir.DataType) -> int:
    """Replaces the matrices by their low copies, written when the file is; returns how many."""
    if dtype == FLOAT:
        return 0
    graph, made = model.graph, dict[ir.Value, ir.Value]()
    for node in list(graph):
        for place, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.dtype != FLOAT or len(value.shape or ()) != 2:
                continue
            if node.domain == DOMAIN and node.op_type in ("Linear", "GatedLinear"):
                node.replace_input_with(place, _low(graph, value, dtype, made))
            elif node.op_type == "Gather" and place == 0:
                _low_rows(graph, node, _low(graph, value, dtype, made))
    for value in [*graph.inputs, *graph.outputs]:
        if (value.name or "").startswith(("past.", "present.")) and value.dtype == FLOAT:
            value.type = ir.TensorType(dtype)
    return len(made)


def _low(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, made: dict[ir.Value, ir.Value]) -> ir.Value:
    if value not in made:
        tensor = value.const_value
        assert tensor is not None and value.name
        name = f"{value.name}.{dtype.name.lower()}"
        low = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        low.const_value = ir.LazyTensor(
            lambda: ir.tensor(narrow(tensor, dtype, name), name=name), dtype=dtype, shape=tensor.shape, name=name
        )
        graph.register_initializer(low)
        made[value] = low
    return made[value]


def _low_rows(graph: ir.Graph, gather: ir.Node, table: ir.Value) -> None:
    """Rows of the low table, float32 from there on."""
    rows = ir.node("Gather", [table, gather.inputs[1]], dict(gather.attributes))
    rows.outputs[0].type, rows.outputs[0].shape = ir.TensorType(table.dtype), gather.outputs[0].shape  # type: ignore[arg-type]
    cast = ir.node("Cast", [rows.outputs[0]], {"to": FLOAT})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(FLOAT), gather.outputs[0].shape
    graph.insert_before(gather, [rows, cast])
    ir.convenience.replace_all_uses_with(gather.outputs[0], cast.outputs[0])
    graph.remove(gather, safe=True)


__all__ = ["lower_weights"]
