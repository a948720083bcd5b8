"""Packed steps cut into padded runs: every token runs once, in order, and nothing that a row holds is overwritten."""

from __future__ import annotations

import numpy as np
import pytest

from accel.engines.padded import PaddedStep, StepPadder
from accel.engines.session import StepInputs


class Rows:
    """Cache rows of token ids, written as an engine would write them."""

    def __init__(self, rows: int, capacity: int, **options: object) -> None:
        options = {"batches": [rows], **options}
        self.padder = StepPadder(rows, capacity, **options)  # type: ignore[arg-type]
        self.slots = np.full((rows, capacity), -1, np.int64)
        self.past = np.zeros(rows, np.int32)
        self.runs: list[PaddedStep] = []

    def step(self, *rows: list[int], wanted: list[int] | None = None) -> np.ndarray:
        """Runs each row's tokens; returns for each wanted token the id that its logits would be of."""
        lengths = np.array([len(row) for row in rows], np.int32)
        ids = np.array([token for row in rows for token in row], np.int64)
        positions = np.concatenate([np.arange(past, past + n) for past, n in zip(self.past, lengths)])
        asked = np.arange(len(ids)) if wanted is None else np.array(wanted, np.int64)
        past = np.where(lengths > 0, self.past, 0).astype(np.int32)  # nobody says what a waiting row holds
        found = np.full(len(asked), -1, np.int64)
        for run in self.padder.split(StepInputs(ids, positions, lengths, past, asked)):
            self.runs.append(run)
            batch, width = run.input_ids.shape
            for row in range(batch):
                start = int(run.write_index[row])
                assert start >= 0 and start + width <= self.slots.shape[1]
                self.slots[run.first + row, start : start + width] = run.input_ids[row]
            kept = run.wanted >= 0
            found[run.wanted[kept]] = run.input_ids.reshape(-1)[run.logits_positions[kept]]
        self.past += lengths
        return found

    def held(self) -> list[list[int]]:
        return [slots[:past].tolist() for slots, past in zip(self.slots, self.past)]


def test_prompts_run_alone_and_decoding_rows_together() -> None:
    rows = Rows(3, 16)
    assert rows.step([1, 2, 3], [4], [5, 6]).tolist() == [1, 2, 3, 4, 5, 6]
    assert [run.input_ids.shape for run in rows.runs] == [(3, 1), (1, 3), (1, 2)]
    assert rows.step([7], [8], [9]).tolist() == [7, 8, 9]
    assert rows.held() == [[1, 2, 3, 7], [4, 8], [5, 6, 9]]


def test_waiting_rows_keep_what_they_hold() -> None:
    rows = Rows(4, 8)
    rows.step([1, 2], [3, 4, 5], [6], [])
    for token in (7, 8, 9):
        rows.step([token], [], [token + 10], [])
    assert rows.held() == [[1, 2, 7, 8, 9], [3, 4, 5], [6, 17, 18, 19], []]


def test_a_full_row_waits_beside_others() -> None:
    rows = Rows(2, 4)
    rows.step([1, 2, 3, 4], [5])
    rows.step([], [6])
    assert rows.held()[1] == [5, 6]


def test_widths_and_their_end_at_the_capacity() -> None:
    rows = Rows(1, 10, widths=[4, 8])
    rows.step([1, 2, 3])
    rows.step([4, 5, 6])
    rows.step([7, 8, 9])  # 8 slots would not fit behind 6
    assert [run.input_ids.shape[1] for run in rows.runs] == [4, 4, 4]
    rows = Rows(1, 8, widths=[4, 8])
    rows.step([1, 2, 3, 4, 5, 6])
    rows.step([7, 8])
    assert [run.input_ids.shape[1] for run in rows.runs] == [8, 2]
    assert rows.held() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_many_logits_take_several_runs(limit: int) -> None:
    rows = Rows(1, 32, max_logits=limit)
    assert rows.step(list(range(1, 11)), wanted=[0, 3, 4, 8, 9]).tolist() == [1, 4, 5, 9, 10]
    assert all(len(run.logits_positions) <= limit for run in rows.runs)
    assert rows.held() == [list(range(1, 11))]


