from __future__ import annotations

import numpy as np
import pytest

from accel.quality.statistics import cosines, mean_ranks, paired_difference, rank_correlation, t_quantile


def test_blocks_of_one_token_give_the_plain_interval() -> None:
    values = np.random.default_rng(0).normal(0.3, 2.0, 50)
    difference, interval = paired_difference([np.array([value]) for value in values])
    error = values.std(ddof=1) / np.sqrt(50)
    assert difference == pytest.approx(values.mean())
    assert interval == pytest.approx((values.mean() - 2.0096 * error, values.mean() + 2.0096 * error), abs=1e-4)


def test_what_repeats_inside_a_block_adds_no_certainty() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, 30)
    once = paired_difference([np.array([value]) for value in values])
    often = paired_difference([np.full(40, value) for value in values])
    assert once[1] is not None and often[1] is not None
    assert often[1] == pytest.approx(once[1])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Blocks of unequal length with an effect of their own; an interval that takes tokens as independent fails this."""
    generator = np.random.default_rng(2)
    held = naive = 0
    for _ in range(400):
        lengths = generator.integers(5, 80, 40)
        blocks = [generator.normal(0, 0.5) + generator.normal(0, 1.0, size) for size in lengths]
        _, interval = paired_difference(blocks)
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
        tokens = np.concatenate(blocks)
        naive += abs(tokens.mean()) <= 1.96 * tokens.std() / np.sqrt(tokens.size)
    assert 0.92 <= held / 400 <= 0.98
    assert naive / 400 < 0.7


def test_few_blocks_have_no_interval() -> None:
    blocks = [np.array([1.0, 2.0])] * 4
    assert paired_difference(blocks) == (1.5, None)
    assert paired_difference([*blocks, np.array([4.0])])[1] is not None


@pytest.mark.parametrize("freedom,expected", [(4, 2.7764), (10, 2.2281), (39, 2.0227), (1000, 1.9623)])
def test_quantiles_of_t_as_tables_have_them(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-3)


def test_ranks_of_equal_values_are_shared() -> None:
    assert mean_ranks(np.array([10, 20, 20, 5, 20])).tolist() == [2, 4, 4, 1, 4]


def test_rank_correlation() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1.0)
    assert rank_correlation(a, -(a**3)) == pytest.approx(-1.0)
    assert rank_correlation(a, np.array([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(1 - 6 * 4 / (5 * 24))  # no ties
    tied = np.array([1.0, 1.0, 2.0, 3.0, 3.0])
    expected = np.corrcoef([1, 2, 3, 4, 5], [1.5, 1.5, 3, 4.5, 4.5])[0, 1]
    assert rank_correlation(a, tied) == pytest.approx(expected)
    assert rank_correlation(a, np.ones(5)) is None and rank_correlation(a[:1], a[:1]) is None


def test_cosines_row_by_row() -> None:
    a = np.array([[1, 0], [1, 1], [0, 0], [0, 0], [3, 4]], np.float32)
    b = np.array([[0, 2], [2, 2], [0, 0], [1, 0], [-3, -4]], np.float32)
    np.testing.assert_allclose(cosines(a, b), [0, 1, 1, 0, -1], atol=1e-12)
