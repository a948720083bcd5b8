"""What waits for its reader."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this system")
from accel_kernels.device import INTERPRETED  # noqa: E402
from accel_kernels.tiles import LAYER_NORM  # noqa: E402

from accel.engines.cuda import values  # noqa: E402
from accel.engines.cuda.values import Normed, Rows  # noqa: E402

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


@pytest.mark.parametrize("biased", [False, True])
def test_a_norm_of_rows_reads_them_itself(biased: bool) -> None:
    words = Rows(torch.randn(20, 8), torch.tensor([[3, 1], [1, 5]]))
    segments = Rows(torch.randn(2, 8), torch.tensor([[0, 1], [1, 0]]))
    both = words.joined(segments)
    assert both is not None
    weight, bias = torch.randn(8), torch.randn(8) if biased else None
    result = both.normalized(Normed(torch.empty(0), weight, bias, 1e-5, LAYER_NORM), torch.float16)
    sums = words.table[words.ids] + segments.table[segments.ids]
    expected = torch.nn.functional.layer_norm(sums, (8,), weight, bias, 1e-5)
    assert result.dtype == torch.float16 and torch.allclose(result.float(), expected, atol=4e-3)
    assert both.result is None, "the sums are not written down"
