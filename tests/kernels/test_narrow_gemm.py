from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.narrow_gemm import TOLERANCES, NarrowTile, narrow_gemm, reference  # noqa: E402
from accel_kernels.tiles import GELU_ERF, SILU  # noqa: E402

N, K = 70, 200  # neither a multiple of a block
TILE = NarrowTile(32, 64)


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
def test_agrees_with_the_reference(make: Maker, rows: int) -> None:
    x, weight, bias = make.normal(rows, K), make.normal(N, K), make.normal(N)
    residual, out = make.normal(rows, N, dtype=torch.float32), make.poison(rows, N)
    options = {"bias": bias, "residual": residual, "activation": GELU_ERF}
    assert narrow_gemm(x, weight, out, tile=TILE, **options) is out
    assert_close(out, reference(x, weight, **options), TOLERANCES[make.dtype])


@pytest.mark.parametrize("stripe", [None, 7, 35])
def test_gate_and_other_alternate_in_stripes(make: Maker, stripe: int | None) -> None:
    x, weight, bias = make.normal(3, K), make.normal(2 * N, K), make.normal(2 * N)
    options: dict[str, Any] = {"bias": bias, "gated": True, "stripe": stripe, "activation": SILU}
    out = make.poison(3, N)
    narrow_gemm(x, weight, out, tile=TILE, **options)
    assert_close(out, reference(x, weight, **options), TOLERANCES[make.dtype])


@pytest.mark.parametrize("splits", [2, 3, 4])
def test_parts_add_up(make: Maker, splits: int) -> None:
    """Four ranges of 200 terms in turns of 64 leave the last one empty: it is written all the same."""
    x, weight = make.normal(5, K), make.normal(N, K)
    out = make.poison(splits, 5, N, dtype=torch.float32)
    narrow_gemm(x, weight, out, tile=NarrowTile(32, 64, splits))
    assert_close(out.sum(0), reference(x, weight), TOLERANCES[make.dtype])
    span = -(-K // splits // 64) * 64
    assert_close(out[0], reference(x[:, :span], weight[:, :span]), TOLERANCES[make.dtype])


def test_tiles_shrink_to_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_kernels import device

    x = torch.zeros(64, 2048, dtype=torch.float16)
    monkeypatch.setattr(device, "capability", lambda _: (8, 6))
    for limit, tile, expected in (
        (99 << 10, NarrowTile(), NarrowTile(stages=3)),
        (227 << 10, NarrowTile(), NarrowTile()),
        (48 << 10, NarrowTile(), NarrowTile(block_k=64, stages=2)),
        (99 << 10, NarrowTile(stages=2), NarrowTile(stages=2)),
    ):
        monkeypatch.setattr(device, "shared_memory", lambda _, limit=limit: limit)
        assert tile.fitting(x, gated=False) == expected
