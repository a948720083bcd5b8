"""No GPU draws tokens here, nor does the interpreter unless a test says so: opening a session would take seconds.

On a GPU tests/parity/test_gpu_engines.py does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.engines.ort_cuda import decoder
from accel.engines.session import ChosenTokens


class FirstToken:
    """Always draws token 0."""

    def draw(self, table: NDArray[np.float64]) -> ChosenTokens:
        return ChosenTokens(np.zeros(len(table), np.int64), np.zeros(len(table), np.float32))

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_drawer(*_: Any) -> FirstToken:
        return FirstToken()

    monkeypatch.setattr(decoder, "open_drawer", open_drawer)
