"""Cosine and sine as functions of the position -> tables that the attention kernel indexes itself.

The tables are the traced graph's own numbers: the subgraph from ``position_ids`` to the
angles runs once, over 0 .. max_positions - 1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from accel.graph.edit import make_constant


class RotaryTables:
    """Makes each distinct pair of tables once."""

    def __init__(self, model: ir.Model, max_positions: int) -> None:
        self._model, self._max_positions = model, max_positions
        self._made: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}

    def fold(self, rotary: ir.Node) -> tuple[ir.Value, ir.Value] | None:
        """(cos, sin) initializers [max_positions, R / 2] for a RotaryEmbedding node; None if they depend on more."""
        cos, sin = rotary.inputs[1], rotary.inputs[2]
        assert cos is not None and sin is not None
        if (cos, sin) not in self._made:
            self._made[cos, sin] = self._evaluate(cos, sin)
        return self._made[cos, sin]

    def _evaluate(self, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        graph = self._model.graph
        positions = next(value for value in graph.inputs if value.name == "position_ids")
        try:
            part = ir.convenience.extract(graph, [positions], [cos, sin])
        except ValueError:  # reads another graph input
            return None
        model = ir.Model(part, ir_version=self._model.ir_version)
        model.opset_imports.update(self._model.opset_imports)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = session.run(None, {"position_ids": np.arange(self._max_positions, dtype=np.int64)})
        index = len(self._made)
        made = [
            make_constant(graph, f"rotary.{index}.{name}", table.reshape(self._max_positions, -1).astype(np.float32))
            for name, table in zip(("cos", "sin"), results, strict=True)
        ]
        return made[0], made[1]
