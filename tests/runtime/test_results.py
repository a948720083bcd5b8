"""Timings add up, and the derived figures are what their names say."""

from __future__ import annotations

import pytest

from accel.runtime.results import Timings, TruncationReport


def test_parts_add_up_to_the_total() -> None:
    timings = Timings.measured(total=2.0, compute=1.25, prepost=0.5, first_token=0.5, steps=4, tokens=4)
    assert timings.system == 0.25
    assert timings.compute + timings.prepost + timings.system == timings.total


def test_derived_figures() -> None:
    timings = Timings.measured(total=2.0, compute=1.25, prepost=0.5, first_token=0.5, steps=4, tokens=4)
    assert timings.per_token == pytest.approx(0.5)  # 1.5 s for the three tokens after the first
    assert timings.tokens_per_second == pytest.approx(2.0)
    assert timings.overhead_per_step == pytest.approx(0.1875)


def test_figures_that_do_not_exist_are_none() -> None:
    encoder = Timings.measured(total=1.0, compute=0.5, prepost=0.1)
    assert encoder.per_token is None
    assert encoder.tokens_per_second is None
    assert encoder.overhead_per_step is None
    assert Timings.measured(1.0, 0.5, 0.1, first_token=1.0, steps=1, tokens=1).per_token is None


def test_sum_of_two_calls() -> None:
    first = Timings.measured(1.0, 0.5, 0.25, first_token=0.3, steps=2, tokens=2)
    second = Timings.measured(3.0, 2.0, 0.5, first_token=0.7, steps=5, tokens=4)
    assert first + second == Timings(4.0, 2.5, 0.75, 0.75, 0.3, 7, 6)


def test_truncation_report_names_the_texts() -> None:
    report = TruncationReport.of([False, True, False, True], max_length=256)
    assert report.indices == (1, 3)
    assert bool(report)
    assert str(report) == "2 of 4 texts were cut to 256 tokens"
    assert not TruncationReport.of([False, False], max_length=256)
