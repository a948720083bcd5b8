"""Moves what a block of code allocates to huge pages.

A forward pass streams every weight once. On 4 KiB pages the address translation and the hardware's prefetching,
which stops at each page's end, cost part of the memory bandwidth.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 2 << 20  # x86-64, and AArch64 with 4 KiB base pages
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux/mman.h; the second came with Linux 6.1
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/maps")
Range = tuple[int, int]


@contextmanager
def huge_pages() -> Iterator[None]:
    """Backs private memory that the block reserves, and leaves reserved, with huge pages.

    Does nothing where the system has none or its administrator turned them off. It is advice:
    where the kernel finds no free huge page, the memory stays as it is.
    """
    if not _enabled():
        yield
        return
    before = _private_ranges()
    yield
    libc = ctypes.CDLL(None)
    for start, stop in _subtract(_private_ranges(), before):
        start, stop = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if start < stop:
            for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):  # what is touched later, and what has been
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def _enabled() -> bool:
    try:
        return sys.platform == "linux" and "[never]" not in SETTING.read_text()
    except OSError:
        return False


def _private_ranges() -> list[Range]:
    """Address ranges of the process's own writable memory without a file behind it, ascending."""
    ranges = []
    for line in MAPS.read_text().splitlines():
        span, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, stop = span.split("-")
            ranges.append((int(start, 16), int(stop, 16)))
    return ranges


def _subtract(ranges: list[Range], taken: list[Range]) -> Iterator[Range]:
    """The parts of ``ranges`` outside ``taken``; both ascending and free of overlaps."""
    for start, stop in ranges:
        for first, last in taken:
            if last <= start or first >= stop:
                continue
            if start < first:
                yield start, first
            start = max(start, last)
        if start < stop:
            yield start, stop


__all__ = ["huge_pages"]
