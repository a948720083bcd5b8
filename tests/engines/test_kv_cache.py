"""Cache sizes: bytes per token, defaults that fit, named errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from accel.engines import kv_cache
from accel.engines.kv_cache import (
    CacheShape,
    bytes_per_token,
    no_room_for_cache,
    resolve_cache,
    resolve_gpu_cache,
    what_fits,
)
from accel.engines.session import SessionOptions
from accel.errors import CapacityError, EngineError, EngineUnavailableError, InputError
from accel.spec import AttentionSpec
from tests.engines.tiny_llama import ARCH

LAYERS = (AttentionSpec(8, 2, 64, 0.125, causal=True), AttentionSpec(8, 4, 128, 0.125, causal=True))
LONG = dataclasses.replace(ARCH, layers=LAYERS, max_positions=131072)
TOKEN = 2 * 4 * (2 * 64 + 4 * 128)  # keys and values, float32


def with_memory(monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    monkeypatch.setattr(kv_cache, "available_memory", lambda: available)


def test_bytes_per_token_follow_each_layer() -> None:
    assert bytes_per_token(LONG) == TOKEN == 5120
    assert bytes_per_token(LONG, item_bytes=1) == TOKEN // 4


@pytest.mark.parametrize(
    ("available", "expected"), [(None, 4096), (1 << 40, 4096), (2 * 8 * TOKEN * 1000, 1000), (2 * 8 * TOKEN, 1)]
)
def test_the_default_fits_in_half_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, available: int | None, expected: int
) -> None:
    with_memory(monkeypatch, available)
    assert resolve_cache(LONG, SessionOptions()) == CacheShape(8, expected)


def test_the_default_stays_within_the_models_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1 << 40)
    assert resolve_cache(ARCH, SessionOptions(max_batch=3)) == CacheShape(3, ARCH.max_positions)


def test_more_than_the_default_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1 << 40)
    assert resolve_cache(LONG, SessionOptions(capacity=131072)).capacity == 131072


def test_too_much_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 8 * TOKEN * 100)
    with pytest.raises(CapacityError, match="exceeds the 131,072 positions"):
        resolve_cache(LONG, SessionOptions(capacity=131073))
    both = "Ask for a capacity of at most 100 with max_batch 8, or for a max_batch of at most 7 with capacity 101"
    with pytest.raises(CapacityError, match=both):
        resolve_cache(LONG, SessionOptions(capacity=101))
    assert resolve_cache(LONG, SessionOptions(capacity=100)).capacity == 100
    for positions, fits in ((14, "a max_batch of at most 7, or free memory"), (1, "not one position of one row fits")):
        with_memory(monkeypatch, positions * TOKEN)
        with pytest.raises(CapacityError, match=f"not one cache position fits.*{fits}"):
            resolve_cache(LONG, SessionOptions())


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (30, "Ask for a capacity of at most 3 with max_batch 8, or for a max_batch of at most 3 with capacity 10"),
        (8, "Ask for a capacity of at most 1 with max_batch 8"),
        (7, "Ask for a capacity of at most 7 with max_batch 1"),
        (0, "Free memory, or use a smaller model: not one position of one row fits"),
    ],
)
def test_what_fits_is_said_where_anything_does(positions: int, expected: str) -> None:
    assert what_fits(LONG, CacheShape(8, 10), 4, positions * TOKEN + TOKEN - 1) == expected


def test_fewer_rows_may_fit_where_no_position_of_all_rows_does() -> None:
    expected = "Ask for a max_batch of at most 7 with capacity 1"
    assert what_fits(LONG, CacheShape(8, 1), 4, 7 * TOKEN) == expected


@pytest.mark.parametrize("options", [SessionOptions(capacity=10), SessionOptions(max_batch=4)])
def test_a_gpu_is_passed_over_unless_something_was_asked_of_it(options: SessionOptions) -> None:
    assert resolve_gpu_cache(LONG, SessionOptions(), 4, 2 * 8 * TOKEN) == CacheShape(8, 1)
    with pytest.raises(CapacityError, match="Ask for a|Load with a"):
        resolve_gpu_cache(LONG, options, 4, 7 * TOKEN)
    with pytest.raises(EngineUnavailableError, match=r"not one cache position fits.*\(at GPU memory\)"):
        resolve_gpu_cache(LONG, SessionOptions(), 4, 7 * TOKEN)


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (30 * TOKEN, "capacity of at most 3 with max_batch 8, or for a max_batch of at most 3 with capacity 10"),
        (1 << 40, "capacity of at most 5 with max_batch 8, or for a max_batch of at most 4 with capacity 10"),
        (None, "smaller capacity or max_batch"),
    ],
)
def test_what_was_counted_to_fit_and_did_not(room: int | None, said: str) -> None:
    """A count that says the same again would only fail again: half of it is advised."""
    full, shape = EngineError("the GPU's memory is full", where="loading"), CacheShape(8, 10)
    asked = no_room_for_cache(full, LONG, SessionOptions(capacity=10), shape, 4, room)
    assert isinstance(asked, CapacityError) and asked.what == full.what and asked.remedy == f"Ask for a {said}"
    unasked = no_room_for_cache(full, LONG, SessionOptions(), shape, 4, room)
    assert isinstance(unasked, EngineUnavailableError)
    assert unasked.remedy == f"Close other programs on this GPU. Ask for a {said}"


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8"])
def test_counts_are_checked(value: Any) -> None:
    with pytest.raises(InputError, match="capacity must be an integer"):
        resolve_cache(ARCH, SessionOptions(capacity=value))
    with pytest.raises(InputError, match="max_batch must be an integer"):
        resolve_cache(ARCH, SessionOptions(max_batch=value))
