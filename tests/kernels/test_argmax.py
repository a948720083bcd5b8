from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker

torch = pytest.importorskip("torch")
from accel_kernels.argmax import argmax, argmax_workspace, reference  # noqa: E402

NAN, INF = float("nan"), float("inf")


def check(logits: Any, space: tuple[Any, Any] | None = None, span: int = 64) -> list[int]:
    """Finds the best tokens, compares them with the reference and looks at what is left behind."""
    rows = len(logits)
    space = argmax_workspace(rows, logits.device) if space is None else space
    before = [tensor.clone() for tensor in space]
    ids, values = torch.full((rows,), -1, device=logits.device), torch.full((rows,), 7.0, device=logits.device)
    argmax(logits, ids, values, space, span=span)
    expected, best = reference(logits)
    assert torch.equal(ids, expected)
    assert torch.equal(values.nan_to_num(nan=123.0), best.nan_to_num(nan=123.0))
    assert all(torch.equal(now, then) for now, then in zip(space, before)), "the workspace is as it was"
    return [int(index) for index in ids]


@pytest.mark.parametrize("count", [1, 63, 64, 1000])
def test_agrees_with_the_reference(device: Any, count: int) -> None:
    check(Maker(device).normal(3, count))


@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_all_of_one_sign(device: Any, shift: float) -> None:
    check(Maker(device).normal(2, 300) + shift)


def test_the_first_of_equals(device: Any) -> None:
    logits = torch.zeros(1, 300, device=device)
    logits[0, [70, 69, 290]] = 1.0
    assert check(logits) == [69]


def test_nan_is_found(device: Any) -> None:
    """Also a negative one, beside infinity, and in the last part."""
    logits = Maker(device).normal(4, 300)
    logits[0, 200], logits[1, 299], logits[1, 5], logits[2, 3] = NAN, -NAN, INF, INF
    assert check(logits)[:3] == [200, 299, 3]
    assert torch.isnan(reference(logits)[1][:2]).all()


def test_nothing_but_minus_infinity(device: Any) -> None:
    assert check(torch.full((2, 100), -INF, device=device)) == [0, 0]


def test_a_workspace_serves_many_calls_and_fewer_rows(device: Any) -> None:
    make = Maker(device)
    space = argmax_workspace(4, device)
    for rows in (4, 1, 3):
        check(make.normal(rows, 200), space)
