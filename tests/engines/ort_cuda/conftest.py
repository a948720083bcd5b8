"""The tiny decoder's bundle. And no GPU draws tokens here, nor does the interpreter unless a test says so.

Opening a session would take seconds; on a GPU tests/parity/test_gpu_engines.py does.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.ort_cuda import decoder
from accel.engines.session import ChosenTokens, SessionOptions, StepInputs
from accel.variants import add_variant
from tests.engines.ort_cuda.steps import CAPACITY, IDS


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


@pytest.fixture(scope="module")
def bundle(tiny_decoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(tiny_decoder_bundle, tmp_path_factory.mktemp("ort_cuda") / "bundle")
    return add_variant(folder, "fp32", target="ort-cuda", check=False)


@pytest.fixture(scope="module")
def logits(bundle: Bundle) -> NDArray[np.float32]:
    """Of IDS, from the fp32 engine."""
    session: Any = open_session(bundle, engine="ort-cpu", options=SessionOptions(1, CAPACITY, 1)).session
    one = np.array([len(IDS)], np.int32)
    found = session.step(StepInputs(IDS, np.arange(len(IDS)), one, 0 * one, np.arange(len(IDS)))).copy()
    session.close()
    return found  # type: ignore[no-any-return]
