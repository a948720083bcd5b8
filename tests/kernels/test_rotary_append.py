from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.rotary_append import TOLERANCES, reference, rotary_append  # noqa: E402

LENGTHS = (5, 0, 9)  # one row has no tokens


def check(make: Maker, heads: int, kv_heads: int, dim: int, tables: bool, padding: int = 0) -> None:
    """Ragged rows on different pasts, with padding behind them."""
    pasts, tokens = (0, 7, 3), sum(LENGTHS) + padding
    rows = [row for row, length in enumerate(LENGTHS) for _ in range(length)] + [-1] * padding
    slots = [past + i for past, length in zip(pasts, LENGTHS) for i in range(length)] + [99999] * padding
    qkv = make.normal(tokens, (heads + 2 * kv_heads) * dim)
    keys, values = make.normal(3, kv_heads, 16, dim), make.normal(3, kv_heads, 16, dim)
    cos, sin = make.angles(16, dim // 2) if tables else (None, None)
    options: dict[str, Any] = {"heads": heads, "cos": cos, "sin": sin}
    expected = reference(qkv, keys, values, make.ints(*rows), make.ints(*slots), **options)
    rotary_append(qkv, keys, values, make.ints(*rows), make.ints(*slots), **options)
    for actual, wanted in zip((qkv, keys, values), expected):
        assert_close(actual, wanted, TOLERANCES[make.dtype])


@pytest.mark.parametrize("dim", [24, 64, 80])
@pytest.mark.parametrize("tables", [True, False])
def test_agrees_with_the_reference(make: Maker, dim: int, tables: bool) -> None:
    check(make, 6, 2, dim, tables)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (8, 1), (7, 7)])
def test_heads_of_any_number(device: Any, heads: int, kv_heads: int) -> None:
    check(Maker(device), heads, kv_heads, 16, True)


def test_padding_touches_nothing(make: Maker) -> None:
    """Its slot lies far outside the cache and the tables."""
    check(make, 4, 2, 16, True, padding=3)


def test_without_tables_values_are_copied_exactly(make: Maker) -> None:
    qkv, cache = make.normal(1, 3 * 16), make.poison(1, 1, 4, 16)
    other, before = cache.clone(), qkv.clone()
    rotary_append(qkv, cache, other, make.ints(0), make.ints(2), heads=1)
    assert torch.equal(qkv, before)
    assert torch.equal(cache[0, 0, 2], before[0, 16:32]) and torch.equal(other[0, 0, 2], before[0, 32:])
    assert cache.isnan().sum() == other.isnan().sum() == 3 * 16, "only the token's slot is written"
