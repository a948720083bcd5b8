"""Where a store keeps its files: the protocol of both kinds, and a directory of this machine."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accel.errors import AccelError, EngineStoreError, InputError, StorageError
from accel.storage import as_storage_error, check_writable
from accel.store.lock import LocalLock, Lock
from accel.store.plan_file import PlanFile, new_file, unused

CHUNK = 1 << 20
TEMPORARY = ".tmp-"
NAME = re.compile(r"([0-9a-f]{64}/[0-9a-f]{64})(-[0-9a-f]{16}\.plan|\.json|\.used)")
Plan = bytes | bytearray | memoryview | Path


@dataclass(frozen=True)
class Record:
    """The files of one entry, whether or not they make a whole one.

    Attributes:
        stem: ``{identity}/{digest}``.
        files: Name -> bytes.
    """

    stem: str
    files: dict[str, int]

    @property
    def identity(self) -> str:
        return self.stem.partition("/")[0]

    @property
    def digest(self) -> str:
        return self.stem.partition("/")[2]

    @property
    def manifest(self) -> str:
        """The name that the entry's manifest has."""
        return f"{self.stem}.json"

    @property
    def plans(self) -> list[str]:
        return [name for name in self.files if name.endswith(".plan")]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


class Folder(Protocol):
    """Files by name (``identity/file``). A file appears whole, or not at all.

    Methods raise EngineStoreError if the folder cannot be read, StorageError if it cannot be written.
    """

    url: str

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError if it is not there."""

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those files that are there."""

    def write(self, name: str, content: bytes) -> None:
        """Writes or replaces a file."""

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

    def records(self, identity: str | None = None) -> list[Record]:
        """The files of all entries, or of those below one identity."""

    def add_plan(self, stem: str, plan: Plan) -> AbstractContextManager[tuple[int, str]]:
        """Writes a plan and gives its size and sha256; until the block ends nobody takes it for a leftover."""

    def open_plan(self, name: str, size: int, sha256: str) -> PlanFile:
        """The plan, checked and marked. Raises FileNotFoundError, and RefusedEngineError if it is damaged."""

    def check_plan(self, name: str, size: int, sha256: str) -> None:
        """Reads the plan where it is kept, caches left aside; raises like ``open_plan``."""

    def touch(self, plan: str) -> None:
        """Notes that the plan's entry is used now, if the folder can be written."""

    def last_used(self, records: Iterable[Record]) -> dict[str, float]:
        """Stem -> seconds since 1970."""

    def unused(self, plan: str) -> AbstractContextManager[bool]:
        """Whether nobody on this machine has the plan open; while the block runs nobody opens it."""

    def discard_leftover(self, plan: str, is_leftover: Callable[[], bool]) -> None:
        """Removes a plan that no manifest names, unless its writer may still be at work."""

    def remove_temporaries(self, identity: str) -> None:
        """Removes the half-written files of writers that no longer run."""

    def lock(self, stem: str) -> Lock:
        """The lock under which the entry is written."""


