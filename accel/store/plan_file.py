"""An open plan, marked as in use: the mark is a lock on the plan itself, so it cannot outlive its process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accel.errors import RefusedEngineError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks
REMEDY = "Build the engine again (accel build, accel warmup), or remove the entry"


class PlanFile:
    """A plan, open for reading, with a shared ``flock`` on it.

    Eviction takes the lock exclusively and so leaves the plan alone. The kernel drops the lock however the process
    ends, and it works in stores that are read-only. Where a file system has no locks, there are no marks: a plan that
    is evicted then stays readable for whoever has it open.

    Attributes:
        path: Where it lies.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._process = os.getpid()

    @classmethod
    def open(cls, path: Path) -> PlanFile:
        """Opens and marks a plan.

        Raises:
            FileNotFoundError: It is not there, or was removed meanwhile.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _lock(descriptor, fcntl.LOCK_SH)
            if not _is_at(path, descriptor):  # evicted before the lock was taken
                raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(path))
            return cls(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def check(self, size: int, sha256: str) -> None:
        """Reads the plan once and returns if it is what the manifest says.

        Raises:
            RefusedEngineError: Truncated, longer, or altered.
        """
        actual = os.fstat(self._descriptor).st_size
        check_size(actual, size, str(self.path))
        with open(self._descriptor, "rb", closefd=False) as stream:
            stream.seek(0)
            check_sha256(hashlib.file_digest(stream, "sha256").hexdigest(), sha256, str(self.path))

    def map(self) -> memoryview:
        """The plan's bytes, mapped: nothing is copied, the page cache is shared by all processes."""
        return memoryview(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ))

    def copy(self, sha256: str) -> memoryview:
        """The plan's bytes in memory of this process, hashed there: nobody can alter them after the check.

        Raises:
            RefusedEngineError: The file was altered since ``check``.
        """
        with open(self._descriptor, "rb", closefd=False) as stream:
            stream.seek(0)
            content = stream.read()
        check_sha256(hashlib.sha256(content).hexdigest(), sha256, str(self.path))
        return memoryview(content)

    def close(self) -> None:
        """Takes the mark off; what was mapped stays valid. May be called again."""
        if self._descriptor >= 0:
            if os.getpid() == self._process:  # a forked child shares the lock, which is not its own to drop
                with suppress(OSError):
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # explicit: maps hold copies of the descriptor
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether nobody has ``path`` marked; while the block runs, nobody can mark it. True if there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is_at(path, descriptor)
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(descriptor)


@contextmanager
def new_file(folder: Path, prefix: str) -> Iterator[tuple[Path, int]]:
    """A new file in ``folder``, open for writing and marked, so that nobody takes it for a leftover.

    The block renames it. If it does not, the file is removed.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{prefix}{os.urandom(8).hex()}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # the folder was empty, and somebody removed it
            continue
        try:
            _lock(descriptor, fcntl.LOCK_SH)
            if not _is_at(path, descriptor):  # taken for a leftover before it was marked
                continue
            yield path, descriptor
            return
        finally:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def check_size(actual: int, expected: int, where: str) -> None:
    """Raises RefusedEngineError unless the sizes in bytes are equal."""
    if actual != expected:
        kind = "truncated" if actual < expected else "longer than it was"
        what = f"The engine's plan is {kind}: {actual:,} bytes instead of {expected:,}"
        raise RefusedEngineError(what, where=where, remedy=REMEDY)


def check_sha256(actual: str, expected: str, where: str) -> None:
    """Raises RefusedEngineError unless the hashes are equal."""
    if actual != expected:
        raise RefusedEngineError("The engine's plan is altered: its sha256 differs", where=where, remedy=REMEDY)


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there, mine = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)


__all__ = ["PlanFile", "check_sha256", "check_size", "new_file", "unused"]
