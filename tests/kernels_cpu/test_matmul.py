"""QuantizedMatMul: exact integers, every instruction set, shapes that fill no tile, numbers that are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels_cpu.products import Product, assert_close, open_product, random_product, run

SCHEMES = [(8, 0), (8, 32), (8, 64), (8, 128), (4, 0), (4, 32), (4, 64), (4, 128)]
SHAPES = [(1, 1), (3, 5), (16, 8), (20, 40), (64, 64), (100, 130), (144, 33), (176, 257)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 32, 70]


def random_rows(rows: int, inputs: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs), np.float32)


@pytest.mark.parametrize(("bits", "block"), SCHEMES)
def test_odd_shapes_and_every_number_of_rows(isa: str, bits: int, block: int) -> None:
    for outputs, inputs in SHAPES:
        product = random_product(outputs, inputs, bits, block, biased=outputs % 2 == 0)
        session = open_product(product)
        for rows in ROWS if outputs == 176 else (1, 4, 7):
            x = random_rows(rows, inputs)
            assert_close(run(session, x=x), product.expect(x))


@pytest.mark.parametrize(("bits", "block"), SCHEMES)
def test_integers_are_exact(isa: str, bits: int, block: int) -> None:
    """Whole activations and scales of one: results are whole numbers below 2^24, which float32 holds exactly."""
    rng = np.random.default_rng(2)
    inputs, outputs = 264, 80
    limits = (-128, 128) if bits == 8 else (-8, 8)
    values = rng.integers(*limits, (outputs, inputs), dtype=np.int8)
    values[:4] = limits[0]  # the extremes all at once: whatever saturates shows
    values[4:8] = limits[1] - 1
    scales = np.ones((outputs, -(-inputs // block) if block else 1), np.float32)
    x = rng.integers(-127, 128, (9, inputs)).astype(np.float32)
    x[0], x[1] = 127, -127
    session = open_product(Product(values, scales, bits, block, optional=("x_scale",)))
    actual = run(session, x=x, x_scale=np.float32(1))
    np.testing.assert_array_equal(actual, x.astype(np.int64) @ values.astype(np.int64).T)


def test_longest_row_stays_in_int32(isa: str) -> None:
    inputs = 131072
    values = np.full((2, inputs), 127, np.int8)
    values[1] = -128
    session = open_product(Product(values, np.ones((2, 1), np.float32), 8, 0, optional=("x_scale",)))
    x = np.full((1, inputs), 127, np.float32)
    expected = np.array([[127.0 * 127 * inputs, -128.0 * 127 * inputs]])
    assert_close(run(session, x=x, x_scale=np.float32(1)), expected)


def test_batches_keep_their_shape(isa: str) -> None:
    product = random_product(40, 48, 8, 0)
    session = open_product(product)
    for shape in [(48,), (1, 48), (2, 3, 48), (2, 1, 5, 48), (0, 48), (3, 0, 48)]:
        x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
        expected = product.expect(x) if x.size else np.zeros((*shape[:-1], 40))
        assert_close(run(session, x=x), expected)


def test_more_rows_than_are_quantised_at_once(isa: str) -> None:
    product = random_product(24, 40, 8, 32, optional=("residual",))
    x = random_rows(4100, 40)
    residual = random_rows(4100, 24)
    assert_close(run(open_product(product), x=x, residual=residual), product.expect(x, residual=residual))


@pytest.mark.parametrize("block", [0, 32])
def test_static_scale_clips(isa: str, block: int) -> None:
    product = random_product(32, 64, 8, block, optional=("x_scale",))
    x = random_rows(5, 64) * 10
    scale = np.float32(0.05)  # 127 * 0.05 is 6.35: much of x lies outside
    assert_close(run(open_product(product), x=x, x_scale=scale), product.expect(x, float(scale)))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("block", "optional"), [(0, ()), (32, ()), (0, ("x_scale",)), (32, ("x_scale",))])
def test_a_row_without_finite_numbers_gives_nan(isa: str, number: float, block: int, optional: tuple[str, ...]) -> None:
    product = random_product(32, 77, 8, block, optional=optional)
    x = random_rows(6, 77)
    expected = product.expect(x, 0.03 if optional else None)
    x[2, 76] = x[4, 0] = number
    scale = {"x_scale": np.float32(0.03)} if optional else {}
    actual = run(open_product(product), x=x, **scale)
    assert np.isnan(actual[[2, 4]]).all()
    others = [0, 1, 3, 5]
    assert_close(actual[others], expected[others])


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 32)])
def test_rows_of_zeros_and_of_next_to_nothing(isa: str, bits: int, block: int) -> None:
    product = random_product(32, 64, bits, block, biased=True)
    x = random_rows(4, 64)
    x[0], x[1], x[2] = 0, 1e-38, x[2] * np.float32(1e-20)
    x[3, :32] = 0  # of blocks, one alone
    assert_close(run(open_product(product), x=x), product.expect(x))


def test_scales_of_every_size(isa: str) -> None:
    """Float16 scales down to the smallest subnormal."""
    product = random_product(48, 64, 4, 32)
    scales = np.geomspace(6e-8, 6e4, product.scales.size).astype(np.float16).astype(np.float32)
    product = replace(product, scales=scales.reshape(product.scales.shape))
    x = random_rows(3, 64)
    actual, expected = run(open_product(product), x=x), product.expect(x)
    sizes = np.abs(product.scales).max(axis=1) * np.abs(x).max() * 64
    assert (np.abs(actual - expected) <= 1e-6 * sizes).all()


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    product = random_product(112, 300, 4, 32, biased=True, activation="gelu", gated=True)
    x = random_rows(13, 300)
    results = []
    for name in ("avx512vnni", "avx2", "portable"):
        monkeypatch.setenv("ACCEL_CPU_ISA", name)
        try:
            results.append(run(open_product(product), x=x))
        except Exception as error:
            assert "names no instruction set that this CPU runs" in str(error)
    for result in results:
        assert_close(result, results[-1])
