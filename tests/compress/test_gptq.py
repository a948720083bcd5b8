from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from accel.compress.gptq import gptq, output_error
from accel.compress.rtn import round_to_nearest
from accel.errors import InputError
from tests.graph.small import normal

ROWS, COLUMNS = 48, 128


def moments(tokens: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs [T, K] of uneven channels, and X^T X."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, COLUMNS, generator=generator) * torch.linspace(0.2, 2, COLUMNS)
    generator.manual_seed(1 + seed)
    inputs = torch.randn(tokens, 16, generator=generator) @ mix + torch.randn(tokens, COLUMNS, generator=generator)
    return inputs, inputs.T @ inputs


def lost(weight: NDArray, found: NDArray, inputs: torch.Tensor) -> float:
    whole = inputs @ torch.from_numpy(weight).T
    return float((inputs @ torch.from_numpy(found).T - whole).norm() / whole.norm())


def test_errors_are_measured_from_moments() -> None:
    inputs, hessian = moments()
    weight = normal(ROWS, COLUMNS)
    found = round_to_nearest(weight, 4, 32)
    assert output_error(weight, found, hessian) == pytest.approx(lost(weight, found.dequantize(), inputs), rel=1e-3)
    assert output_error(np.zeros_like(weight), round_to_nearest(np.zeros_like(weight), 4, 32), hessian) == 0


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (4, 0), (8, 0), (8, 32)])
@pytest.mark.parametrize("act_order", [True, False])
def test_outputs_change_less_than_by_rounding(bits: int, group: int, act_order: bool) -> None:
    inputs, hessian = moments()
    unseen, _ = moments(seed=1)  # of the same kind
    weight = normal(ROWS, COLUMNS)
    plain = round_to_nearest(weight, bits, group)
    found = gptq(weight, hessian, bits, group, act_order=act_order)
    assert (found.bits, found.group, found.shape) == (bits, group, weight.shape)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    assert found.values.min() >= low and found.values.max() <= high
    if group:
        assert (found.scales == found.scales.astype(np.float16)).all()
    for some in (inputs, unseen):
        assert lost(weight, found.dequantize(), some) < 0.75 * lost(weight, plain.dequantize(), some)


def test_the_pass_is_the_papers() -> None:
    """Column by column with the whole inverse, as in optimal brain quantisation, on scales that are given."""
    _, hessian = moments()
    weight = normal(4, COLUMNS)
    found = gptq(weight, hessian, 4, 0)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(COLUMNS, dtype=torch.float64)
    work = torch.from_numpy(weight).double()
    for column in range(COLUMNS):
        inverse = torch.linalg.inv(damped[column:, column:])
        scale = torch.from_numpy(found.scales[:, 0]).double()
        rounded = torch.clamp(torch.round(work[:, column] / scale), -8, 7) * scale
        error = (work[:, column] - rounded) / inverse[0, 0]
        work[:, column:] -= error[:, None] * inverse[0]
        work[:, column] = rounded
    same = np.isclose(work.numpy(), found.dequantize(), atol=1e-5).mean()
    assert same > 0.99, "but for ties"


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 0)])
def test_each_sweep_lowers_the_error(bits: int, group: int, act_order: bool) -> None:
    _, hessian = moments(4096)
    weight = normal(ROWS, COLUMNS)
    errors = [
        output_error(weight, gptq(weight, hessian, bits, group, act_order=act_order, sweeps=sweeps), hessian)
        for sweeps in range(4)
    ]
    assert errors[1] < errors[0] and errors[2] < errors[1] and errors[3] <= errors[2] * 1.001


def test_inputs_that_are_always_zero() -> None:
    inputs, _ = moments()
    inputs[:, [3, 64]] = 0
    weight = normal(ROWS, COLUMNS)
    found = gptq(weight, inputs.T @ inputs, 4, 32, sweeps=1)
    assert np.isfinite(found.dequantize()).all() and (found.values[:, [3, 64]] == 0).all()
    assert lost(weight, found.dequantize(), inputs) < 0.12
    nothing = gptq(weight, torch.zeros(COLUMNS, COLUMNS), 4, 32)
    assert np.isfinite(nothing.dequantize()).all()


def test_fewer_samples_than_inputs() -> None:
    inputs, hessian = moments(tokens=40)
    weight = normal(ROWS, COLUMNS)
    found = gptq(weight, hessian, 4, 32, sweeps=2).dequantize()
    assert lost(weight, found, inputs) < 0.05
    away = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    assert away < 0.25, "directions that no sample shows stay near"


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hessian = moments()
    weight = normal(ROWS, COLUMNS)
    whole = gptq(weight, hessian, 4, 32, sweeps=1)
    monkeypatch.setattr("accel.compress.gptq.ROWS", 20)
    parts = gptq(weight, hessian, 4, 32, sweeps=1)
    assert (whole.values == parts.values).mean() > 0.999
    assert gptq(weight, hessian, 4, 32, sweeps=1).values.tobytes() == parts.values.tobytes(), "the same bytes twice"


def test_bad_input() -> None:
    _, hessian = moments()
    weight = normal(ROWS, COLUMNS)
    with pytest.raises(InputError, match=r"second moments \[64, 64\] of 128 inputs \(at layers.1.q\)"):
        gptq(weight, hessian[:64, :64], 4, 32, name="layers.1.q")
    hessian[3, 4] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity among the inputs.*layers.1.q.*check it in fp32"):
        gptq(weight, hessian, 4, 32, name="layers.1.q")
    weight[0, 0] = np.inf
    with pytest.raises(InputError, match="1 of 6,144 weights"):
        gptq(weight, hessian, 4, 32)
