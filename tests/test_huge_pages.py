"""Memory that a session packs its weights into lies on huge pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from accel.engines import huge_pages as module
from accel.engines.huge_pages import huge_pages

SIZE = 16 * module.PAGE


def _huge_kilobytes() -> int:
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.mark.skipif(not module._enabled(), reason="this system has no transparent huge pages, or they are turned off")
def test_what_a_block_touches_lies_on_huge_pages_and_keeps_its_bytes():
    earlier = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE)
    earlier.write(b"e" * SIZE)
    before = _huge_kilobytes()
    with huge_pages():
        memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE)
        memory.write(b"m" * SIZE)
    gained = _huge_kilobytes() - before
    assert SIZE // 1024 * 0.75 <= gained <= SIZE // 1024 + 4096, "the block's memory, and not what was there before"
    assert memory[:] == b"m" * SIZE
    assert earlier[:] == b"e" * SIZE


def test_nothing_is_advised_where_huge_pages_are_off(tmp_path, monkeypatch):
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(module, "SETTING", setting)
    monkeypatch.setattr(module, "MAPS", tmp_path / "absent")  # would be read
    with huge_pages():
        pass


@pytest.mark.parametrize(
    ("ranges", "taken", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 10)]),
        ([(0, 10), (20, 30)], [(5, 25)], [(0, 5), (25, 30)]),
        ([(5, 10)], [(0, 6), (9, 20)], [(6, 9)]),
        ([(0, 10)], [(10, 20)], [(0, 10)]),
    ],
)
def test_subtract(ranges, taken, left):
    assert list(module._subtract(ranges, taken)) == left
