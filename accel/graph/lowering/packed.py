"""Packing: three projections into one, over the weight file's own bytes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from accel.graph.edit import producer
from accel.graph.quantized import QuantizedWeight, concatenated, quantized_alike, quantized_of
from accel.spec import PARTS, ROWS


def merge_linears(graph: ir.Graph, before: ir.Node, outputs: Sequence[ir.Value], name: str) -> ir.Value | None:
    """One ``accel::Linear`` over the same input that computes all outputs side by side.

    Returns None unless all come from transposed linears of one input, all with or all without bias, quantised alike.
    """
    linears = [producer(value, "Linear") for value in outputs]
    first = linears[0]
    if first is None or any(node is None or node.inputs[0] is not first.inputs[0] for node in linears):
        return None
    nodes = [node for node in linears if node is not None]
    if any(node.attributes.get_int("transposed", 0) != 1 or len(node.inputs) != len(first.inputs) for node in nodes):
        return None
    if not quantized_alike([node.inputs[1] for node in nodes]):
        return None
    merged = [
        merge_rows(graph, [node.inputs[i] for node in nodes], f"{name}.{kind}")  # type: ignore[misc]
        for i, kind in enumerate(("weight", "bias"), start=1)
        if len(first.inputs) > i
    ]
    made = ir.node("Linear", [first.inputs[0], *merged], {"transposed": 1}, domain="accel")
    output, like = made.outputs[0], first.outputs[0]
    output.type = like.type
    if like.shape is not None:
        output.shape = ir.Shape([*like.shape[:-1], merged[0].shape[0]])  # type: ignore[index]
    graph.insert_before(before, made)
    return output


def merge_rows(graph: ir.Graph, values: Sequence[ir.Value], name: str) -> ir.Value:
    """An initializer that stands for the row-wise concatenation; the weight writer lays the parts side by side."""
    if name in graph.initializers:
        return graph.initializers[name]
    shapes = [value.shape for value in values]
    assert all(shape is not None for shape in shapes)
    rows = sum(shape[0] for shape in shapes)  # type: ignore[index, misc]
    merged = ir.Value(name=name, type=values[0].type, shape=ir.Shape([rows, *shapes[0][1:]]))  # type: ignore[index]
    merged.metadata_props[PARTS] = "\n".join(value.name or "" for value in values)
    tensors = [value.const_value for value in values]
    assert all(tensor is not None for tensor in tensors)
    merged.const_value = concatenated(tensors, name) or ir.LazyTensor(
        lambda: ir.tensor(_concatenate(tensors)),
        dtype=tensors[0].dtype,  # type: ignore[union-attr]
        shape=merged.shape,
        name=name,
    )
    graph.register_initializer(merged)
    return merged


def rows_of(graph: ir.Graph, value: ir.Value, start: int, stop: int) -> ir.Value:
    """An initializer that stands for a range of another's rows: the same bytes of the weight file."""
    name = f"{value.name}.rows_{start}_{stop}"
    if name in graph.initializers:
        return graph.initializers[name]
    assert value.shape is not None and value.const_value is not None
    tensor = value.const_value
    part = ir.Value(name=name, type=value.type, shape=ir.Shape([stop - start, *value.shape[1:]]))
    part.metadata_props[ROWS] = f"{value.name}\n{start}\n{stop}"
    quantized = quantized_of(value)
    part.const_value = (
        ir.LazyTensor(lambda: ir.tensor(tensor.numpy()[start:stop]), dtype=tensor.dtype, shape=part.shape, name=name)
        if quantized is None
        else QuantizedWeight(quantized.rows(start, stop), 1, name)
    )
    graph.register_initializer(part)
    return part


def _concatenate(tensors: Sequence[ir.TensorProtocol | None]):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.concatenate([tensor.numpy() for tensor in tensors if tensor is not None])
