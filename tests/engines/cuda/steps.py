"""Steps of a small decoder on the cuda engine."""

from __future__ import annotations

import numpy as np
import pytest

from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.session import StepInputs

ROWS, CAPACITY = 3, 48


def inputs(tokens: dict[int, list[int]], past: dict[int, int], wanted: list[int] | None = None) -> StepInputs:
    """A step of these rows' tokens; by default each row's last token's logits are wanted."""
    lengths, pasts = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
    for row, ids in tokens.items():
        lengths[row], pasts[row] = len(ids), past.get(row, 0)
    ids = [token for row in sorted(tokens) for token in tokens[row]]
    positions = [past.get(row, 0) + place for row in sorted(tokens) for place in range(len(tokens[row]))]
    ends = np.cumsum([len(tokens[row]) for row in sorted(tokens)]) - 1
    return StepInputs(np.array(ids), np.array(positions), lengths, pasts, np.array(ends if wanted is None else wanted))


def count_runs(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one per run of the program."""
    runs: list[int] = []
    run = session._executor.run
    monkeypatch.setattr(session._executor, "run", lambda *args: (runs.append(1), run(*args))[1])
    return runs
