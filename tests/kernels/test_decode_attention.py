from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.decode_attention import TOLERANCES, decode_attention, reference, workspace  # noqa: E402

PASTS = (0, -1, 77, 30)  # nothing cached yet, sits out, ragged
CAPACITY = 80


def check(
    make: Maker,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    splits: int = 1,
    parts: int = 0,
    pasts: tuple[int, ...] = PASTS,
    tables: bool = True,
    least: int = 16,
    **options: Any,
) -> tuple[Any, Any]:
    """One step of some rows against the reference; returns the output and the workspace's counters."""
    rows = len(pasts)
    shape = (*((parts,) if parts else ()), rows, (heads + 2 * kv_heads) * dim)
    qkv = make.normal(*shape, dtype=torch.float32 if parts else None)
    keys, values = (make.normal(rows, kv_heads, CAPACITY, dim) for _ in range(2))
    for row, past in enumerate(pasts):  # what nobody wrote yet must not be read
        keys[row, :, max(past, 0) :] = float("nan")
        values[row, :, max(past, 0) :] = float("nan")
    options = {"heads": heads, "scale": dim**-0.5, **options}
    if tables:
        options["cos"], options["sin"] = make.angles(CAPACITY, dim // 2)
    past = make.ints(*pasts)
    expected, new_keys, new_values = reference(qkv, keys, values, past, **options)
    partial, counters = workspace(rows, kv_heads, heads // kv_heads, dim, splits, make.device)
    partial.fill_(float("nan"))
    out = make.poison(rows, heads * dim)
    space = (partial, counters)
    decode_attention(qkv, keys, values, past, out, space, splits=splits, block=16, least=least, **options)
    taking_part = [row for row, past in enumerate(pasts) if past >= 0]
    assert_close(out[taking_part], expected[taking_part], TOLERANCES[make.dtype])
    idle = [row for row, past in enumerate(pasts) if past < 0]
    assert out[idle].isnan().all(), "rows that sit out are not written"
    for row, past in enumerate(pasts):
        for cache, wanted in ((keys, new_keys), (values, new_values)):
            assert_close(cache[row, :, : past + 1], wanted[row, :, : past + 1], TOLERANCES[make.dtype])
            assert cache[row, :, past + 1 :].isnan().all(), "only the new token's slot is written"
    assert not counters.any(), "counters are zero between calls"
    return out, counters


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_agrees_with_the_reference(make: Maker, splits: int) -> None:
    check(make, splits=splits)


@pytest.mark.parametrize("dim", [24, 64, 80, 128])
def test_heads_of_any_size(make: Maker, dim: int) -> None:
    check(make, dim=dim, splits=2, pasts=(40,))


@pytest.mark.parametrize("group", range(1, 9))
def test_groups_of_any_size(device: Any, group: int) -> None:
    check(Maker(device, torch.float16), heads=2 * group, splits=2, pasts=(0, 33))


def test_more_query_heads_than_a_tile_is_high(device: Any) -> None:
    check(Maker(device, torch.float16), heads=20, kv_heads=1, splits=2, pasts=(33,))


@pytest.mark.parametrize("window", [1, 16, 40, 1000])
@pytest.mark.parametrize("splits", [1, 3])
def test_sliding_windows(device: Any, window: int, splits: int) -> None:
    check(Maker(device), splits=splits, window=window)


def test_soft_caps(make: Maker) -> None:
    """A cap so low that it bends every score."""
    check(make, splits=2, softcap=0.5, window=40, scale=1.0)


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_are_added_up(make: Maker, parts: int) -> None:
    check(make, splits=2, parts=parts)


def test_without_tables(make: Maker) -> None:
    check(make, splits=2, tables=False)


def test_nobody_takes_part(device: Any) -> None:
    check(Maker(device), pasts=(-1, -1), splits=2)


def test_a_full_cache(device: Any) -> None:
    check(Maker(device), pasts=(CAPACITY - 1,), splits=4)


@pytest.mark.parametrize("least", [1, 20, 100])
def test_ranges_of_any_length(device: Any, least: int) -> None:
    check(Maker(device), splits=4, least=least)


def test_one_workspace_serves_many_steps(device: Any) -> None:
    """Tokens one after another give what one pass over all of them gives."""
    make = Maker(device)
    heads, dim, splits, steps = 2, 16, 3, 20
    qkv = make.normal(steps, 3 * heads * dim)
    keys, values = make.poison(1, heads, steps, dim), make.poison(1, heads, steps, dim)
    space, out = workspace(1, heads, 1, dim, splits, device), make.poison(steps, heads * dim)
    options = {"heads": heads, "splits": splits, "scale": 0.25, "block": 16, "least": 6}
    for step in range(steps):
        now = slice(step, step + 1)
        decode_attention(qkv[now], keys, values, make.ints(step), out[now], space, **options)
    q, k, v = qkv.double().reshape(steps, 3, heads, dim).permute(1, 2, 0, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    assert_close(out, expected.transpose(0, 1).reshape(steps, -1), TOLERANCES[torch.float32])
