from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.device import has_tensor_memory_access  # noqa: E402
from accel_kernels.tiles import GELU_ERF, SILU  # noqa: E402
from accel_kernels.wide_gemm import TOLERANCES, WideTile, reference, wide_gemm  # noqa: E402

ROWS, COUNT, SIZE = 70, 64, 96  # rows are no multiple of a block


@pytest.fixture(autouse=True)
def _needs_descriptors(device: Any) -> None:
    if not has_tensor_memory_access(device):
        pytest.skip("this GPU has no tensor memory accelerator")


def tile(make: Maker, pieces: int = 2) -> WideTile:
    """Small in the interpreter; a GPU's tensor cores want 64 rows."""
    return WideTile(32, 32, 32, 2, pieces=pieces) if make.device.type == "cpu" else WideTile(64, 32, 32, pieces=pieces)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("programs", [1, 3, None])
def test_agrees_with_the_reference(make: Maker, pieces: int, programs: int | None) -> None:
    x, weight, bias = make.normal(ROWS, SIZE), make.normal(COUNT, SIZE), make.normal(COUNT)
    out = make.poison(ROWS, COUNT)
    options: dict[str, Any] = {"bias": bias, "activation": GELU_ERF}
    assert wide_gemm(x, weight, out, tile=tile(make, pieces), programs=programs, flatten=False, **options) is out
    assert_close(out, reference(x, weight, **options), TOLERANCES[make.dtype])


def test_outputs_that_end_inside_a_tile(make: Maker) -> None:
    x, weight, bias = make.normal(ROWS, SIZE), make.normal(40, SIZE), make.normal(40)
    out = make.poison(ROWS, 40)
    wide_gemm(x, weight, out, bias=bias, tile=tile(make))
    assert_close(out, reference(x, weight, bias=bias), TOLERANCES[make.dtype])


def test_gate_and_other_alternate_in_stripes(make: Maker) -> None:
    """Stripes are half a tile high."""
    x, weight, out = make.normal(ROWS, SIZE), make.normal(2 * COUNT, SIZE), make.poison(ROWS, COUNT)
    wide_gemm(x, weight, out, gated=True, activation=SILU, tile=tile(make), programs=3)
    assert_close(out, reference(x, weight, gated=True, stripe=16, activation=SILU), TOLERANCES[make.dtype])


def test_older_gpus_are_refused(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_kernels import device as features

    make = Maker(device, torch.float16)
    monkeypatch.setattr(features, "capability", lambda _: (8, 6))
    with pytest.raises(ValueError, match="tensor memory accelerator"):
        wide_gemm(make.normal(64, 64), make.normal(64, 64), make.poison(64, 64))
