"""What waits for its reader."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this system")
from accel_kernels.device import INTERPRETED  # noqa: E402

from accel.engines.cuda import values  # noqa: E402
from accel.engines.cuda.values import Rows  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter; on a GPU the engine's tests do")


def rows(height: int, *ids: int, axes: int = 2) -> Rows:
    shape = (1,) * (axes - 1) + (len(ids),)
    return Rows(torch.randn(height, 8), torch.tensor(ids).reshape(shape))


def test_words_segments_and_positions_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Rows(torch.randn(20, 8), torch.tensor([[3, 1, 4], [1, 5, 9]]))
    segments = Rows(torch.randn(2, 8), torch.tensor([[0, 0, 1], [0, 1, 1]]))
    positions = rows(6, 0, 1, 2)
    both = words.joined(segments)
    assert both is not None
    whole = both.joined(positions)
    assert whole is not None and whole.joined(rows(6, 0, 1, 2)) is None, "a kernel reads three tables"
    calls = []
    launch = values.gather
    monkeypatch.setattr(values, "gather", lambda *given, **named: calls.append(1) or launch(*given, **named))
    expected = words.table[words.ids] + segments.table[segments.ids] + positions.table[positions.ids]
    assert torch.allclose(whole.tensor(), expected, atol=1e-6) and len(calls) == 1
    assert whole.shape == expected.shape


def test_rows_that_one_kernel_cannot_read_stay_apart() -> None:
    words, positions = Rows(torch.randn(20, 8), torch.tensor([[3, 1, 4], [1, 5, 9]])), rows(6, 0, 1, 2)
    assert positions.joined(words) is None, "the longer one is read row by row"
    assert words.joined(Rows(torch.randn(6, 8).half(), positions.ids)) is None
    positions.tensor()
    assert words.joined(positions) is None, "it was read already"
