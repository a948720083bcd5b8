"""Steps over a few rows of one sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel.engines.ort_cuda.decoder import OrtCudaDecoderSession
from accel.engines.session import StepInputs

ROWS, CAPACITY, LIMIT = 3, 64, 5e-5
IDS = np.random.default_rng(1).integers(0, 250, 48)


def inputs(rows: list[tuple[int, int, int]], wanted: list[int], count: int = ROWS) -> StepInputs:
    """IDS[start:stop] in each given row (row, start, stop), with ``start`` tokens in its cache."""
    query, past = np.zeros(count, np.int32), np.zeros(count, np.int32)
    positions: list[int] = []
    for row, start, stop in rows:
        query[row], past[row] = stop - start, start
        positions += range(start, stop)
    return StepInputs(IDS[positions], np.array(positions), query, past, np.array(wanted, np.int64))


def step(session: OrtCudaDecoderSession, rows: list[tuple[int, int, int]], wanted: list[int]) -> NDArray[np.float32]:
    return session.step(inputs(rows, wanted, session.max_batch))
