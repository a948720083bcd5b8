"""Memory that a session packs its weights into moves to huge pages; nothing else does, and nothing ever fails."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from pathlib import Path

import pytest

from accel.engines import huge_pages as module
from accel.engines.huge_pages import huge_pages

SIZE = 16 * module.HUGE
MODES = module.SETTING.read_text() if module._enabled() else ""
needs_advice = pytest.mark.skipif(
    "[madvise]" not in MODES,
    reason=f"huge pages are not on for those who ask, and them alone: {MODES.strip() or 'off'}",
)


def reserve(fill: int) -> mmap.mmap:
    """Private memory; ``fill`` bytes of each 4 KiB page are written, 0: of each 16th page one."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE)
    for start in range(0, SIZE, module.PAGE if fill else 16 * module.PAGE):
        memory[start : start + max(fill, 1)] = b"m" * max(fill, 1)
    return memory


def kilobytes(memory: mmap.mmap, field: str) -> int:
    """A figure of the mapping that holds the memory, from smaps."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    inside = False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError("not mapped")


@needs_advice
def test_what_a_block_fills_moves_and_keeps_its_bytes():
    with huge_pages():
        memory = reserve(module.PAGE)
    assert kilobytes(memory, "AnonHugePages") >= SIZE // 1024 * 0.75
    assert memory[:] == b"m" * SIZE


@needs_advice
def test_what_was_there_before_stays():
    earlier = reserve(module.PAGE)
    between = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)  # else the two may become one mapping
    with huge_pages():
        later = reserve(module.PAGE)
    assert kilobytes(later, "AnonHugePages") > SIZE // 1024 * 0.5 > kilobytes(earlier, "AnonHugePages")
    assert len(between) == SIZE


@needs_advice
def test_sparse_memory_does_not_grow():
    with huge_pages():
        memory = reserve(0)
        before = kilobytes(memory, "Rss")
    assert kilobytes(memory, "Rss") < before + SIZE // 1024 * 0.25


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x0cb", b"a\xe2\x80\xa8b", b"a\xc2\x85b", b"a\x1cb", b"two words"])
def test_any_name_of_a_mapped_file(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "w+b") as stream:
        stream.write(b"x" * module.PAGE)
        stream.flush()
        with mmap.mmap(stream.fileno(), 0), huge_pages():
            pass
        with mmap.mmap(stream.fileno(), 0):
            assert module._private_ranges() or not module._enabled()


@pytest.mark.parametrize("missing", ["SETTING", "MAPS"])
def test_without_the_kernels_files_nothing_happens(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(module, missing, tmp_path / "absent")
    with huge_pages():
        pass


def test_nothing_is_advised_where_huge_pages_are_off(tmp_path, monkeypatch):
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(module, "SETTING", setting)
    assert not module._enabled()


def test_an_error_in_the_block_is_passed_on():
    with pytest.raises(KeyError, match="mine"), huge_pages():
        raise KeyError("mine")


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
