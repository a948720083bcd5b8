"""The engine store: each engine is built once, kept with a manifest, and checked whenever it is loaded."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from accel import __version__
from accel.errors import EngineStoreError, InputError, RefusedEngineError, StorageError
from accel.store.eviction import evict, remove_unused, sweep
from accel.store.folder import Folder, LocalFolder, Plan, Record
from accel.store.hashing import cache_folder
from accel.store.key import EngineKey
from accel.store.lock import OnWait, held
from accel.store.manifest import EngineManifest, check_facts, decode
from accel.store.plan_file import PlanFile
from accel.store.remote import RemoteFolder
from accel.store.signing import Signer, Verifier

_log = logging.getLogger("accel")

ATTEMPTS = 5  # at an entry that is replaced or evicted while it is opened
Build = Callable[[], tuple[Plan, dict[str, Any]]]


class StoredEngine:
    """An engine of a store, checked. It is not evicted until ``close`` (or the end of a ``with`` block).

    Attributes:
        manifest: What the store knows of it.
        path: The plan on this machine: in the store, or in the cache of a remote one.
        built: Whether this call of ``get_or_build`` built it.
    """

    def __init__(self, manifest: EngineManifest, file: PlanFile, private: bool, built: bool) -> None:
        self.manifest, self.path, self.built = manifest, file.path, built
        self._file, self._private = file, private

    def plan(self) -> memoryview:
        """The plan's bytes, to deserialize: mapped, or, in a store that checks signatures, copied and hashed once more.

        Raises:
            RefusedEngineError: The file was altered since it was opened.
        """
        return self._file.copy(self.manifest.sha256) if self._private else self._file.map()

    def close(self) -> None:
        """Lets the entry be evicted. What ``plan`` returned stays valid."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Entry:
    """One line of a listing.

    Attributes:
        identity: The folder, see ``engine_identity``.
        digest: The key's digest.
        bytes: Of all its files.
        last_used: Seconds since 1970.
        manifest: None if it is not to be trusted.
        problem: What is wrong, in words; None if nothing was found.
    """

    identity: str
    digest: str
    bytes: int
    last_used: float
    manifest: EngineManifest | None
    problem: str | None


