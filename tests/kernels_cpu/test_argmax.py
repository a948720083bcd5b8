"""ArgMax: the largest value of each row, by the library's kernel and by the body that serves without it."""

from __future__ import annotations

import accel_cpu
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from accel.graph.lowering.ort_cpu.best_token import add_best_token
from accel.spec import BEST_LOGITS, BEST_TOKENS

WIDTHS = [1, 3, 255, 256, 257, 4096, 16384, 50257]


@pytest.fixture(params=["kernel", "body"])
def session(request: pytest.FixtureRequest) -> onnxruntime.InferenceSession:
    logits = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["R", "V"]))
    given = ir.Value(name="given", type=logits.type, shape=logits.shape)
    node = ir.node("Identity", [given], outputs=[logits])
    model = ir.Model(ir.Graph([given], [logits], nodes=[node], opset_imports={"": 23}, name="one"), ir_version=10)
    assert add_best_token(model) == 1
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    if request.param == "kernel":
        options.register_custom_ops_library(str(accel_cpu.library_path()))
    data = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def best(session: onnxruntime.InferenceSession, logits: NDArray) -> tuple[NDArray, NDArray]:
    found = session.run([BEST_TOKENS, BEST_LOGITS], {"given": logits.astype(np.float32)})
    assert [array.dtype for array in found] == [np.int64, np.float32]
    return found[0], found[1]


def check(session: onnxruntime.InferenceSession, logits: NDArray) -> None:
    tokens, values = best(session, logits)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))  # the first among equals, NaN before numbers
    np.testing.assert_array_equal(values, logits.max(axis=-1))


@pytest.mark.parametrize("rows", [1, 2, 3, 70])
@pytest.mark.parametrize("width", WIDTHS)
def test_of_random_rows(session: onnxruntime.InferenceSession, rows: int, width: int) -> None:
    rng = np.random.default_rng(width + rows)
    check(session, rng.standard_normal((rows, width)).astype(np.float32))
    check(session, rng.integers(-2, 3, (rows, width)).astype(np.float32))  # many equals


@pytest.mark.parametrize("width", WIDTHS)
def test_wherever_it_stands(session: onnxruntime.InferenceSession, width: int) -> None:
    for place in {0, 1, 7, 31, 32, 255, 256, width // 2, width - 2, width - 1} & set(range(width)):
        for value in (3.0, np.inf, np.nan):
            logits = np.full((1, width), -np.inf, np.float32)
            logits[0, place:] = -5.0
            logits[0, place] = value
            check(session, logits)


def test_nothing_but_infinity_and_nothing_at_all(session: onnxruntime.InferenceSession) -> None:
    check(session, np.full((2, 300), -np.inf, np.float32))
    tokens, values = best(session, np.zeros((0, 300), np.float32))
    assert tokens.shape == values.shape == (0,)
