from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.graph.lowering.rotary_tables import RotaryTables
from tests.graph.small import make

TEXT = """main (float[1,T,16] x, int64[T] position_ids, float[%s] frequencies, int64[1] zero, int64[1] minus)
    => (float[1,T,16] y, float[1,T,16] z) {
  p = Cast <to = 1> (position_ids)
  row = Unsqueeze (p, zero)
  column = Unsqueeze (row, minus)
  angles = Mul (column, frequencies)
  cos = Cos (angles)
  sin = Sin (angles)
  y = RotaryEmbedding <num_heads = 2> (x, cos, sin)
  z = RotaryEmbedding <num_heads = 1, rotary_embedding_dim = 8> (x, cos, sin)
}"""
FREQUENCIES = (2.0 ** -np.arange(4)).astype(np.float32)


def model_of(constant: bool = True) -> ir.Model:
    weights = {"frequencies": FREQUENCIES} if constant else {}
    return make(TEXT % 4, zero=np.array([0]), minus=np.array([-1]), **weights)


def rotations(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "RotaryEmbedding"]


def test_tables_are_the_graphs_own_numbers() -> None:
    model = model_of()
    tables = RotaryTables(model, 20)
    first, second = (tables.fold(node) for node in rotations(model))
    assert first is not None and first is second, "one pair for every node of the same angles"
    angles = np.arange(20, dtype=np.float32)[:, None] * FREQUENCIES
    for value, expected in zip(first, (np.cos(angles), np.sin(angles))):
        assert value.const_value is not None
        assert np.abs(value.const_value.numpy() - expected).max() <= 1e-6


def test_angles_that_depend_on_more_than_the_position() -> None:
    model = model_of(constant=False)
    assert RotaryTables(model, 20).fold(rotations(model)[0]) is None
