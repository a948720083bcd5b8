"""A store in S3, GCS or anything else that ``fsspec`` reaches, with a cache of its plans on this machine."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from accel.errors import AccelError, DependencyError, EngineStoreError, RefusedEngineError, StorageError
from accel.storage import as_storage_error
from accel.store.folder import LocalFolder, Plan, Record, group, plan_name
from accel.store.lock import RemoteLock, held
from accel.store.plan_file import PlanFile, check_sha256, check_size

LEFTOVER_SECONDS = 24 * 3600.0  # an upload that takes longer than this is none
PACKAGES = {"s3": "accelrt[s3]", "s3a": "accelrt[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "pre-condition", "412")  # the object is there
UNKNOWN = ("NotImplemented", "501")  # servers older than conditional puts


class RemoteFolder:
    """The files of a store in an object store.

    A plan is used from the copy in ``cache``, so removing the object never disturbs whoever runs the engine. Marks of
    use therefore lie on the copies, and are those of this machine.

    Args:
        url: E.g. ``s3://bucket/engines``.
        options: Of the ``fsspec`` file system (``storage_options``).
        cache: Where copies of plans, and this machine's locks, lie.

    Raises:
        DependencyError: ``fsspec`` or the package for this kind of URL is missing.
        EngineStoreError: The URL means nothing, or its options are wrong.
    """

    def __init__(self, url: str, options: dict[str, Any], cache: LocalFolder) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self._options = {"use_listings_cache": False, **options}
        self._opened: tuple[int, Any, str] | None = None
        self._open()

    def read(self, name: str) -> bytes:
        with self._reading():
            return bytes(self._fs.cat_file(self._path(name)))

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        with self._reading():
            found = self._fs.cat(list(paths), on_error="return")  # requests run side by side
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return {paths[path]: content for path, content in found.items() if isinstance(content, bytes)}

    def write(self, name: str, content: bytes) -> None:
        with self._writing():
            self._fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file that is not there yet; False if it is. One step where the backend can (S3, GCS, memory)."""
        path = self._path(name)
        with self._writing():
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except (OSError, ValueError, TypeError, NotImplementedError) as error:  # how backends refuse mode="create"
                if _says(error, REFUSED):
                    return False
                if isinstance(error, OSError) and not _says(error, UNKNOWN):
                    raise
                if self._fs.exists(path):
                    return False
                self._fs.pipe_file(path, content)
        return True

    def remove(self, name: str) -> None:
        with self._writing(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))
        if name.endswith(".plan"):
            self.cache.remove(name)

    def records(self, identity: str | None = None) -> list[Record]:
        top = self._path(identity) if identity else self._root
        with self._reading():
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(top, detail=True)
            except FileNotFoundError:
                return []
        return group({self._name(path): int(info.get("size") or 0) for path, info in found.items()})

    @contextmanager
    def add_plan(self, stem: str, plan: Plan) -> Iterator[tuple[int, str]]:
        with self.cache.add_plan(stem, plan) as (size, sha256):
            name = plan_name(stem, sha256)
            with self._writing():
                self._fs.put_file(str(self.cache.path(name)), self._path(name))
            yield size, sha256

    def open_plan(self, name: str, size: int, sha256: str) -> PlanFile:
        cached = self._open_cached(name, size, sha256)
        if cached is not None:
            return cached
        with self._downloading(name):  # one process of this machine fetches it, the others find it
            cached = self._open_cached(name, size, sha256)
            return cached or self._download(name, size, sha256)

    def check_plan(self, name: str, size: int, sha256: str) -> None:
        with self._reading(), self._fs.open(self._path(name), "rb") as stream:
            hasher, actual = hashlib.sha256(), 0
            while chunk := stream.read(8 << 20):
                hasher.update(chunk)
                actual += len(chunk)
        check_size(actual, size, f"{self.url}/{name}")
        check_sha256(hasher.hexdigest(), sha256, f"{self.url}/{name}")

    def touch(self, plan: str) -> None:
        self.cache.touch(plan)
        with suppress(StorageError, EngineStoreError):  # read-only: then it looks older than it is
            self.write(_used(plan.partition("-")[0]), str(time.time()).encode())

    def last_used(self, records: Iterable[Record]) -> dict[str, float]:
        records = list(records)
        notes = self.read_many(_used(r.stem) for r in records if _used(r.stem) in r.files)
        return {r.stem: _number(notes.get(_used(r.stem), b"")) or self._modified(r) for r in records}

    @contextmanager
    def unused(self, plan: str) -> Iterator[bool]:
        with self.cache.unused(plan) as free:
            yield free

    def discard_leftover(self, plan: str, is_leftover: Callable[[], bool]) -> None:
        age = time.time() - self._modified_at(plan)
        if age > LEFTOVER_SECONDS and is_leftover():
            self.remove(plan)

    def remove_temporaries(self, identity: str) -> None:
        self.cache.remove_temporaries(identity)

    def lock(self, stem: str) -> RemoteLock:
        local = self.cache.lock(stem)
        with self.cache.writing():
            place = _place(local.path.parent)
        return RemoteLock(local, self, f"{stem}.lock", place)

    def _open_cached(self, name: str, size: int, sha256: str) -> PlanFile | None:
        try:
            return self.cache.open_plan(name, size, sha256)
        except FileNotFoundError:
            return None
        except RefusedEngineError:  # damaged on this machine: fetch it again
            self.cache.remove(name)
            return None

    def _download(self, name: str, size: int, sha256: str) -> PlanFile:
        with self.cache.incoming(name) as path:
            with self._reading():
                self._fs.get_file(self._path(name), str(path))
            check_size(path.stat().st_size, size, f"{self.url}/{name}")
        try:
            return self.cache.open_plan(name, size, sha256)
        except RefusedEngineError:
            self.cache.remove(name)
            raise

    @contextmanager
    def _downloading(self, name: str) -> Iterator[None]:
        with held(self.cache.lock(f"{name}.download"), None, None, name):
            yield

    def _modified(self, record: Record) -> float:
        return max(map(self._modified_at, record.files), default=0.0)

    def _modified_at(self, name: str) -> float:
        with self._reading():
            try:
                return float(self._fs.modified(self._path(name)).timestamp())
            except FileNotFoundError:
                return time.time()
            except NotImplementedError:  # fsspec's word for a backend that keeps no times
                return 0.0

    @property
    def _fs(self) -> Any:
        return self._open()[1]

    @property
    def _root(self) -> str:
        return self._open()[2]

    def _open(self) -> tuple[int, Any, str]:
        """The file system of this process: connections do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_connect(self.url, self._options))
        return self._opened

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root).lstrip("/")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, AccelError):
            raise
        except OSError as error:
            raise self._full_cache(error) or self._out_of_reach("read", error) from error
        except Exception as error:  # every backend has exceptions of its own
            raise self._out_of_reach("read", error) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except AccelError:
            raise
        except PermissionError as error:
            remedy = "Use credentials that may write, or a store of your own (--store, ACCEL_STORE)"
            what = "There is no permission to write to the engine store"
            raise StorageError(what, where=self.url, remedy=remedy) from error
        except Exception as error:
            raise self._out_of_reach("written", error) from error

    def _full_cache(self, error: OSError) -> StorageError | None:
        if isinstance(error, PermissionError):
            return None
        return as_storage_error(error, self.cache.root, self.cache.place)

    def _out_of_reach(self, verb: str, error: Exception) -> EngineStoreError:
        what = f"The engine store cannot be {verb}: {type(error).__name__}: {error}"
        return EngineStoreError(what, where=self.url, remedy="Check the address, the credentials and the network")


def _connect(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    scheme = url.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]

        fs, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        remedy = f"pip install '{PACKAGES.get(scheme, 'accelrt[store]')}'"
        raise DependencyError(f"A package for {scheme}:// is missing: {error}", where=url, remedy=remedy) from error
    except Exception as error:  # each backend has its own for wrong options
        what, remedy = f"The engine store cannot be opened: {error}", "Check the URL and its options"
        raise EngineStoreError(what, where=url, remedy=remedy) from error
    return fs, root.rstrip("/")


def _used(stem: str) -> str:
    return f"{stem}.used"


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _says(error: Exception, words: tuple[str, ...]) -> bool:
    """Backends have no common exceptions for what a server answers to a conditional put."""
    text = f"{error} {error.__cause__}"
    return any(word in text for word in words)


def _place(locks: Path) -> str:
    """A name of the lock folder that no other machine has: made once, and kept in it."""
    path = locks / "place"
    with FileLock(locks / "place.lock"):
        with suppress(OSError, ValueError):
            name = path.read_text(encoding="ascii")
            if len(name) == 32:
                return name
        name = secrets.token_hex(16)
        path.write_text(name, encoding="ascii")
        return name


__all__ = ["RemoteFolder"]
