"""A small decoder-like graph whose weights are integers: a table tied to the head, products alike and unlike."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.graph.quantized import QuantizedWeight
from accel.quantized_tensor import QuantizedTensor
from tests.graph.small import make

VOCABULARY, WIDTH, INNER = 40, 64, 96
GRAPH = f"""main (int64[T] input_ids, float[{VOCABULARY},{WIDTH}] table, float[{INNER},{WIDTH}] gate,
    float[{INNER},{WIDTH}] up, float[{INNER},{WIDTH}] down, float[{WIDTH}] shift) => (float[T,{VOCABULARY}] logits)
    <float[T,{WIDTH}] x, float[T,{INNER}] g, float[T,{INNER}] u, float[T,{WIDTH}] d, float[T,{INNER}] s,
     float[T,{INNER}] a, float[T,{INNER}] m, float[T,{WIDTH}] y> {{
  x = Gather (table, input_ids)
  g = accel.Linear <transposed = 1> (x, gate)
  u = accel.Linear <transposed = 1> (x, up)
  s = Sigmoid (g)
  a = Mul (g, s)
  m = Mul (a, u)
  d = accel.Linear <transposed = 0> (m, down, shift)
  y = Add (x, d)
  logits = accel.Linear <transposed = 1> (y, table)
}}"""


def integers(rows: int, columns: int, bits: int, group: int, seed: int) -> QuantizedTensor:
    """Drawn from the whole range, scales of both signs that float16 holds."""
    rng, half = np.random.default_rng(seed), 1 << (bits - 1)
    values = rng.integers(-half, half, (rows, columns), dtype=np.int8)
    scales = rng.standard_normal((rows, columns // group)) / (half * 8)
    return QuantizedTensor(values, scales.astype(np.float16).astype(np.float32), bits, group)


def decoder(bits: int = 4, group: int = 32, up_bits: int | None = None) -> ir.Model:
    """The graph; ``up_bits``: of one of the two products that a gate joins, None: as the others."""
    drawn = {"table": (VOCABULARY, WIDTH), "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (INNER, WIDTH)}
    model = make(GRAPH, shift=np.linspace(-1, 1, WIDTH, dtype=np.float32), **{
        name: np.zeros(shape, np.float32) for name, shape in drawn.items()
    })  # fmt: skip
    for seed, (name, (rows, columns)) in enumerate(drawn.items()):
        turned = name == "down"  # [K, N] in the graph, [N, K] in integers; 96 inputs take groups of 32
        shape = (columns, rows) if turned else (rows, columns)
        width = up_bits if name == "up" and up_bits else bits
        value = model.graph.initializers[name]
        value.const_value = QuantizedWeight(integers(*shape, width, 32 if turned else group, seed), not turned, name)
    return model
