from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.lowering.ort_cpu.norms import fuse_norms
from accel.graph.lowering.ort_cpu.quantized import lower_quantized, mark_quantized
from accel.scheme import parse_scheme
from tests.graph.lowering.ort_cpu.own_operators import run_own, store_integers
from tests.graph.small import assert_close, count, make, normal, run

HEAD = """main (float[T,32] x, float[32] scale, float[32] shift, float[48,32] w, float[32,48] v) => (float[T,32] y)
  <float[T,32] n, float[T,48] a, float[T,32] b, float[T,32] c>"""
PLAIN = """
  a = accel.Linear <transposed = 1> (n, w)
  b = accel.Linear <transposed = 1> (a, v)
  y = Add (b, n)
}"""


def model_of(norm: str, rest: str = PLAIN) -> ir.Model:
    weights = {"w": normal(48, 32, seed=1), "v": normal(32, 48, seed=2) / 8}
    model = make(f"{HEAD} {{\n  n = {norm}{rest}", **weights, scale=normal(32, seed=3), shift=normal(32, seed=4))
    store_integers(model, "w", "v")
    return model


def lowered_of(model: ir.Model) -> ir.Model:
    lowered = model.clone()
    mark_quantized(lowered)
    lower_quantized(lowered, parse_scheme("w8a8-dyn"), {})
    return lowered


@pytest.mark.parametrize("norm", ["<axis = -1, epsilon = 0.1> (x, scale, shift)", "<axis = 1> (x, scale)"])
def test_fused(norm: str) -> None:
    model = model_of(f"LayerNormalization {norm}")
    lowered = lowered_of(model)
    feeds = {"x": 2 * normal(7, 32) + 1}
    before = run_own(lowered, **feeds)
    assert fuse_norms(lowered) == 1 and count(lowered, "LayerNormalization") == 0
    first = next(node for node in lowered.graph if node.op_type == "QuantizedMatMul")
    epsilon = np.float32(0.1 if "0.1" in norm else 1e-5)
    assert len(first.outputs) == 2 and first.attributes["epsilon"].as_float() == epsilon
    after = run_own(lowered, **feeds)
    assert_close(after, before, 1e-2)  # a value near a half may be rounded the other way
    assert_close(after, run(model, **feeds), 3e-2)


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("\n  c = Relu (n)\n  a = accel.Linear <transposed = 1> (c, w)"
                     "\n  b = accel.Linear <transposed = 1> (a, v)\n  y = Add (b, n)\n}", id="no product reads it"),
        pytest.param("\n  c = Relu (n)\n  a = accel.Linear <transposed = 1> (n, w)"
                     "\n  b = accel.Linear <transposed = 1> (a, v)\n  y = Add (b, c)\n}", id="another reads it before"),
    ],
)  # fmt: skip
def test_left_alone(rest: str) -> None:
    lowered = lowered_of(model_of("LayerNormalization <axis = -1> (x, scale, shift)", rest))
    assert fuse_norms(lowered) == 0 and count(lowered, "LayerNormalization") == 1


def test_other_axes_are_left_alone() -> None:
    lowered = lowered_of(model_of("LayerNormalization <axis = -1> (x, scale, shift)"))
    norm = next(node for node in lowered.graph if node.op_type == "LayerNormalization")
    norm.attributes["axis"] = ir.AttrInt64("axis", 0)
    assert fuse_norms(lowered) == 0


def test_floats_are_left_alone() -> None:
    model = make(f"{HEAD} {{\n  n = LayerNormalization <axis = -1> (x, scale, shift){PLAIN}", w=normal(48, 32),
                 v=normal(32, 48), scale=normal(32), shift=normal(32))  # fmt: skip
    assert fuse_norms(model) == 0
