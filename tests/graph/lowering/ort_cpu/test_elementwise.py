from __future__ import annotations

import numpy as np
import pytest

from accel.graph.lowering.ort_cpu.elementwise import fuse_bias_gelu, fuse_silu, lower_rms_norm
from tests.graph.small import apply, make, normal, ops, run

X = normal(2, 5, 8)
WEIGHTS = {"w": normal(8, 16), "b": normal(16)}
HEAD = "main (float[B,S,8] x, float[8,16] w, float[16] b) => (float[B,S,16] y"


def test_rms_norm() -> None:
    text = """main (float[B,S,8] x, float[8] scale) => (float[B,S,8] y) {
      y = RMSNormalization <axis = -1, epsilon = 0.01> (x, scale)
    }"""
    model = make(text, scale=normal(8))
    assert apply(lower_rms_norm, model, x=X * 0.1) == 1
    assert ops(model) == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("form,kernel", [("none", "BiasGelu"), ("tanh", "FastGelu")])
@pytest.mark.parametrize("order", ["m, b", "b, m"])
def test_bias_gelu(form: str, kernel: str, order: str) -> None:
    text = f'{HEAD}) {{\nm = MatMul (x, w)\na = Add ({order})\ny = Gelu <approximate = "{form}"> (a)\n}}'
    model = make(text, **WEIGHTS)
    assert apply(fuse_bias_gelu, model, x=X) == 1
    assert ops(model) == ["MatMul", kernel]


def test_the_two_gelu_forms_differ_by_more_than_the_tolerance() -> None:
    """So that the tests above would notice an exchange."""
    models = [
        make(f'main (float[N] x) => (float[N] y) {{ y = Gelu <approximate = "{form}"> (x) }}')
        for form in ("none", "tanh")
    ]
    x = np.linspace(-4, 4, 200, dtype=np.float32)
    (exact,), (tanh,) = (run(model, x=x) for model in models)
    assert 1e-4 < np.abs(exact - tanh).max() < 1e-3


@pytest.mark.parametrize(
    "outputs,lines",
    [
        (", float[B,S,16] z", "m = MatMul (x, w)\na = Add (m, b)\ny = Gelu (a)\nz = Relu (a)"),
        ("", "m = MatMul (x, w)\nc = Relu (b)\na = Add (m, c)\ny = Gelu (a)"),
        ("", "m = MatMul (x, w)\nr = Relu (m)\na = Add (r, b)\ny = Gelu (a)"),
        ("", "m = MatMul (x, w)\na = Sub (m, b)\ny = Gelu (a)"),
        ("", "m = MatMul (x, w)\ny = Gelu (m)"),
    ],
    ids=["sum read elsewhere", "bias computed", "sum of no product", "difference", "no bias"],
)
def test_other_sums_are_left(outputs: str, lines: str) -> None:
    model = make(f"{HEAD}{outputs}) {{\n{lines}\n}}", **WEIGHTS)
    assert apply(fuse_bias_gelu, model, x=X) == 0


def test_bias_read_elsewhere_is_no_obstacle() -> None:
    model = make(
        f"{HEAD}, float[16] z) {{\nm = MatMul (x, w)\na = Add (m, b)\ny = Gelu (a)\nz = Relu (b)\n}}", **WEIGHTS
    )
    assert apply(fuse_bias_gelu, model, x=X) == 1


def test_bias_of_one_number_is_left() -> None:
    text = f"{HEAD}) {{\nm = MatMul (x, w)\na = Add (m, b)\ny = Gelu (a)\n}}".replace("float[16] b", "float[1] b")
    assert apply(fuse_bias_gelu, make(text, w=WEIGHTS["w"], b=normal(1)), x=X) == 0


SILU = "main (float[N] x, float[N] z) => (float[N] y) {\ng = Sigmoid (%s)\ny = %s\n}"


@pytest.mark.parametrize("product", ["Mul (x, g)", "Mul (g, x)"])
def test_silu(product: str) -> None:
    model = make(SILU % ("x", product))
    assert apply(fuse_silu, model, x=normal(50), z=normal(50, seed=1)) == 1
    assert ops(model) == ["QuickGelu"]


@pytest.mark.parametrize("gate,product", [("z", "Mul (x, g)"), ("x", "Mul (g, g)"), ("x", "Add (x, g)")])
def test_other_gates_are_left(gate: str, product: str) -> None:
    assert apply(fuse_silu, make(SILU % (gate, product)), x=normal(50), z=normal(50, seed=1)) == 0
