from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel.bundle import Bundle
from tests.quality.rounded import add_rounded

MakeOnce = Callable[[str, Callable[[Path], Any]], Path]


def with_rounded(source: Path) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        shutil.copytree(source, out)
        add_rounded(add_rounded(Bundle.open(out), 8, "fine"), 3, "coarse")

    return make


@pytest.fixture(scope="session")
def rounded_decoder(made_once: MakeOnce, tiny_decoder_bundle: Path) -> Path:
    """The tiny llama with weights of 8 bits ("fine") and 3 bits ("coarse"). Read-only."""
    return made_once("rounded_decoder", with_rounded(tiny_decoder_bundle))


@pytest.fixture(scope="session")
def rounded_minilm(made_once: MakeOnce, minilm_bundle: Path) -> Path:
    """MiniLM with weights of 8 bits ("fine") and 3 bits ("coarse"). Read-only."""
    return made_once("rounded_minilm", with_rounded(minilm_bundle))
