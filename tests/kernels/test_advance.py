from __future__ import annotations

import pytest

from tests.kernels.comparing import Maker

torch = pytest.importorskip("torch")
from accel_kernels.advance import advance  # noqa: E402


def test_rows_that_take_part_move_on(make: Maker) -> None:
    """The others keep their position and their negative length; the inputs beyond the rows stay as they are.

    The host is told in two places by turns, in memory of its own.
    """
    device = make.device
    best = torch.tensor([7, 8, 9, 70, 80, 90], device=device)
    told = torch.zeros(12, dtype=torch.int64, pin_memory=torch.device(device).type == "cuda")
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    ids, positions = torch.zeros(4, dtype=torch.int64, device=device), torch.tensor([3, 0, 5, 77], device=device)
    lengths = torch.tensor([3, -1, 5, 77], dtype=torch.int32, device=device)
    advance(best, ids[:3], positions[:3], lengths[:3], told, turn)
    assert ids.tolist() == [7, 8, 9, 0]
    assert positions.tolist() == [4, 0, 6, 77] and lengths.tolist() == [4, -1, 6, 77]
    assert turn.tolist() == [1] and told.tolist() == [*best.tolist(), *[0] * 6]
    best += 1
    advance(best, ids[:3], positions[:3], lengths[:3], told, turn)
    assert turn.tolist() == [0] and told.tolist() == [7, 8, 9, 70, 80, 90, *best.tolist()]
