"""Adds typed nodes to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from accel.graph.edit import make_constant

Dims = Sequence[int | str | ir.SymbolicDim | None]


class Emitter:
    """Inserts nodes before one node, in the order of the calls.

    Args:
        graph: The graph.
        before: The node that all of them precede.
    """

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self._before = graph, before

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Dims,
        dtype: ir.DataType = ir.DataType.FLOAT,
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Adds a node with one output of this shape and type; returns the output."""
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(shape)
        self.graph.insert_before(self._before, node)
        return node.outputs[0]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector, one initializer for all its readers."""
        name = "ints_" + "_".join(str(value).replace("-", "m") for value in values)
        return make_constant(self.graph, name, np.array(values, np.int64))

    def int(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return make_constant(self.graph, f"int_{value}".replace("-", "m"), np.array(value, np.int64))

    def number(self, name: str, value: float) -> ir.Value:
        """A float32 scalar under a name of its own."""
        return make_constant(self.graph, name, np.array(value, np.float32))


__all__ = ["Dims", "Emitter"]
