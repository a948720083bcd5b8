from __future__ import annotations

import numpy as np

from accel.engines.ort_cuda.feeds import mask_feeds, step_feeds
from accel.engines.padded import PaddedStep


def step(ids: list[list[int]], write: list[int]) -> PaddedStep:
    array = np.array(ids)
    return PaddedStep(0, array, array + 100, np.array(write), np.arange(array.size), np.arange(array.size))


def test_rows_of_one_token() -> None:
    feeds = step_feeds(step([[5], [6], [7]], [4, 0, 9]))
    assert feeds["input_ids"].tolist() == [5, 6, 7] and feeds["position_ids"].tolist() == [105, 106, 107]
    assert feeds["step_shape"].tolist() == [3, 1, -1]
    assert feeds["seqlens_k"].tolist() == [4, 0, 9] and feeds["seqlens_k"].dtype == np.int32
    assert feeds["total_length"] == 10 and feeds["total_length"].shape == ()


def test_a_row_alone_counts_its_padding() -> None:
    feeds = step_feeds(step([[5, 6, 7, 0]], [8]))
    assert feeds["step_shape"].tolist() == [1, 4, -1]
    assert feeds["seqlens_k"].tolist() == [11] and feeds["total_length"] == 12


def test_padding_on_the_right_is_a_length() -> None:
    feeds = mask_feeds(np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]]))
    assert feeds["key_mask"].tolist() == [3, 1, 1], "a row of padding sees one key"
    assert feeds["key_mask_shape"].tolist() == [3]


def test_holes_and_padding_on_the_left_are_a_mask() -> None:
    mask = np.array([[1, 0, 1], [0, 1, 1]])
    feeds = mask_feeds(mask)
    assert feeds["key_mask"].tolist() == [1, 0, 1, 0, 1, 1] and feeds["key_mask_shape"].tolist() == [2, 3]
