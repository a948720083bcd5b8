"""What a build takes of this process's memory: what is let go goes back to the system at once, and the peak is known.

The allocator of the C library keeps what is freed between blocks that are still in use. While a network is compiled
that is more than half of its memory: a build of SmolLM2 had 425 MB in use at its peak, and held 910 MB (TensorRT-RTX
1.7.1, glibc 2.36). Asked to, glibc returns every page that holds nothing.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGES_SECONDS = 0.002  # between two looks at mapped pages
_HEAP_SECONDS = 0.05  # between two looks at the heap, at least:
_HEAP_SHARE = 0.1  # of a core's time is spent there at most (SmolLM2: 0.01)
FRESH_BYTES = 150_000_000  # resident when a build begins that is all its process does (accel build of MiniLM: 146 MB)


@contextmanager
def giving_back(drop_pages: Callable[[], None]) -> Iterator[None]:
    """Meanwhile gives memory that nobody uses back to the system again and again, from a thread of its own.

    Args:
        drop_pages: Gives back pages of mapped files.
    """
    done, trim = threading.Event(), _heap_trimmer()

    def work() -> None:
        due = 0.0
        while not done.wait(_PAGES_SECONDS):
            drop_pages()
            if trim is not None and time.monotonic() >= due:
                started = time.thread_time()  # a busy machine's clock would make the pauses long
                trim(0)
                due = time.monotonic() + max(_HEAP_SECONDS, (time.thread_time() - started) / _HEAP_SHARE)

    worker = threading.Thread(target=work, name="accel-memory", daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()


def _heap_trimmer() -> Callable[[int], int] | None:
    """``malloc_trim(3)``; None where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows, whose loader takes no None
        return None


class PeakMemory:
    """Largest resident memory from here on that a process which does nothing but build would show, as Linux counts it.

    What this one holds at the start beyond ``FRESH_BYTES`` is not the build's and is left out. Where that is as much
    again (PyTorch and a variant that was just added to the bundle), the build lives in what it lets go: nobody knows.
    """

    def __init__(self) -> None:
        if (trim := _heap_trimmer()) is not None:
            trim(0)  # what was freed before would be taken for memory in use, and then serve the build
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
            self._known = True
        except OSError:
            self._known = False
        self._others = max(0, self._marked() - FRESH_BYTES) if self._known else 0

    def read(self) -> int | None:
        """Bytes; None where the system does not say, or too much else was there."""
        return self._marked() - self._others if self._known and self._others <= FRESH_BYTES else None

    def _marked(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


__all__ = ["FRESH_BYTES", "PeakMemory", "giving_back"]
