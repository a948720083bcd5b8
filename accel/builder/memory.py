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
    """Largest resident memory of this process from here on, as Linux counts it."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
            self._known = True
        except OSError:
            self._known = False

    def read(self) -> int | None:
        """Bytes; None where the system does not say."""
        if self._known:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None


__all__ = ["PeakMemory", "giving_back"]
