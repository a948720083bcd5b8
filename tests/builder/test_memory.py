"""Memory that nobody uses goes back to the system while a build runs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from accel.builder import memory
from accel.builder.memory import giving_back

BLOCK, COUNT = 100_000, 2_000  # 200 MB in blocks that the allocator takes from its heap, not from the system
STATUS = Path("/proc/self/status")
ROOT = Path(memory.__file__).parents[2]
HAS_GLIBC = STATUS.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident() -> int:
    """Bytes of this process's own memory that are resident."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def until(reached: int) -> int:
    end = time.monotonic() + 10
    while resident() > reached and time.monotonic() < end:
        time.sleep(0.01)
    return resident()


@pytest.mark.skipif(not HAS_GLIBC, reason="needs Linux and glibc")
def test_pages_between_blocks_in_use_go_back() -> None:
    blocks = [bytearray(BLOCK) for _ in range(COUNT)]
    full = resident()
    del blocks[: COUNT - 1]  # the last one stays, at the top
    held = resident()
    assert held > full - BLOCK * COUNT // 4  # the allocator keeps them, which is why somebody has to ask
    dropped: list[int] = []
    with giving_back(lambda: dropped.append(1)):
        left = until(full - BLOCK * COUNT // 2)
    assert left <= full - BLOCK * COUNT // 2 and dropped
    assert len(blocks[0]) == BLOCK and not any(blocks[0])


def test_an_allocator_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    with giving_back(lambda: dropped.append(1)):
        end = time.monotonic() + 10
        while not dropped and time.monotonic() < end:
            time.sleep(0.01)
    assert dropped


def test_the_heap_is_asked_at_a_bounded_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes 20 ms of a core: five of them to a second in place of fourteen."""
    asked: list[float] = []

    def busy(_: int) -> int:
        asked.append(time.monotonic())
        ends = time.thread_time() + 0.02
        while time.thread_time() < ends:
            pass
        return 0

    monkeypatch.setattr(memory, "_heap_trimmer", lambda: busy)
    with giving_back(lambda: None):
        time.sleep(1.0)
    assert 1 <= len(asked) <= 6
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(asked))


HELD = """
import sys
from accel.builder.memory import FRESH_BYTES, PeakMemory
freed = b"x" * 80_000_000
del freed
before = b"x" * int(sys.argv[1])
peak = PeakMemory()
quiet = peak.read()
during = b"x" * 60_000_000
print(quiet, peak.read(), FRESH_BYTES)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux")
def test_the_peak_is_of_this_build() -> None:
    """What was freed before is none of it, nor a little that is held; beside much, which it may use, nobody knows."""

    def held(before: int) -> list[str]:
        command = [sys.executable, "-c", HELD, str(before)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()

    quiet, found, fresh = map(int, held(200_000_000))
    assert abs(quiet - fresh) < 5_000_000 and 50_000_000 < found - fresh < 75_000_000
    assert held(400_000_000)[:2] == ["None", "None"]
