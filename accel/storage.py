"""Writing to disk so that nothing half made is ever seen: temporary siblings, sync, atomic swap."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
import shutil
import sys
from pathlib import Path

from accel.errors import StorageError

OUTPUT = "Give an output path"
# What is wrong, and what to do; {place} asks for another place to write to.
_REASONS = {
    errno.ENOSPC: ("The disk is full", "Free some space. {place} on another disk"),
    errno.EDQUOT: ("The disk quota is used up", "Free some space. {place} on another disk"),
    errno.EFBIG: ("The file is larger than this process or file system allows", "Raise ulimit -f, or use another disk"),
    errno.EACCES: ("There is no permission to write", "{place} that you may write to"),
    errno.EPERM: ("There is no permission to write", "{place} that you may write to"),
    errno.EROFS: ("The file system is read-only", "{place} on another file system"),
    errno.ENOTDIR: ("A part of the path is a file", "{place} elsewhere"),
    errno.EEXIST: ("The output path appeared while writing", "Give another path, or pass overwrite=True"),
    errno.ENOTEMPTY: ("The output path appeared while writing", "Give another path, or pass overwrite=True"),
    errno.EIO: ("The disk reported an error", "Check the disk"),
}


def as_storage_error(error: OSError, folder: Path, place: str = OUTPUT) -> StorageError | None:
    """Says a failed write in words; None when the error is about something else than writing under ``folder``.

    Args:
        place: Asks for another place, as the one who gave this one would understand it; ends in its noun.
    """
    if error.filename is not None:
        path = Path(os.fsdecode(error.filename)).absolute()
        if not path.is_relative_to(folder) and not folder.is_relative_to(path):
            return None
    code = error.errno
    if code is None and "requested and" in str(error):  # numpy's tofile reports a short write without an errno
        code = errno.ENOSPC
    if code not in _REASONS:
        return None
    what, remedy = _REASONS[code]
    said = StorageError(what, where=str(folder), remedy=f"{remedy.format(place=place)}; nothing was left behind")
    said.errno = code
    return said


def check_writable(folder: Path, place: str = OUTPUT) -> None:
    """Says before any work what the first write into a folder would say of its rights; writes nothing.

    Args:
        place: As in ``as_storage_error``.

    Raises:
        StorageError: The folder is on a read-only file system, or there is no permission to write.
    """
    effective = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        error = as_storage_error(OSError(code, os.strerror(code)), folder, place)
        assert error is not None
        raise error


def will_stay_unwritable(error: BaseException) -> bool:
    """Whether writing would fail again at once: a read-only file system or missing rights, not a full disk."""
    return isinstance(error, StorageError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and directory under ``folder`` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file so that readers see the old or the new one, never a part. Makes its directory.

    Raises:
        OSError: Writing failed; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with new.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


class TemporarySibling:
    """A directory ``.{name}.tmp-{random}`` beside ``target``, locked while its writer lives.

    The lock is an ``flock`` on the directory itself: the kernel drops it however the process
    ends (also on another host of a shared file system), so a sibling whose lock can be taken is stale.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._prefix = f".{target.name}.tmp-"
        self._descriptor: int | None = None
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """The directory; exists between ``create`` and ``publish`` or ``remove``."""
        assert self._path is not None, "create() first"
        return self._path

    def create(self) -> None:
        """Makes the parent, removes stale siblings, makes and locks the directory."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.remove_stale()
        while self._descriptor is None:
            self._path = self.target.parent / (self._prefix + secrets.token_hex(4))
            self._path.mkdir()
            self._descriptor = _lock(self._path)  # None: another writer took the new directory for a stale one

    def remove_stale(self) -> None:
        """Removes the siblings of writers that no longer run."""
        for path in self.target.parent.glob(glob.escape(self._prefix) + "*"):
            descriptor = _lock(path)
            if descriptor is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)

    def publish(self) -> None:
        """Renames the directory to ``target``; what stood there is swapped out atomically, then removed."""
        if self.target.exists() and any(self.target.iterdir()):
            _exchange(self.path, self.target)
            _fsync(self.target.parent)
            self.remove()  # now the old content
            return
        os.rename(self.path, self.target)
        _fsync(self.target.parent)
        self._release()

    def remove(self) -> None:
        """Removes the directory, if it is still there. Never raises: what stays is stale and goes next time."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        self._path = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _lock(path: Path) -> int | None:
    """Takes the directory's lock; None when another process holds it or the directory is gone."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _exchange(new: Path, old: Path) -> None:
    """Swaps two directories: in one step where the kernel can, else by two renames with a way back."""
    if sys.platform == "linux":
        at_cwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            if libc.renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), rename_exchange) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.ENOSYS, errno.EINVAL):
                raise OSError(code, os.strerror(code), str(old))
    aside = old.with_name(f".{old.name}.old-{secrets.token_hex(4)}")  # not a name that remove_stale takes
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


__all__ = [
    "TemporarySibling",
    "as_storage_error",
    "check_writable",
    "fsync_tree",
    "replace_file",
    "will_stay_unwritable",
]
