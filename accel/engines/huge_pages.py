"""Moves what a block of code allocated to huge pages.

A forward pass streams every weight once. On 4 KiB pages the address translation and the hardware's prefetching,
which stops at each page's end, cost part of the memory bandwidth.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PAGE = 4096
HUGE = 2 << 20  # of x86-64, and of AArch64 with 4 KiB pages
FILLED = 0.9  # share of a huge page that must be in use already: what is sparse would only grow
MADV_COLLAPSE = 25  # linux/mman.h, from Linux 6.1 on
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/maps")
Range = tuple[int, int]


@contextmanager
def huge_pages() -> Iterator[None]:
    """Moves private memory that was reserved and filled during the block to huge pages.

    Does nothing where the system has none or its administrator turned them off. It is advice: where the kernel finds
    no free huge page, the memory stays as it is. What other threads fill meanwhile moves too, which changes neither
    its content nor its size.
    """
    before = _private_ranges() if _enabled() else None
    yield
    after = _private_ranges() if before is not None else None
    if before is not None and after is not None:
        libc = ctypes.CDLL(None)
        for start, stop in _subtract(after, before):
            for first, last in _filled(libc, -(-start // HUGE) * HUGE, stop // HUGE * HUGE):
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_COLLAPSE)


def _enabled() -> bool:
    try:
        return sys.platform == "linux" and mmap.PAGESIZE == PAGE and "[never]" not in SETTING.read_text()
    except OSError:
        return False


def _private_ranges() -> list[Range] | None:
    """Address ranges of the process's own writable memory without a file behind it, ascending; None: not known."""
    try:
        lines = MAPS.read_bytes().split(b"\n")  # bytes: a mapped file's name may hold anything but a line feed
    except OSError:
        return None
    ranges = []
    for line in lines:
        span, permissions, _, _, inode, *name = [*line.split(maxsplit=5), *[b""] * 5][:6]
        if permissions == b"rw-p" and inode == b"0" and name[0] in (b"", b"[heap]"):
            start, stop = span.split(b"-")
            ranges.append((int(start, 16), int(stop, 16)))
    return ranges


def _filled(libc: ctypes.CDLL, start: int, stop: int) -> Iterator[Range]:
    """Runs of huge pages whose small pages are (nearly) all in memory."""
    if start >= stop:
        return
    resident = np.zeros((stop - start) // PAGE, np.uint8)
    address = ctypes.c_void_p(resident.ctypes.data)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), address) != 0:
        return  # given back meanwhile
    full = (resident & 1).reshape(-1, HUGE // PAGE).mean(axis=1) >= FILLED
    edges = np.flatnonzero(np.diff(np.concatenate([[False], full, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        yield start + first * HUGE, start + last * HUGE


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
