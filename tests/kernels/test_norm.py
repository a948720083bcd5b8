from __future__ import annotations

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.norm import TOLERANCES, norm, reference  # noqa: E402
from accel_kernels.tiles import LAYER_NORM, RMS_NORM  # noqa: E402


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", [RMS_NORM, LAYER_NORM])
@pytest.mark.parametrize("size", [1, 64, 100, 384, 650])
def test_agrees_with_the_reference(make: Maker, kind: int, size: int, together: bool) -> None:
    """Six rows: the last program that takes several has places for more. Far from zero, a variance is a small part."""
    x, weight, bias = make.normal(6, size) + 5.0, make.normal(size), make.normal(size)
    room = make.poison(8, size)
    out = room[:6]
    options = {"eps": 1e-5, "kind": kind, "bias": bias}
    assert norm(x, weight, out, together=together, **options) is out
    assert_close(out, reference(x, weight, **options)[0], TOLERANCES[make.dtype])
    assert room[6:].isnan().all(), "rows behind the end were written"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_residual_in_parts_joins_the_stream(make: Maker, parts: int, together: bool, rows: int) -> None:
    x, weight = make.normal(rows, 300, dtype=torch.float32), make.normal(300)
    residual = make.normal(*((parts,) if parts else ()), rows, 300, dtype=torch.float32)
    stream, out = make.poison(rows, 300, dtype=torch.float32), make.poison(rows, 300)
    expected, added = reference(x, weight, eps=1e-5, residual=residual)
    norm(x, weight, out, eps=1e-5, residual=residual, stream=stream, together=together)
    assert_close(out, expected, TOLERANCES[make.dtype])
    assert_close(stream, added, 1e-6)


def test_the_stream_may_be_the_input(device: object) -> None:
    make = Maker(device)
    x, weight, residual, out = make.normal(2, 10), make.normal(10), make.normal(2, 10), make.poison(2, 10)
    expected, added = reference(x.clone(), weight, eps=0.1, residual=residual)
    norm(x, weight, out, eps=0.1, residual=residual, stream=x)
    assert_close(out, expected, 1e-5)
    assert_close(x, added, 1e-6)
