"""The folder of a warm-up's logs: of a temporary one only what says why an engine is missing stays."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from accel.storage import as_storage_error
from accel.warmup_jobs.process import LOGS

PREFIX = "accel-warmup-"
MARK = ".running"  # locked while its job lives: one that can be locked is of a job that was killed


@contextmanager
def log_folder(chosen: Path | None, telling: Callable[[], Collection[Path]]) -> Iterator[Path]:
    """The folder to write logs to.

    Args:
        chosen: What the job says; None: a temporary one, which stays if there is something to be read in it. Those
            that killed jobs of this user left are removed.
        telling: The logs that stay; asked in the end.

    Raises:
        StorageError: It cannot be made.
    """
    try:
        folder, mark = (_make(chosen), None) if chosen is not None else _make_temporary()
    except OSError as error:
        raise as_storage_error(error, chosen or Path(tempfile.gettempdir()), LOGS) or error from error
    try:
        yield folder
    finally:
        if mark is not None:
            _clear(folder, telling())
            mark.close()


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_temporary() -> tuple[Path, IO[bytes]]:
    """A new folder and its mark, which is locked until it is closed."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        mark = (folder / MARK).open("wb", buffering=0)
        fcntl.flock(mark, fcntl.LOCK_EX)
        mark.write(b"locked\n")
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, mark


def sweep() -> None:
    """Removes the temporary folders of this user's jobs that were killed."""
    for mark in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{MARK}"):
        with suppress(OSError):  # another user's, or another process was faster
            if mark.lstat().st_uid == os.geteuid() and not mark.is_symlink():
                with mark.open("rb") as file:
                    if _is_abandoned(file):
                        shutil.rmtree(mark.parent, ignore_errors=True)


def _is_abandoned(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return os.fstat(file.fileno()).st_size > 0  # it is written to once it is locked


def _clear(folder: Path, telling: Collection[Path]) -> None:
    """Leaves the logs that tell something; none: no folder either."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path not in telling or not path.stat().st_size:
                path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


__all__ = ["log_folder", "sweep"]
