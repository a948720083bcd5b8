"""QuantizedGather: rows of the weight that QuantizedMatMul reads."""

from __future__ import annotations

import accel_cpu
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from tests.kernels_cpu.products import Product, open_session, random_product, run


def open_table(product: Product) -> onnxruntime.InferenceSession:
    attributes = {"N": product.outputs, "K": product.inputs, "bits": product.bits, "block_size": product.block}
    inputs = {"ids": (TensorProto.INT64, None)}
    return open_session(accel_cpu.GATHER, inputs, product.packed(), ["ids", "weight", "scales"], **attributes)


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 32), (8, 128), (4, 0), (4, 32), (4, 64)])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 3), (100, 100), (130, 256)])
def test_rows_are_dequantised_exactly(isa: str, bits: int, block: int, outputs: int, inputs: int) -> None:
    product = random_product(outputs, inputs, bits, block)
    session = open_table(product)
    scales = np.repeat(product.scales, block or inputs, axis=1)[:, :inputs]
    table = product.values.astype(np.float32) * scales
    ids = np.random.default_rng(0).integers(0, outputs, (3, 50))
    ids[0, :2] = 0, outputs - 1
    np.testing.assert_array_equal(run(session, ids=ids), table[ids])
    np.testing.assert_array_equal(run(session, ids=np.array(outputs - 1)), table[outputs - 1])
    assert run(session, ids=np.zeros((2, 0), np.int64)).shape == (2, 0, inputs)


@pytest.mark.parametrize("wrong", [-1, 100, 1 << 40])
def test_ids_outside_the_table_are_refused(isa: str, wrong: int) -> None:
    session = open_table(random_product(100, 32, 8, 0))
    with pytest.raises(Exception, match=f"id {wrong} is outside the table of 100 rows"):
        run(session, ids=np.array([0, wrong]))
