from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.gemv import TOLERANCES, GemvTile, gemv, reference  # noqa: E402
from accel_kernels.tiles import GELU_ERF, GELU_TANH, LAYER_NORM, RMS_NORM, SILU  # noqa: E402

N, K = 37, 100  # neither a multiple of a block
TILE = GemvTile(4, 64, 4)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"bias": True},
    "residual": {"residual": True, "activation": GELU_ERF},
    "rms": {"norm": RMS_NORM, "eps": 1e-5},
    "layer": {"norm": LAYER_NORM, "eps": 1e-5, "norm_bias": True, "bias": True, "activation": GELU_TANH},
    "gated": {"gated": True, "activation": SILU, "norm": RMS_NORM, "eps": 1e-5, "bias": True, "residual": True},
}


def arguments(make: Maker, case: dict[str, Any], count: int = N, size: int = K) -> dict[str, Any]:
    """The optional tensors of a case."""
    both = count * (2 if case.get("gated") else 1)
    tensors: dict[str, Any] = {}
    if "norm" in case:
        tensors["norm_weight"] = make.normal(size)
    if case.get("norm_bias"):
        tensors["norm_bias"] = make.normal(size)
    if case.get("bias"):
        tensors["bias"] = make.normal(both)
    if case.get("residual"):
        tensors["residual"] = make.normal(count, dtype=torch.float32)
    return {**case, **tensors}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_agrees_with_the_reference(make: Maker, case: dict[str, Any]) -> None:
    options = arguments(make, case)
    x, weight = make.normal(K), make.normal(N * (2 if case.get("gated") else 1), K)
    out = make.poison(N)
    assert gemv(x, weight, out, tile=TILE, **options) is out
    assert_close(out, reference(x, weight, **options), TOLERANCES[make.dtype])


@pytest.mark.parametrize("stripe", [None, 1, 9, 18])
def test_gate_and_other_alternate_in_stripes(make: Maker, stripe: int | None) -> None:
    x, weight, bias = make.normal(K), make.normal(72, K), make.normal(72)
    out = make.poison(36)
    gemv(x, weight, out, bias=bias, gated=True, stripe=stripe, activation=SILU, tile=TILE)
    expected = reference(x, weight, bias=bias, gated=True, stripe=stripe, activation=SILU)
    assert_close(out, expected, TOLERANCES[make.dtype])


def test_a_batch_of_one_keeps_its_axis_and_types_mix(make: Maker) -> None:
    """As a decode step uses it: a float32 stream in and out, which the output may replace."""
    x, weight = make.normal(1, K, dtype=torch.float32), make.normal(N, K)
    stream = make.normal(1, N, dtype=torch.float32)
    expected = reference(x, weight, residual=stream.clone())
    gemv(x, weight, stream, residual=stream, tile=TILE)
    assert_close(stream[0], expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 300])
def test_rows_of_any_length(device: Any, size: int) -> None:
    make = Maker(device)
    x, weight, scale = make.normal(size), make.normal(N, size), make.normal(size)
    out = make.poison(N)
    options = {"norm": RMS_NORM, "norm_weight": scale, "eps": 1e-5}
    gemv(x, weight, out, tile=TILE, **options)
    assert_close(out, reference(x, weight, **options), TOLERANCES[torch.float32])
