"""Pooling, normalisation and similarity against loops over single rows, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from accel.errors import InputError
from accel.runtime.pooling import POOLING_MODES, normalize, parse_modes, pool, similarity

RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((3, 6, 4)).astype(np.float32)
RIGHT = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], np.int64)
LEFT = RIGHT[:, ::-1].copy()


def by_hand(vectors: np.ndarray, weights_from: int, mode: str) -> np.ndarray:
    """``vectors`` [n, H] are the pooled tokens of one row; the first stands at position ``weights_from`` (from 1)."""
    if mode == "cls":
        return vectors[0]
    if mode == "lasttoken":
        return vectors[-1]
    if mode == "max":
        return vectors.max(axis=0)
    if mode == "weightedmean":
        weights = np.arange(weights_from, weights_from + len(vectors), dtype=np.float64)
        return (weights[:, None] * vectors).sum(axis=0) / weights.sum()
    return vectors.sum(axis=0) / (len(vectors) if mode == "mean" else np.sqrt(len(vectors)))


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["whole", "right", "left"])
def test_each_mode_pools_the_kept_tokens(mode: str, mask: np.ndarray | None) -> None:
    kept = np.ones((3, 6), bool) if mask is None else mask.astype(bool)
    poisoned = np.where(kept[..., None], HIDDEN, np.float32(1e4))
    result = pool(poisoned, mask, (mode,))
    expected = np.stack([by_hand(HIDDEN[b][kept[b]], 1, mode) for b in range(3)])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_a_prompt_is_left_out_and_keeps_the_weights_of_the_rest(mode: str) -> None:
    mask = RIGHT[:2]
    result = pool(HIDDEN[:2], mask, (mode,), prompt_length=2)
    expected = np.stack([by_hand(HIDDEN[b][2 : mask[b].sum()], 3, mode) for b in range(2)])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert mask[:, 0].tolist() == [1, 1]  # the caller's mask stays as it was


def test_a_prompt_is_left_out_behind_left_padding_and_without_a_mask() -> None:
    left = pool(HIDDEN[:2], LEFT[:2], ("mean",), prompt_length=1)
    np.testing.assert_allclose(left[1], HIDDEN[1, 4:].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(pool(HIDDEN, None, ("mean",), 2), HIDDEN[:, 2:].mean(axis=1), rtol=1e-5, atol=1e-6)


def test_a_row_of_nothing_but_prompt_becomes_zero() -> None:
    for mode in ("mean", "lasttoken", "weightedmean"):
        assert not pool(HIDDEN[2:], RIGHT[2:], (mode,), prompt_length=3).any()


def test_several_modes_are_concatenated_in_the_given_order() -> None:
    both = pool(HIDDEN, RIGHT, ("max", "cls"))
    np.testing.assert_array_equal(both[:, :4], pool(HIDDEN, RIGHT, ("max",)))
    np.testing.assert_array_equal(both[:, 4:], HIDDEN[:, 0])


def test_parse_modes() -> None:
    assert parse_modes("mean") == ("mean",)
    assert parse_modes(["mean_sqrt_len", "cls"]) == ("mean_sqrt_len_tokens", "cls")
    for bad in ("average", [], ["mean", 3]):
        with pytest.raises(InputError, match="pooling mode.*weightedmean"):
            parse_modes(bad)  # type: ignore[arg-type]


def test_normalize_keeps_zero_rows() -> None:
    result = normalize(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(result, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_similarities() -> None:
    a, b = np.array([[1, 0], [1, 1]], np.float32), np.array([[2, 0], [0, 3], [-1, -1]], np.float32)
    root = np.sqrt(0.5)
    np.testing.assert_allclose(similarity(a, b, "cosine"), [[1, 0, -root], [root, root, -1]], atol=1e-6)
    np.testing.assert_allclose(similarity(a, b, "dot"), [[2, 0, -1], [2, 3, -2]])
    np.testing.assert_allclose(similarity(a, b, "manhattan"), [[-1, -4, -3], [-2, -3, -4]])
    expected = [[-1, -np.sqrt(10), -np.sqrt(5)], [-np.sqrt(2), -np.sqrt(5), -np.sqrt(8)]]
    np.testing.assert_allclose(similarity(a, b, "euclidean"), expected, rtol=1e-6)
