"""Bundles of the tiny families, each exported once per test run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import accel
from tests.parity.families import ALL, build_model


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Models of 64 columns gain nothing from more, and the workers of pytest-xdist share the cores."""
    torch.set_num_threads(1)


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """The unchanged model of this name; do not change it."""
    return build_model(name)


@pytest.fixture(scope="session")
def bundle_of(made_once: Callable[[str, Callable[[Path], Any]], Path]) -> Callable[[str], Path]:
    """``bundle_of(name)``: the family's model, exported from memory. Read-only."""

    def get(name: str) -> Path:
        return made_once(
            f"family_{name}", lambda out: accel.export(model_of(name), out, task=ALL[name].task, show_progress=False)
        )

    return get


@pytest.fixture(scope="session")
def plain_model() -> Callable[[str], PreTrainedModel]:
    """``plain_model(name)``: the model that ``bundle_of(name)`` was exported from."""
    return model_of
