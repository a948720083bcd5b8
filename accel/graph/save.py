"""Canonical graphs from and graphs to a bundle's files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from accel.manifest import GraphEntry, PassReport
from accel.spec import TensorSpec


def save_graph(
    model: ir.Model, path: Path, attention: tuple[str, ...], passes: tuple[PassReport, ...], version: str
) -> GraphEntry:
    """Saves a graph without anything that differs between two exports of one model.

    Args:
        model: Large initializers are external already; they keep their file names.
        path: The file.
        attention: Names of the attention nodes, in layer order.
        passes: What made the graph.
        version: Of this package, for the file's producer.
    """
    model.producer_name, model.producer_version, model.doc_string = "accel", version, None
    for holder in (model, model.graph):
        _keep_own_metadata(holder.metadata_props)
    for node in model.graph.all_nodes():
        _keep_own_metadata(node.metadata_props)
        node.doc_string = None
        for value in node.outputs:
            _keep_own_metadata(value.metadata_props)
    for graph in model.graphs():
        for value in [*graph.inputs, *graph.initializers.values()]:
            _keep_own_metadata(value.metadata_props)
    ir.save(model, path)
    weights = set(model.graph.initializers)
    inputs = tuple(_tensor_spec(value) for value in model.graph.inputs if value.name not in weights)
    outputs = tuple(_tensor_spec(value) for value in model.graph.outputs)
    return GraphEntry(path.name, model.opset_imports[""], inputs, outputs, attention, passes)


def load_canonical(path: Path) -> ir.Model:
    """Reads a canonical graph; its private nodes lose the function bodies that make the file run anywhere."""
    model = ir.load(path)
    model.functions.clear()
    for node in model.graph:
        node.overload = ""
    return model


def _keep_own_metadata(properties: dict[str, str]) -> None:
    for key in [key for key in properties if not key.startswith("accel.")]:
        del properties[key]


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name and value.dtype is not None and value.shape is not None, f"{value} is not typed"
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(value.name, str(value.dtype.numpy()), shape)


__all__ = ["load_canonical", "save_graph"]
