from __future__ import annotations

import numpy as np
import pytest

from accel.bench.stats import paired_ratio, upper_bound


def test_ratio_is_paired_per_round_so_slow_rounds_cancel() -> None:
    slow = np.array([1.0, 1.0, 10.0, 1.0, 10.0])
    ratio = paired_ratio(0.8 * slow, slow)
    assert ratio.median == pytest.approx(0.8)
    assert ratio.upper == pytest.approx(0.8)
    assert ratio.rounds == 5


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    assert paired_ratio([1.0, 2.0, 9.0], [2.0, 1.0, 3.0]).median == pytest.approx(2.0)


def test_upper_bound_lies_above_the_median_and_shrinks_with_rounds() -> None:
    values = np.random.default_rng(3).normal(1.0, 0.1, 400)
    few, many = upper_bound(values[:15]), upper_bound(values)
    assert np.median(values[:15]) < few < values[:15].max()
    assert many - np.median(values) < few - np.median(values[:15])


def test_upper_bound_covers_the_true_median_in_about_95_percent_of_samples() -> None:
    generator = np.random.default_rng(0)
    covered = sum(upper_bound(generator.normal(1.0, 0.05, 15)) >= 1.0 for _ in range(200))
    assert 0.90 <= covered / 200 <= 0.995


def test_upper_bound_is_reproducible() -> None:
    values = [1.0, 1.1, 0.9, 1.3, 1.2]
    assert upper_bound(values) == upper_bound(values)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([], [])])
def test_rounds_that_do_not_pair_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="do not pair"):
        paired_ratio(ours, theirs)
