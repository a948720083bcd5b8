"""What follows a product: bias, activation, gate and residual."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels_cpu.products import ACTIVATIONS, Product, assert_close, open_product, random_product, run


def random_rows(rows: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, inputs), np.float32)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str, gated: bool) -> None:
    for outputs, bits, block in [(16, 8, 0), (40, 4, 32), (100, 8, 64)]:
        product = random_product(outputs, 48, bits, block, activation=activation, gated=gated, biased=True)
        x = 3 * random_rows(7, 48)
        assert_close(run(open_product(product), x=x), product.expect(x), 2e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_residual_is_added_last(isa: str, gated: bool) -> None:
    for outputs in (16, 30, 72):
        product = random_product(outputs, 32, 8, 0, activation="silu", gated=gated, optional=("residual",))
        x = random_rows(5, 32)
        residual = np.random.default_rng(4).standard_normal((5, outputs), np.float32)
        assert_close(run(open_product(product), x=x, residual=residual), product.expect(x, residual=residual))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_activations_over_the_whole_range(isa: str, activation: str) -> None:
    """Through an identity: x in steps of the scale, products exact, so that errors are the activation's alone."""
    size = 8
    product = Product(np.eye(size, dtype=np.int8), np.ones((size, 1), np.float32), 8, 0, None, activation)
    product = Product(**{**product.__dict__, "optional": ("x_scale",)})
    session = open_product(product)
    for step in (1e-6, 1e-3, 0.03, 0.1, 1.0):
        x = (np.arange(-128, 128).clip(-127) * np.float32(step)).astype(np.float32).reshape(-1, size)
        actual = run(session, x=x, x_scale=np.float32(step))
        exact = (np.rint(x / np.float32(step)) * np.float32(step)).astype(np.float32)
        expected = ACTIVATIONS[activation](exact.astype(np.float64))
        assert np.abs(actual - expected).max() <= 4e-7 * np.abs(exact).max(), step
