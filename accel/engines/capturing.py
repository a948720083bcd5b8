"""CUDA graphs of several sessions in one process."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TypeVar

Left = TypeVar("Left")

# Held by whoever captures, and by whoever waits for a whole device, which ends what others capture. ONNX Runtime's own
# captures fail for more: an allocation in another thread for one, which CUDA refuses.
capturing = threading.RLock()

_DISTURBED = re.compile(  # CUDA's errors 900 and 906
    r"operation not permitted when stream is capturing|legacy stream depend on a capturing|CUDA failure 90[06]\b"
)


def is_disturbed(error: BaseException) -> bool:
    """Whether another thread captured, so that CUDA refused a call: ONNX Runtime lets nobody allocate meanwhile."""
    return _DISTURBED.search(str(error)) is not None


def undisturbed(
    run: Callable[[], Left],
    recover: Callable[[], object] | None = None,
    suspects: Callable[[BaseException], bool] = is_disturbed,
) -> Left:
    """What ``run`` returns; it runs once more, while nobody captures, if another thread's capture came between.

    Args:
        run: May run twice.
        recover: Called before the second time.
        suspects: Whether an error may come from that.
    """
    try:
        return run()
    except Exception as error:
        if not suspects(error):
            raise
    with capturing:
        if recover is not None:
            recover()
        return run()


__all__ = ["capturing", "is_disturbed", "undisturbed"]
