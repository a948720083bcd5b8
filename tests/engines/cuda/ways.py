"""Contests that are not held: compiling all ways to time them takes minutes. For modules that import the fixture."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import pytest

from accel.engines.cuda.contest import Contest, Way


@pytest.fixture(autouse=True)
def drawn_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as some GPU may find them fastest: each way comes about, and none is compiled to be timed."""

    def pick(contest: Contest, key: str, ways: Mapping[str, Way]) -> str:
        return list(ways)[crc32(key.encode()) % len(ways)]

    monkeypatch.setattr(Contest, "pick", pick)
