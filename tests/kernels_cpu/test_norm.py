"""QuantizedMatMul that normalises its rows first."""

from __future__ import annotations

from typing import Any

import accel_cpu
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from tests.kernels_cpu.products import Product, assert_close, open_product, open_session, random_product, run

EPSILON = 1e-5


def open_normed(
    product: Product, weight: NDArray, bias: NDArray | None = None, threads: int = 2, **changed: Any
) -> onnxruntime.InferenceSession:
    """Outputs y and normalised; ``changed``: arguments of ``open_session`` or attributes."""
    tensors = product.packed() | {"norm_weight": weight} | ({} if bias is None else {"norm_bias": bias})
    order = ["x", "weight", "scales", "bias", "", "", "norm_weight", "norm_bias"]
    attributes: dict[str, Any] = {"N": product.outputs, "K": product.inputs, "bits": product.bits, "gated": 0}
    attributes |= {"block_size": product.block, "activation": product.activation, "epsilon": EPSILON}
    present = [name if name in tensors or name == "x" else "" for name in order]
    arguments = {"outputs": ("y", "normalised"), **attributes, **changed}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return open_session(
        accel_cpu.MATMUL, {"x": (TensorProto.FLOAT, None)}, tensors, present[: 8 - (bias is None)], threads, **arguments
    )


def norm(x: NDArray, weight: NDArray, bias: NDArray | None = None) -> NDArray[np.float64]:
    exact = x.astype(np.float64)
    exact = exact - exact.mean(axis=-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True) + EPSILON)
    return exact * weight + (0 if bias is None else bias)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (1, 5), (2, 16), (70, 33), (3, 384), (2100, 40)])
def test_rows_are_normalised_and_then_multiplied(isa: str, rows: int, inputs: int, biased: bool) -> None:
    for bits, block in ((8, 0), (4, 32)):
        product = random_product(48, inputs, bits, block, biased=True, activation="gelu")
        x, weight = 3 * normal(rows, inputs) + 1, normal(inputs, seed=1)
        bias = normal(inputs, seed=2) if biased else None
        y, normalised = open_normed(product, weight, bias).run(None, {"x": x})
        assert_close(normalised, norm(x, weight, bias), 2e-6)
        np.testing.assert_array_equal(y, run(open_product(product), x=normalised))


def test_far_from_zero_and_all_the_same(isa: str) -> None:
    product, weight = random_product(16, 100, 8, 0), np.ones(100, np.float32)
    x = np.stack([normal(100) * 1e-2 + 1000, normal(100) * 1e15, normal(100) * 1e-15, np.full(100, -7, np.float32)])
    normalised = open_normed(product, weight).run(None, {"x": x})[1]
    assert_close(normalised[0], norm(x, weight)[0], 5e-2)  # the numbers themselves have few digits left
    assert_close(normalised[1:], norm(x, weight)[1:], 2e-6)


def test_nan_spoils_its_row_alone(isa: str) -> None:
    product, weight, x = random_product(16, 50, 8, 0), normal(50, seed=1), normal(5, 50)
    session = open_normed(product, weight)
    expected = session.run(None, {"x": x})
    for value in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[2, 49] = value
        for actual, good in zip(session.run(None, {"x": spoilt}), expected):
            assert np.isnan(actual[2]).any()
            np.testing.assert_array_equal(np.delete(actual, 2, axis=0), np.delete(good, 2, axis=0))


def test_nothing_and_many_dimensions(isa: str) -> None:
    product, weight = random_product(16, 20, 8, 0), normal(20, seed=1)
    for shape in ((0, 20), (2, 0, 20), (2, 3, 5, 20)):
        y, normalised = open_normed(product, weight).run(None, {"x": normal(*shape)})
        assert y.shape == (*shape[:-1], 16) and normalised.shape == shape


def test_number_of_threads_changes_nothing(isa: str) -> None:
    product, weight, x = random_product(64, 96, 8, 0), normal(96, seed=1), normal(500, 96)
    one = open_normed(product, weight, threads=1).run(None, {"x": x})
    for actual, expected in zip(open_normed(product, weight, threads=3).run(None, {"x": x}), one):
        np.testing.assert_array_equal(actual, expected)


def test_refusals() -> None:
    product, x = random_product(16, 20, 8, 0), {"x": normal(2, 20)}
    with pytest.raises(Exception, match="norm_weight has 19 elements; must have 20"):
        open_normed(product, normal(19)).run(None, x)
    with pytest.raises(Exception, match="norm_bias has 21 elements; must have 20"):
        open_normed(product, normal(20), normal(21)).run(None, x)
    with pytest.raises(Exception, match="must have two outputs"):
        open_normed(product, normal(20), outputs=("y",)).run(None, x)
    with pytest.raises(Exception, match="epsilon"):
        open_normed(product, normal(20), epsilon=None)
