"""sha256 of files, computed once: results are kept until the file's size, times, inode or device change."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from accel.errors import EngineStoreError

_log = logging.getLogger("accel")

ATTEMPTS = 5  # at a file that somebody writes to meanwhile
FRESH_SECONDS = 0.1  # a kernel stamps files by its tick: two writes within one have the same time
COARSE_FRESH_SECONDS = 2.0  # where file systems keep whole seconds only


def cache_folder() -> Path:
    """The user's cache directory: ``ACCEL_CACHE``, else ``accel`` below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("ACCEL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "accel"


class HashCache:
    """Remembers sha256s of files: one small JSON file per path, replaced by an atomic rename.

    So processes never wait for each other, a damaged entry costs one hash, and there is nothing to repair. A hash is
    remembered together with the file's size, mtime, ctime, inode and device; ctime catches what sets mtime back
    (``cp -p``, ``rsync -t``). It is not remembered while the file is so young that one more write could leave
    all of these as they are.

    Args:
        folder: Where the entries lie; ``hashes`` in ``cache_folder()`` by default. Where it cannot be written,
            hashes are computed each time.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "hashes"

    def sha256(self, path: str | Path) -> str:
        """Hex sha256 of the file's bytes.

        Raises:
            EngineStoreError: The file cannot be read, or keeps changing while it is read.
        """
        path = Path(path).absolute()
        try:
            for _ in range(ATTEMPTS):
                started = time.time()
                before = _state(path)
                known = self._recall(path, before)
                if known is not None:
                    return known
                digest = _hash(path)
                if _state(path) == before:
                    if _settled(before, started):
                        self._remember(path, before, digest)
                    return digest
        except OSError as error:
            remedy = "Check that the file exists and may be read"
            raise EngineStoreError(f"Cannot hash the file: {error.strerror}", where=str(path), remedy=remedy) from error
        remedy = "Wait until its writer is done, then try again"
        raise EngineStoreError("The file keeps changing while it is hashed", where=str(path), remedy=remedy)

    def combined(self, files: Mapping[str, str | Path]) -> str:
        """One sha256 over several files and the names they go by; the order of the mapping does not matter.

        Raises:
            EngineStoreError: As ``sha256``.
        """
        hashes = {name: self.sha256(path) for name, path in files.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def _entry(self, path: Path) -> Path:
        return self.folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"

    def _recall(self, path: Path, state: dict[str, int]) -> str | None:
        try:
            entry = json.loads(self._entry(path).read_bytes())
        except (OSError, ValueError, RecursionError):  # none yet, or damaged
            return None
        if not isinstance(entry, dict) or entry.get("path") != os.fspath(path) or entry.get("state") != state:
            return None
        digest = entry.get("sha256")
        return digest if is_sha256(digest) else None

    def _remember(self, path: Path, state: dict[str, int], digest: str) -> None:
        target = self._entry(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            entry = {"path": os.fspath(path), "state": state, "sha256": digest}
            temporary.write_text(json.dumps(entry), encoding="utf-8")
            os.replace(temporary, target)
        except (OSError, UnicodeError) as error:  # read-only, full, or a path that is no text
            _log.debug("the hash of %r is not kept: %s", path, error)
            with suppress(OSError):
                temporary.unlink()


def is_sha256(value: object) -> bool:
    """Whether ``value`` is a lower-case hex sha256."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def _settled(state: dict[str, int], now: float) -> bool:
    """Whether a write after ``now`` is bound to change ``state``."""
    latest = max(state["mtime_ns"], state["ctime_ns"])
    margin = COARSE_FRESH_SECONDS if latest % 1_000_000_000 == 0 else FRESH_SECONDS
    return now - latest / 1e9 > margin


__all__ = ["HashCache", "cache_folder", "is_sha256"]
