from __future__ import annotations

import onnx_ir as ir
import pytest

from accel.errors import FusionError
from accel.graph.lowering.ort_cuda.kernels import KERNELS, SIDE_INPUTS, check_kernels
from tests.graph.small import make


def test_a_graph_of_kernels() -> None:
    check_kernels(
        make("""main (float16[B,S,8] x, int64[R] rows, int64[3] shape) => (float16[R,8] y) <float16[1,B,8] g> {
          z = Reshape (x, shape)
          c = Concat <axis = 0> (z, x)
          f = Relu (c)
          g = com.microsoft.FastGelu (f)
          flat = Relu (g)
          y = Gather (flat, rows)
        }""")
    )


REFUSED = {
    "an operator without a kernel": ("Celu (x)", "no CUDA kernel for Celu of float16"),
    "a type without one": ("Cos (h)", "no CUDA kernel for Cos of bfloat16"),
    "two types": ("Add (x, h)", "no CUDA kernel for Add of bfloat16, float16"),
    "another domain": ("com.microsoft.Relu (x)", "no CUDA kernel for com.microsoft::Relu of float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    step, message = REFUSED[case]
    model = make("main (float16[4] x, bfloat16[4] h) => (float16[4] y) { y = Relu (x) }")
    x, h = model.graph.inputs
    name, rest = step.split(" (")
    domain, _, op_type = name.rpartition(".")
    inputs = [x if item == "x" else h for item in rest.rstrip(")").split(", ")]
    model.graph[0].replace_input_with(0, x)
    node = ir.node(op_type, inputs, domain=domain, name="odd")
    model.graph.append(node)
    with pytest.raises(FusionError, match=rf"{message} \(at odd, ort-cuda\)"):
        check_kernels(model)


def test_decoders_attend_in_halves_only() -> None:
    assert KERNELS["com.microsoft", "GroupQueryAttention"] == {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def test_side_inputs_are_of_known_kernels() -> None:
    assert set(SIDE_INPUTS) <= set(KERNELS)
