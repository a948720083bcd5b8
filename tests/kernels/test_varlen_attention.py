from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.varlen_attention import TOLERANCES, reference, varlen_attention  # noqa: E402

LENGTHS = (5, 0, 22)  # one row has no tokens; nothing is a multiple of a block
PADDING = 3
BLOCKS = {"block_m": 16, "block_n": 16}


def spans(make: Maker) -> tuple[Any, Any, int, list[int]]:
    """Starts, stops, all tokens, and the tokens that belong to no row: some between rows, some behind them."""
    starts = [sum(LENGTHS[:row]) + row for row in range(len(LENGTHS))]
    stops = [start + length for start, length in zip(starts, LENGTHS)]
    tokens = stops[-1] + PADDING
    inside = {token for start, stop in zip(starts, stops) for token in range(start, stop)}
    return make.ints(*starts), make.ints(*stops), tokens, [t for t in range(tokens) if t not in inside]


def compare(make: Maker, out: Any, expected: Any, idle: list[int]) -> None:
    """The rows' tokens are right, the others were not written."""
    assert out[idle].isnan().all()
    taking_part = [token for token in range(len(out)) if token not in idle]
    assert_close(out[taking_part], expected[taking_part], TOLERANCES[make.dtype])


def check_cached(make: Maker, *, heads: int = 4, kv_heads: int = 2, dim: int = 16, **options: Any) -> None:
    """Prefill: rows on different pasts in a cache that is garbage behind them."""
    starts, stops, tokens, idle = spans(make)
    pasts = (0, 7, 21)
    query = make.normal(tokens, (heads + 2 * kv_heads) * dim)
    keys, values = (make.normal(3, kv_heads, 64, dim) for _ in range(2))
    for row, (past, length) in enumerate(zip(pasts, LENGTHS)):
        keys[row, :, past + length :] = float("nan")
        values[row, :, past + length :] = float("nan")
    out = make.poison(tokens, heads * dim)
    options = {
        "heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": dim**-0.5, "past_lengths": make.ints(*pasts),
        "causal": True, **options,
    }  # fmt: skip
    varlen_attention(query, keys, values, out, starts, stops, longest=max(LENGTHS), **BLOCKS, **options)
    compare(make, out, reference(query, keys, values, starts, stops, **options), idle)


def check_packed(make: Maker, *, heads: int = 4, kv_heads: int = 4, dim: int = 16, **options: Any) -> None:
    """Encoders: queries, keys and values are views of one tensor."""
    starts, stops, tokens, idle = spans(make)
    packed = make.normal(tokens, (heads + 2 * kv_heads) * dim)
    query, keys, values = packed.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    out = make.poison(tokens, heads * dim)
    options = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": dim**-0.5, **options}
    varlen_attention(query, keys, values, out, starts, stops, longest=max(LENGTHS), **BLOCKS, **options)
    compare(make, out, reference(query, keys, values, starts, stops, **options), idle)


def test_over_the_cache(make: Maker) -> None:
    check_cached(make)


def test_over_packed_tokens(make: Maker) -> None:
    check_packed(make)


@pytest.mark.parametrize("dim", [24, 64, 80, 128])
def test_heads_of_any_size(make: Maker, dim: int) -> None:
    check_cached(make, dim=dim, heads=2, kv_heads=1)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_groups_of_any_size(device: Any, group: int) -> None:
    check_cached(Maker(device, torch.float16), heads=group, kv_heads=1)


@pytest.mark.parametrize("window", [1, 10, 50])
def test_sliding_windows(device: Any, window: int) -> None:
    make = Maker(device)
    check_cached(make, window=window)
    check_cached(make, window=window, causal=False)
    check_packed(make, window=window)


def test_soft_caps(make: Maker) -> None:
    check_cached(make, softcap=0.5, scale=1.0)


def test_causal_without_a_cache(device: Any) -> None:
    check_packed(Maker(device), causal=True, window=9)


def test_biases(make: Maker) -> None:
    """One per head and distance, larger than the longest row."""
    check_packed(make, bias=make.normal(4, 24, 24))


def test_groups_over_packed_tokens(device: Any) -> None:
    check_packed(Maker(device), heads=6, kv_heads=2)


def test_blocks_of_two_sizes(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for block_m, block_n in ((16, 32), (32, 16), (64, 64)):
        monkeypatch.setitem(BLOCKS, "block_m", block_m)
        monkeypatch.setitem(BLOCKS, "block_n", block_n)
        check_cached(Maker(device), window=20)
        check_packed(Maker(device), window=20)


def test_room_behind_the_last_token_becomes_zero(make: Maker) -> None:
    """Padded rows: what a later layer reads there must be numbers, and no other row's tokens."""
    lengths, width, dim = (5, 0, 20), 20, 16
    starts = make.ints(*(row * width for row in range(3)))
    stops = make.ints(*(row * width + length for row, length in enumerate(lengths)))
    packed = make.normal(3 * width, 6 * dim)
    views = packed.split([2 * dim, 2 * dim, 2 * dim], 1)
    out = make.poison(3 * width, 2 * dim)
    options = {"heads": 2, "kv_heads": 2, "dim": dim, "scale": 0.25}
    varlen_attention(*views, out, starts, stops, longest=width, room=width, **BLOCKS, **options)
    expected = reference(*views, starts, stops, **options)
    for row, length in enumerate(lengths):
        first = row * width
        assert_close(out[first : first + length], expected[first : first + length], TOLERANCES[make.dtype])
        assert (out[first + length : first + width] == 0).all()