class EngineStore:
    """Engines by key, in a directory or an object store.

    Layout: ``{identity}/{digest}-{hash}.plan`` and ``{identity}/{digest}.json``, the manifest. The plan is written
    first and the manifest last, each in one step, so a writer that is killed at any moment leaves an old entry, a new
    one, or none. What it leaves besides is removed by the next writer. A directory needs no package; URLs need
    ``fsspec``. On object stores, let a lifecycle rule abort unfinished multipart uploads.

    Args:
        url: A directory, ``file://``, ``s3://``, ``gs://``, ``memory://`` or what else ``fsspec`` knows.
        max_bytes: After each ``put``, least recently used engines that nobody uses are removed down to this. It also
            bounds the local cache of a remote store, after each ``get`` too.
        signer: Signs what is put.
        verifier: Engines without its signature are refused; the signer by default, None if there is neither.
        cache: Local copies of a remote store's plans; below ``cache_folder()`` by default.
        options: For the ``fsspec`` file system.

    Raises:
        InputError: ``max_bytes`` is negative.
        DependencyError: A package for this URL is missing.
        EngineStoreError: The URL or its options are wrong.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        max_bytes: int | None = None,
        signer: Signer | None = None,
        verifier: Verifier | None = None,
        cache: Path | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise InputError(f"The limit is {max_bytes} bytes", where="max_bytes", remedy="Give 0 or more")
        self._folder: Folder = _open_folder(str(url), options or {}, cache)
        self.url, self.max_bytes = self._folder.url, max_bytes
        self._signer, self._verifier = signer, verifier or signer

    def get(self, key: EngineKey) -> StoredEngine | None:
        """The engine of this key; None if the store has none. Needs no permission to write.

        Raises:
            RefusedEngineError: It is truncated, altered, unsigned, or signed by another key.
            EngineStoreError: The store cannot be read.
            StorageError: The local cache of a remote store cannot be written.
        """
        return self._get(key, built=False)

    def find(self, identity: str) -> list[EngineManifest]:
        """The engines of one identity, plans unread, in order of their digests. Refused ones are logged and left out.

        Raises:
            EngineStoreError: The store cannot be read.
        """
        found = []
        for record, manifest, problem in self._read_manifests(self._folder.records(identity)):
            if manifest is not None:
                found.append(manifest)
            else:
                _log.warning("engine %s of %s is left out: %s", record.digest[:16], self.url, problem)
        return found

    def put(
        self, key: EngineKey, plan: Plan, facts: dict[str, Any] | None = None, timeout: float | None = None
    ) -> EngineManifest:
        """Keeps an engine; one that is there is replaced, and whoever uses it goes on with it.

        Args:
            key: What it was built from and for.
            plan: Its bytes, or a file that holds them.
            facts: What the builder measured; plain JSON.
            timeout: Seconds to wait for another writer of this key.

        Raises:
            InputError: The plan is empty, or ``facts`` is no JSON.
            StorageError: Disk full, no permission, read-only. Nothing has changed then.
            EngineStoreError: The store cannot be reached, or the timeout is over.
        """
        self._check_can_sign()
        with held(self._folder.lock(_stem(key)), None, timeout, self._where(key)):
            return self._publish(key, plan, facts or {})

    def check_writable(self) -> None:
        """Says before any work what ``put`` would say of rights and keys, as far as that is seen without writing.

        Raises:
            StorageError: A directory that must not be written to.
            EngineStoreError: Engines must be signed, and there is no key to sign with.
        """
        self._check_can_sign()
        if isinstance(self._folder, LocalFolder):
            self._folder.check_writable()

    def get_or_build(
        self, key: EngineKey, build: Build, *, on_wait: OnWait | None = None, timeout: float | None = None
    ) -> StoredEngine:
        """The engine of this key; ``build`` makes it if the store has none, or none that may be trusted.

        However many processes ask at once, one builds and all get its engine (see ``accel.store.lock`` for what that
        means among several machines).

        Args:
            key: What it is to be built from and for.
            build: Makes the plan and its facts.
            on_wait: Called again and again while another process builds, with the seconds waited.
            timeout: Seconds to wait for it; None: as long as it lives.

        Raises:
            StorageError: The engine is not there and the store cannot be written.
            EngineStoreError: The store cannot be reached, the timeout is over, or engines must be signed and there is
                no key to sign with.
        """
        judged: bytes | None = None  # the manifest that was found missing or not to be trusted
        built = False
        while True:
            raw = self._read_manifest(key)
            if raw is not None and (raw != judged or built):
                try:
                    engine = self._get(key, built)
                    if engine is not None:
                        return engine
                except RefusedEngineError as error:
                    if built:
                        raise
                    _log.warning("an engine of the store is built again: %s", error)
            judged = raw
            self._check_can_sign()
            with held(self._folder.lock(_stem(key)), on_wait, timeout, self._where(key)):
                if self._read_manifest(key) == judged:
                    self._publish(key, *build())
                    built = True

    def entries(self) -> list[Entry]:
        """All engines, least recently used first; plans unread.

        Raises:
            EngineStoreError: The store cannot be read.
        """
        records = self._folder.records()
        last_used = self._folder.last_used(records)
        found = [
            Entry(record.identity, record.digest, record.bytes, last_used[record.stem], manifest, problem)
            for record, manifest, problem in self._read_manifests(records)
        ]
        return sorted(found, key=lambda entry: (entry.last_used, entry.digest))

    def verify(self) -> list[Entry]:
        """As ``entries``, and every plan is read and compared: see ``Entry.problem``.

        Raises:
            EngineStoreError: The store cannot be read.
        """
        return [self._verify(entry) for entry in self.entries()]

    def prune(self, max_bytes: int | None = None) -> list[Record]:
        """Removes leftovers of killed writers, then least recently used engines down to ``max_bytes``.

        Engines in use on this machine stay. (On another machine, an engine in use runs from that machine's copy, or,
        on a shared file system, carries a lock that is seen here.)

        Args:
            max_bytes: The limit; the store's own by default, and without one only leftovers go.

        Returns:
            The engines removed.

        Raises:
            EngineStoreError: The store cannot be read.
            StorageError: It cannot be written.
        """
        for identity in {record.identity for record in self._folder.records()}:
            sweep(self._folder, identity)
        return self._evict(self.max_bytes if max_bytes is None else max_bytes, keep=())

    def remove(self, digest: str) -> bool:
        """Removes one engine, also a damaged one; False if there is none.

        Raises:
            EngineStoreError: It is in use, or the store cannot be read.
            StorageError: The store cannot be written.
        """
        found = [record for record in self._folder.records() if record.digest == digest]
        for record in found:
            if not remove_unused(self._folder, record):
                remedy = "End the processes that run it, then try again"
                raise EngineStoreError("The engine is in use", where=f"{self.url}/{record.stem}", remedy=remedy)
        return bool(found)

    def _get(self, key: EngineKey, built: bool) -> StoredEngine | None:
        for _ in range(ATTEMPTS):
            raw = self._read_manifest(key)
            if raw is None:
                return None
            manifest = self._check(raw, _stem(key))
            try:
                file = self._folder.open_plan(manifest.plan, manifest.size, manifest.sha256)
            except FileNotFoundError:  # evicted or replaced since the manifest was read
                time.sleep(0.02)
                continue
            self._folder.touch(manifest.plan)
            with suppress(StorageError, EngineStoreError):  # the engine is here; what could not go is no reason to fail
                self._evict_copies(self.max_bytes, keep={key.digest})
            return StoredEngine(manifest, file, self._verifier is not None, built)
        remedy = "Build the engine again (accel build, accel warmup), or remove the entry"
        raise RefusedEngineError("The engine's plan is missing", where=self._where(key), remedy=remedy)

    def _check(self, raw: bytes, stem: str) -> EngineManifest:
        """The manifest, if it is whole, stands where its key belongs, and is signed as asked."""
        where = f"{self.url}/{stem}.json"
        manifest = decode(raw, where)
        if manifest.stem != stem:
            raise RefusedEngineError("The manifest is that of another engine", where=where, remedy="Remove the entry")
        if self._verifier is not None:
            manifest.check_signature(self._verifier, where)
        return manifest

    def _read_manifest(self, key: EngineKey) -> bytes | None:
        with suppress(FileNotFoundError):
            return self._folder.read(f"{_stem(key)}.json")
        return None

    def _read_manifests(self, records: list[Record]) -> list[tuple[Record, EngineManifest | None, str | None]]:
        contents = self._folder.read_many(r.manifest for r in records if r.manifest in r.files)
        found: list[tuple[Record, EngineManifest | None, str | None]] = []
        for record in records:
            if record.manifest not in contents:
                continue  # being written, or left by a killed writer: no entry
            try:
                found.append((record, self._check(contents[record.manifest], record.stem), None))
            except RefusedEngineError as error:
                found.append((record, None, str(error)))
        return found

    def _verify(self, entry: Entry) -> Entry:
        if entry.manifest is None:
            return entry
        problem = None
        try:
            self._folder.check_plan(entry.manifest.plan, entry.manifest.size, entry.manifest.sha256)
        except FileNotFoundError:
            problem = "The engine's plan is missing"
        except RefusedEngineError as error:
            problem = str(error)
        return Entry(entry.identity, entry.digest, entry.bytes, entry.last_used, entry.manifest, problem)

    def _publish(self, key: EngineKey, plan: Plan, facts: dict[str, Any]) -> EngineManifest:
        """Writes plan and manifest; the caller holds the lock."""
        facts, stem = check_facts(facts), _stem(key)
        versions = {"accel": __version__, "python": platform.python_version(), key.target: key.library_version}
        with suppress(StorageError, EngineStoreError):  # another user's leftovers: no reason not to write
            sweep(self._folder, key.identity)
        replaced = self._plan_named_by(key)
        with self._folder.add_plan(stem, plan) as (size, digest):
            manifest = EngineManifest(key, size, digest, time.time(), versions, facts)
            if self._signer is not None:
                manifest = manifest.signed(self._signer)
            self._folder.write(f"{stem}.json", manifest.encode())
            self._folder.touch(manifest.plan)
        with suppress(StorageError, EngineStoreError):  # the new engine stands; the next sweep takes what stays
            if replaced not in (None, manifest.plan):
                self._folder.remove(str(replaced))
            self._evict(self.max_bytes, keep={key.digest})
        return manifest

    def _plan_named_by(self, key: EngineKey) -> str | None:
        raw = self._read_manifest(key)
        with suppress(RefusedEngineError):
            return None if raw is None else decode(raw, self._where(key)).plan
        return None

    def _evict(self, max_bytes: int | None, keep: set[str] | tuple[()]) -> list[Record]:
        if max_bytes is None:
            return []
        self._evict_copies(max_bytes, keep)
        complete = [record for record in self._folder.records() if record.manifest in record.files]
        return evict(self._folder, complete, max_bytes, keep)

    def _evict_copies(self, max_bytes: int | None, keep: set[str] | tuple[()]) -> None:
        """Makes room in the local cache of a remote store."""
        if max_bytes is not None and isinstance(self._folder, RemoteFolder):
            evict(self._folder.cache, self._folder.cache.records(), max_bytes, keep)

    def _check_can_sign(self) -> None:
        if self._verifier is not None and self._signer is None:
            remedy = "Give the key to sign with, or have the engine built where that key is"
            raise EngineStoreError("The store serves signed engines only and has no key to sign", remedy=remedy)

    def _where(self, key: EngineKey) -> str:
        return f"{self.url}/{_stem(key)}"


def _stem(key: EngineKey) -> str:
    return f"{key.identity}/{key.digest}"


def _open_folder(url: str, options: dict[str, Any], cache: Path | None) -> Folder:
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" not in url:
        return LocalFolder(Path(url))
    place = cache or cache_folder() / "engines" / sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return RemoteFolder(url, options, LocalFolder(place, "Set ACCEL_CACHE to a path"))


__all__ = ["Build", "EngineStore", "Entry", "StoredEngine"]
