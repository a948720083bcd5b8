"""The file of kernels that TensorRT-RTX compiled, which makes the next start fast. Losing it costs time only."""

from __future__ import annotations

import logging
from pathlib import Path

from accel.storage import replace_file

_log = logging.getLogger(__name__)


def read_kernels(path: Path | None) -> bytes | None:
    """The file's bytes; None when there is none, or it cannot be read. The library refuses what does not fit."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("compiled kernels cannot be read, they are compiled again: %s", error)
        return None


def write_kernels(path: Path, data: bytes) -> None:
    """Replaces the file in one step; a failure is logged and leaves the old one."""
    try:
        replace_file(path, data)
    except OSError as error:
        _log.warning("compiled kernels are not kept: %s", error)


__all__ = ["read_kernels", "write_kernels"]
