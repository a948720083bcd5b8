"""Micro-batches cover every text once, stay in their budget, and are padded on the right."""

from __future__ import annotations

import time

import numpy as np
import pytest

from accel.runtime.batching import PADDING_SHARE, PADDING_TOKENS, Stopwatch, build_feeds, plan_batches, waves


def test_plan_covers_each_text_once_within_the_budget_longest_first() -> None:
    lengths = np.random.default_rng(0).integers(3, 260, 500).tolist()
    batches = plan_batches(lengths, token_budget=384)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    sizes = [[lengths[i] for i in batch] for batch in batches]
    assert [rows[0] for rows in sizes] == sorted((max(rows) for rows in sizes), reverse=True)
    for rows in sizes:
        assert len(rows) == 1 or len(rows) * max(rows) <= 384
        assert max(rows) - min(rows) <= max(PADDING_TOKENS, max(rows) * PADDING_SHARE)


def test_a_text_longer_than_the_budget_stands_alone() -> None:
    assert [batch.tolist() for batch in plan_batches([900, 10, 900, 10], token_budget=384)] == [[0], [2], [1, 3]]


def test_without_padding_only_equal_lengths_share() -> None:
    batches = plan_batches([10, 9, 10, 10, 9], token_budget=20, pad=False)
    assert [batch.tolist() for batch in batches] == [[0, 2], [3], [1, 4]]


def test_batch_size_overrides_the_budget() -> None:
    assert [batch.tolist() for batch in plan_batches([1, 9, 500, 2, 8], batch_size=2)] == [[2, 1], [4, 3], [0]]


def test_waves_bound_what_is_held() -> None:
    lengths = [10] * 8
    batches = plan_batches(lengths, batch_size=2)  # 20 tokens each
    assert [len(wave) for wave in waves(batches, lengths, 4, limit=160)] == [2, 2]
    assert [len(wave) for wave in waves(batches, lengths, 4, limit=1)] == [1, 1, 1, 1]


def test_rows_of_one_length_need_no_mask() -> None:
    rows = [([5, 6], [0, 1], False), ([9], [0], False), ([7, 8], [0, 0], False)]
    feeds, mask = build_feeds(rows, [2, 0], 0, True)
    assert mask is None
    assert feeds["input_ids"].tolist() == [[7, 8], [5, 6]]
    assert feeds["attention_mask"].tolist() == [[1, 1], [1, 1]]
    assert feeds["token_type_ids"].tolist() == [[0, 0], [0, 1]]


def test_shorter_rows_are_padded_on_the_right() -> None:
    rows = [([5, 6], [0, 1], False), ([9], [1], False)]
    feeds, mask = build_feeds(rows, [0, 1], 77, True)
    assert mask is feeds["attention_mask"]
    assert feeds["input_ids"].tolist() == [[5, 6], [9, 77]]
    assert feeds["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert feeds["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    assert {value.dtype for value in feeds.values()} == {np.dtype(np.int64)}
    assert "token_type_ids" not in build_feeds(rows, [0, 1], 77, False)[0]


def test_stopwatch_splits_the_whole() -> None:
    watch = Stopwatch()
    time.sleep(0.01)
    watch.lap_prepost()
    time.sleep(0.03)
    watch.lap_compute(3)
    time.sleep(0.02)
    watch.lap_system()
    time.sleep(0.01)
    watch.lap_prepost()
    timings = watch.timings
    assert timings.compute >= 0.03 and timings.prepost >= 0.02 and timings.system >= 0.02
    assert timings.total == pytest.approx(timings.compute + timings.prepost + timings.system)
    assert timings.steps == 3