class LocalFolder:
    """A directory of this machine, or of a shared file system. It is made when something is first written.

    Args:
        root: The directory.
        place: Asks for another one, see ``as_storage_error``.
    """

    def __init__(self, root: Path, place: str = "Give a store (--store, ACCEL_STORE)") -> None:
        self.root, self.place = root.expanduser().absolute(), place
        self.url = str(self.root)

    def path(self, name: str) -> Path:
        """Where the file of this name lies."""
        return self.root / name

    def check_writable(self) -> None:
        """Says what the first write would say of rights; writes nothing.

        Raises:
            StorageError: There are none, or the file system is read-only.
        """
        with self.writing():  # to look for it may be forbidden too
            nearest = next(path for path in (self.root, *self.root.parents) if path.exists())
            if nearest.is_dir():
                check_writable(nearest, self.place)

    def read(self, name: str) -> bytes:
        with self._reading():
            return self.path(name).read_bytes()

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def write(self, name: str, content: bytes) -> None:
        with self._new_file(name) as (path, descriptor), self.writing():
            _write(descriptor, content)
            self._publish(path, descriptor, name)

    def remove(self, name: str) -> None:
        with self.writing():
            self.path(name).unlink(missing_ok=True)
            with suppress(OSError):
                self.path(name).parent.rmdir()  # if this was the last

    def records(self, identity: str | None = None) -> list[Record]:
        with self._reading():
            try:
                folders = [self.root / identity] if identity else [p for p in self.root.iterdir() if p.is_dir()]
                return group({f"{folder.name}/{n}": size for folder in folders for n, size in _sizes(folder)})
            except FileNotFoundError:
                return []

    @contextmanager
    def add_plan(self, stem: str, plan: Plan) -> Iterator[tuple[int, str]]:
        with self._new_file(stem) as (path, descriptor):
            with self.writing():
                size, sha256 = _copy(plan, descriptor)
                self._publish(path, descriptor, plan_name(stem, sha256))
            yield size, sha256

    @contextmanager
    def incoming(self, name: str) -> Iterator[Path]:
        """A temporary file for the block to write; it becomes ``name`` at its end."""
        with self._new_file(name) as (path, descriptor):
            yield path
            with self.writing():
                self._publish(path, descriptor, name)

    def open_plan(self, name: str, size: int, sha256: str) -> PlanFile:
        with self._reading():
            plan = PlanFile.open(self.path(name))
            try:
                plan.check(size, sha256)
            except BaseException:
                plan.close()
                raise
            return plan

    def check_plan(self, name: str, size: int, sha256: str) -> None:
        self.open_plan(name, size, sha256).close()

    def touch(self, plan: str) -> None:
        with suppress(OSError):  # read-only, or another user's: then it looks older than it is
            os.utime(self.path(plan))

    def last_used(self, records: Iterable[Record]) -> dict[str, float]:
        return {record.stem: max(map(self._modified, record.files), default=0.0) for record in records}

    @contextmanager
    def unused(self, plan: str) -> Iterator[bool]:
        with self._reading(), unused(self.path(plan)) as free:
            yield free

    def discard_leftover(self, plan: str, is_leftover: Callable[[], bool]) -> None:
        with self.unused(plan) as free:  # its writer marks it until the manifest is there
            if free and is_leftover():
                self.remove(plan)

    def remove_temporaries(self, identity: str) -> None:
        for path in (self.root / identity).glob(f"{TEMPORARY}*"):
            with suppress(OSError), unused(path) as free:
                if free:
                    path.unlink(missing_ok=True)

    def lock(self, stem: str) -> LocalLock:
        path = self.root / ".locks" / f"{stem.partition('/')[2]}.lock"
        with self.writing():
            path.parent.mkdir(parents=True, exist_ok=True)
        return LocalLock(path, self.writing)

    @contextmanager
    def _new_file(self, name: str) -> Iterator[tuple[Path, int]]:
        with ExitStack() as stack:
            with self.writing():
                opened = stack.enter_context(new_file(self.path(name).parent, TEMPORARY))
            yield opened

    def _publish(self, path: Path, descriptor: int, name: str) -> None:
        os.fsync(descriptor)
        os.replace(path, self.path(name))
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _modified(self, name: str) -> float:
        try:
            return self.path(name).stat().st_mtime
        except OSError:
            return 0.0

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, AccelError):
            raise
        except OSError as error:
            what, remedy = f"The engine store cannot be read: {error.strerror}", "Check the path and its permissions"
            raise EngineStoreError(what, where=self.url, remedy=remedy) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Says in words why the block cannot write."""
        try:
            yield
        except AccelError:
            raise
        except OSError as error:
            known = as_storage_error(error, self.root, self.place)
            what, remedy = f"The engine store cannot be written: {error.strerror or error}", "Check its disk"
            raise known or StorageError(what, where=self.url, remedy=remedy) from error


def plan_name(stem: str, sha256: str) -> str:
    """A plan's name holds its content's hash, so that one plan never overwrites another that is being read."""
    return f"{stem}-{sha256[:16]}.plan"


def group(files: dict[str, int]) -> list[Record]:
    """Sorts names and sizes into entries; other names are left out."""
    found: dict[str, dict[str, int]] = {}
    for name, size in sorted(files.items()):
        match = NAME.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[name] = size
    return [Record(stem, names) for stem, names in found.items()]


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as items:
            for item in items:
                with suppress(FileNotFoundError):  # removed meanwhile
                    yield item.name, item.stat().st_size
    except FileNotFoundError:
        return


def _write(descriptor: int, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy(plan: Plan, descriptor: int) -> tuple[int, str]:
    hasher, size = hashlib.sha256(), 0
    for chunk in _chunks(plan):
        _write(descriptor, chunk)
        hasher.update(chunk)
        size += len(chunk)
    if not size:
        raise InputError("The plan is empty", where="plan", remedy="Look for the builder's error")
    return size, hasher.hexdigest()


def _chunks(plan: Plan) -> Iterator[bytes | memoryview]:
    if not isinstance(plan, Path):
        view = memoryview(plan).cast("B")
        yield from (view[start : start + CHUNK] for start in range(0, len(view), CHUNK))
        return
    try:
        source = plan.open("rb")
    except OSError as error:
        what = f"The built plan cannot be read: {error.strerror}"
        raise EngineStoreError(what, where=str(plan), remedy="Build it again") from error
    with source:
        while chunk := source.read(CHUNK):
            yield chunk


__all__ = ["Folder", "LocalFolder", "Plan", "Record", "group", "plan_name"]
