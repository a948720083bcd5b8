from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from accel.compress.rtn import round_to_nearest
from accel.compress.tensors import check_weight, fitting_group
from accel.errors import InputError
from tests.graph.small import normal

LIMITS = {8: (-127, 127), 4: (-8, 7)}


def error(weight: NDArray, found: NDArray) -> float:
    return float(((weight - found) ** 2).sum())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("search", [True, False])
def test_values_are_the_nearest_of_the_scales(bits: int, group: int, search: bool) -> None:
    weight = normal(40, 256) * np.exp(normal(40, 1))
    found = round_to_nearest(weight, bits, group, search=search)
    assert found.values.dtype == np.int8 and found.scales.dtype == np.float32
    low, high = LIMITS[bits]
    spread = np.repeat(found.scales, 256 // found.scales.shape[1], axis=1)
    assert (found.values == np.clip(np.rint(weight / spread), low, high)).all()
    if group:
        assert (found.scales == found.scales.astype(np.float16)).all()
    assert found.values.min() >= low and found.values.max() <= high
    step = np.abs(spread).max(1, keepdims=True)
    if not search:
        assert np.abs(weight - found.dequantize()).max() <= (1.01 if bits == 4 else 0.51) * step.max()


def test_eight_bits_lose_half_a_step_at_most() -> None:
    weight = normal(16, 64)
    found = round_to_nearest(weight, 8, 32, search=False)
    steps = np.repeat(np.abs(found.scales), 32, axis=1)
    assert (np.abs(weight - found.dequantize()) <= 0.5 * steps * (1 + 127 * 2**-10)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_of_four_bits_is_minus_eight(sign: int) -> None:
    """The range reaches farther down: the scale's sign takes it there."""
    weight = np.full((1, 32), 0.25, np.float32) * sign
    weight[0, 3] = 8.0 * sign
    found = round_to_nearest(weight, 4, 32, search=False)
    assert found.values[0, 3] == -8 and found.scales[0, 0] == -sign
    assert found.dequantize()[0, 3] == 8.0 * sign


def test_integers_are_found_again() -> None:
    """Weights that are such integers already lose nothing, also where the scale is negative."""
    values = np.random.default_rng(0).integers(-8, 7, (64, 64), endpoint=True)
    values[:, ::32] = -8
    scales = (2.0 ** np.random.default_rng(1).integers(-6, 2, (64, 2))) * np.where(normal(64, 2) > 0, 1, -1)
    weight = (values * np.repeat(scales, 32, axis=1)).astype(np.float32)
    for search in (True, False):
        assert (round_to_nearest(weight, 4, 32, search=search).dequantize() == weight).all()


def test_search_lowers_the_error() -> None:
    weight = normal(128, 256)
    for bits, gain in ((4, 0.9), (8, 1.0)):
        plain, better = (round_to_nearest(weight, bits, 32, search=search) for search in (False, True))
        assert error(weight, better.dequantize()) < gain * error(weight, plain.dequantize())


def test_importance_moves_the_error() -> None:
    """Inputs that matter are rounded better, at the cost of the others."""
    weight = np.random.default_rng(0).standard_t(4, (64, 128)).astype(np.float32)
    importance = torch.ones(128)
    importance[::2] = 100.0
    even, uneven = (round_to_nearest(weight, 4, 32, importance=item).dequantize() for item in (None, importance))
    assert error(weight[:, ::2], uneven[:, ::2]) < 0.8 * error(weight[:, ::2], even[:, ::2])
    assert error(weight[:, 1::2], uneven[:, 1::2]) > error(weight[:, 1::2], even[:, 1::2])


def test_zeros_stay_zeros() -> None:
    weight = normal(4, 64)
    weight[1], weight[2, :32] = 0, 0
    for bits, group in ((4, 32), (8, 32), (8, 0)):
        found = round_to_nearest(weight, bits, group)
        assert (found.scales != 0).all() and (found.dequantize()[1] == 0).all()


def test_same_bytes_twice() -> None:
    weight = normal(700, 64)
    first, second = (round_to_nearest(weight, 4, 32) for _ in range(2))
    assert first.values.tobytes() == second.values.tobytes() and first.scales.tobytes() == second.scales.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_numbers(bad: float) -> None:
    weight = normal(4, 64)
    weight[2, 5] = bad
    with pytest.raises(InputError, match=r"1 of 256 weights are NaN or infinite \(at layers.3.q\).*export the model"):
        round_to_nearest(weight, 8, 32, name="layers.3.q")


def test_scales_beyond_float16() -> None:
    weight = normal(4, 64) * 1e7
    with pytest.raises(InputError, match=r"beyond float16 \(at layers.3.q\)"):
        round_to_nearest(weight, 4, 32, name="layers.3.q")
    found = round_to_nearest(weight, 8, 0)
    assert error(weight, found.dequantize()) < 1e-3 * float((weight**2).sum())


def test_groups() -> None:
    assert [fitting_group(576, group, "w") for group in (0, 32, 64, 128)] == [0, 32, 64, 64]
    assert fitting_group(96, 128, "w") == 32
    with pytest.raises(InputError, match=r"40 inputs cannot be divided into groups of 64.*at layers.3.q.*keep="):
        fitting_group(40, 64, "layers.3.q")
    with pytest.raises(InputError, match="no matrix"):
        check_weight(normal(4), "w")
