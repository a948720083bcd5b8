"""Cache sizes: bytes per token, defaults that fit, named errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from accel.engines import kv_cache
from accel.engines.kv_cache import CacheShape, bytes_per_token, resolve_cache
from accel.engines.session import SessionOptions
from accel.errors import CapacityError, InputError
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
    with pytest.raises(CapacityError, match=r"at most 100 positions"):
        resolve_cache(LONG, SessionOptions(capacity=101))
    assert resolve_cache(LONG, SessionOptions(capacity=100)).capacity == 100
    with_memory(monkeypatch, TOKEN)
    with pytest.raises(CapacityError, match="not one cache position fits"):
        resolve_cache(LONG, SessionOptions())


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8"])
def test_counts_are_checked(value: Any) -> None:
    with pytest.raises(InputError, match="capacity must be an integer"):
        resolve_cache(ARCH, SessionOptions(capacity=value))
    with pytest.raises(InputError, match="max_batch must be an integer"):
        resolve_cache(ARCH, SessionOptions(max_batch=value))