def test_long_prompts_are_cut() -> None:
    rows = Rows(2, 32, max_tokens=4)
    assert rows.step([], list(range(10)), wanted=[9]).tolist() == [9]
    assert [run.input_ids.shape[1] for run in rows.runs] == [4, 4, 2]
    assert rows.held()[1] == list(range(10))


def test_batches() -> None:
    rows = Rows(5, 16, batches=[1, 2, 4, 8])
    rows.step([1], [], [], [], [])
    rows.step([], [], [], [2], [3])
    rows.step([4], [], [5], [], [])
    assert [(run.first, len(run.input_ids)) for run in rows.runs] == [(0, 1), (3, 2), (0, 4)]
    assert rows.held() == [[1, 4], [], [5], [2], [3]]


def test_batches_begin_at_row_0_unless_that_needs_a_larger_one() -> None:
    """So that a batch is nearly always the same run over the same rows."""
    rows = Rows(4, 16, batches=[1, 2, 4])
    for step in ([[], [1], [], []], [[], [2], [3], []], [[], [4], [], [5]], [[6], [], [7], []], [[8], [9], [], []]):
        rows.step(*step)
    assert [(run.first, len(run.input_ids)) for run in rows.runs] == [(1, 1), (1, 2), (0, 4), (0, 4), (0, 2)]
    rows.step([], [10], [11], [12])
    assert (rows.runs[-1].first, len(rows.runs[-1].input_ids)) == (0, 4)
    assert rows.held() == [[6, 8], [1, 2, 4, 9, 10], [3, 7, 11], [5, 12]]


def test_first_prompts_run_side_by_side() -> None:
    """Neighbours of about one length, as many as a run may hold; what one of them left over does no harm."""
    rows = Rows(4, 16, side_by_side=12, max_logits=8)
    found = rows.step([1, 2, 3, 4], [5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15], wanted=[3, 6, 9, 14])
    assert found.tolist() == [4, 7, 10, 15]
    assert [(run.first, run.input_ids.shape) for run in rows.runs] == [(0, (3, 4)), (3, (1, 5))]
    rows.step([16], [17], [18], [19])
    assert rows.held() == [[1, 2, 3, 4, 16], [5, 6, 7, 17], [8, 9, 10, 18], [11, 12, 13, 14, 15, 19]]


@pytest.mark.parametrize(
    ("lengths", "wanted", "runs"),
    [
        ([2, 0, 2, 2], [1], [(1, 2), (2, 2)]),  # no neighbours
        ([2, 5, 5, 0], [11], [(1, 2), (2, 5)]),  # a third would be padding
        ([4, 4, 4, 4], [15], [(3, 4), (1, 4)]),  # more than a run may hold
        ([3, 3, 3, 0], list(range(9)), [(2, 3), (1, 3)]),  # more logits than a run gives
        ([3, 3, 0, 0], [], [(2, 3)]),
    ],
)
def test_who_runs_side_by_side(lengths: list[int], wanted: list[int], runs: list[tuple[int, int]]) -> None:
    rows = Rows(4, 16, side_by_side=12, max_logits=8)
    prompts = [list(range(10 * row, 10 * row + length)) for row, length in enumerate(lengths)]
    flat = [token for prompt in prompts for token in prompt]
    assert rows.step(*prompts, wanted=wanted).tolist() == [flat[place] for place in wanted]
    assert [run.input_ids.shape for run in rows.runs] == runs
    assert rows.held() == prompts


def test_later_chunks_run_alone() -> None:
    rows = Rows(2, 16, side_by_side=12)
    rows.step([1, 2], [3, 4])
    rows.step([5, 6], [7, 8])
    assert [run.input_ids.shape for run in rows.runs] == [(2, 2), (1, 2), (1, 2)]
    assert rows.held() == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_a_copied_row() -> None:
    rows = Rows(2, 8)
    rows.step([1, 2, 3, 4], [])
    rows.slots[1, :3] = rows.slots[0, :3]
    rows.padder.copied(0, 1, 3)
    rows.past[1] = 3
    rows.step([5], [])  # row 1 waits
    rows.step([], [6])
    assert rows.held() == [[1, 2, 3, 4, 5], [1, 2, 3, 6]]
