"""Nodes and inputs that the operators refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import accel_cpu
import numpy as np
import pytest

from tests.kernels_cpu.products import open_product, random_product, run


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 5}, "bits = 5; must be 4 or 8"),
        ({"block_size": 16}, "block_size = 16; must be 0, 32, 64 or 128"),
        ({"K": 0}, "K must be|K in 1"),
        ({"K": 131073}, "K in 1..131072"),
        ({"N": -1}, "N must be in 1..2147483648"),
        ({"N": 2147483649}, "N must be in 1..2147483648"),
        ({"activation": "relu"}, "activation 'relu'; must be"),
    ],
)
def test_attributes(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_product(random_product(32, 64, 8, 0), **changed)


def test_sizes_that_wrap_around() -> None:
    """2**52 rows of 131072 inputs take 2**69 bytes, which is 0 in 64 bits: no empty weight may pass for it."""
    empty = {"weight": np.zeros(0, np.uint8), "scales": np.zeros(0, np.float16)}
    with pytest.raises(Exception, match="N must be in 1..2147483648"):
        open_product(random_product(32, 64, 8, 32), N=2**52, K=131072, **empty)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": np.zeros(2047, np.uint8)}, "has 2047 bytes, but N, K and bits take 2048"),
        ({"scales": np.zeros(31, np.float32)}, "31 scales, but N, K and block_size take 32"),
        ({"scales": np.zeros(32, np.float16)}, "scales must be float32"),
        ({"bias": np.zeros(31, np.float32)}, "bias has 31 elements; must have 32"),
    ],
)
def test_initializers(changed: dict[str, Any], message: str) -> None:
    product = random_product(32, 64, 8, 0, biased=True)
    with pytest.raises(Exception, match=message):  # when it is opened
        open_product(product, **changed)
    session = open_product(product, fed=True, **changed)
    fed = product.packed() | changed
    with pytest.raises(Exception, match=message):
        run(session, x=np.zeros((1, 64), np.float32), **fed)


def test_initializers_may_come_with_each_run() -> None:
    product = random_product(32, 64, 4, 32, biased=True)
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    expected = run(open_product(product), x=x)
    np.testing.assert_array_equal(run(open_product(product, fed=True), x=x, **product.packed()), expected)


def test_scales_of_groups_must_be_half() -> None:
    with pytest.raises(Exception, match="scales must be float16 or uint16"):
        open_product(random_product(32, 64, 8, 32), scales=np.zeros(64, np.float32))


def test_scales_as_uint16_are_read_as_half() -> None:
    product = random_product(32, 64, 8, 32)
    x = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    bits = accel_cpu.pack_scales(product.scales, 32).view(np.uint16)
    np.testing.assert_array_equal(run(open_product(product, scales=bits), x=x), run(open_product(product), x=x))


def test_inputs() -> None:
    product = random_product(32, 64, 8, 0, optional=("x_scale", "residual"))
    session = open_product(product)
    one, residual = np.float32(1), np.zeros((1, 32), np.float32)
    with pytest.raises(Exception, match="x must end in a dimension of K = 64"):
        run(session, x=np.zeros((1, 63), np.float32), x_scale=one, residual=residual)
    with pytest.raises(Exception, match="residual has 64 elements; must have 32"):
        run(session, x=np.zeros((1, 64), np.float32), x_scale=one, residual=np.zeros((2, 32), np.float32))
    for wrong in (0, -1, np.nan, np.inf):
        with pytest.raises(Exception, match="must be a positive number"):
            run(session, x=np.zeros((1, 64), np.float32), x_scale=np.float32(wrong), residual=residual)


def test_instruction_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CPU_ISA", "sse9")
    with pytest.raises(Exception, match="use avx512bf16, avx512vnni, avx2 or portable"):
        open_product(random_product(32, 64, 8, 0))
    with pytest.raises(OSError, match="use avx512bf16, avx512vnni, avx2 or portable"):
        accel_cpu.instruction_set()
