"""Adds files to a bundle that stands: no file is written over, and nothing half made is ever seen."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from accel.bundle import Bundle, check_references, file_entry
from accel.errors import BundleError, StorageError
from accel.lost_files import dispensable, name_number
from accel.manifest import MANIFEST_NAME, FileEntry, Manifest
from accel.schema import to_dict
from accel.storage import TemporarySibling, as_storage_error, fsync_tree


class BundleExtension:
    """A context manager: write into ``.path``, then ``.commit(manifest)``.

    One process extends a bundle at a time, others wait. The new files move into the bundle first and the manifest is
    replaced last: until then no reader sees them, and what a killed run left is overwritten by the next.

    Args:
        bundle: An opened bundle.

    Raises:
        StorageError: The bundle's directory cannot be written to.
        BundleError: It is damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._sibling = TemporarySibling(bundle.path / "extension")
        self._lock: int | None = None

    @property
    def path(self) -> Path:
        """The temporary directory to write into; it lies in the bundle's."""
        return self._sibling.path

    def __enter__(self) -> Self:
        try:
            self._lock = os.open(self.bundle.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.bundle = Bundle.open(self.bundle.path)  # another process may have extended it meanwhile
            self._sibling.create()
        except BaseException as error:
            self._release()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise self._translated(error) or self._cannot_open(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            translated = self._translated(error)
            if translated is not None:
                raise translated from error

    @contextmanager
    def preview(self, manifest: Manifest) -> Iterator[Bundle]:
        """The bundle as it would be, to be opened and measured before ``commit``; gone when the block is left.

        Its files are further names of the bundle's and the new ones (copies where the file system has no hard links),
        in a directory inside ``path``.

        Args:
            manifest: As for ``commit``.

        Raises:
            BundleError: The manifest names a file that is neither there nor new.
            StorageError: Writing failed.
        """
        folder = self.path / "preview"
        new = [path for path in self.path.iterdir() if path.is_file()]
        known = self.bundle.full_manifest.files
        files = {**known, **{path.name: FileEntry(path.stat().st_size, "") for path in new}}
        complete = dataclasses.replace(manifest, files=files)
        check_references(complete)
        try:
            for name in known.keys() - self.bundle.missing:
                _give_name(self.bundle.file(name), folder / name)
            for path in new:
                _give_name(path, folder / path.name)
            yield Bundle(folder, complete, self.bundle.missing)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, manifest: Manifest, outdated: Collection[str] = ()) -> Bundle:
        """Publishes what was written.

        Args:
            manifest: The bundle's full one with whatever is new; the new files are added here. Missing files are
                listed on as long as a graph in it reads them: who left out a lost one gave it up.
            outdated: Files that nothing in it refers to any more: they go once it stands.

        Raises:
            BundleError: The manifest names a file that was not written.
            StorageError: A file of this name stands in the bundle already, or writing failed. Whatever is raised,
                nothing was added.
        """
        root, new = self.bundle.path, sorted(path for path in self.path.iterdir() if path.is_file())
        known = self.bundle.full_manifest.files
        taken = [path.name for path in new if path.name in known]
        if taken:
            what = f"The bundle has a file {taken[0]!r} already"
            raise StorageError(what, where=str(root), remedy="Export the model again to change what it holds")
        gone = {*outdated, *(self.bundle.missing - dispensable(manifest))}  # listed, these would be needed for good
        kept = {name: entry for name, entry in known.items() if name not in gone}
        files = {**kept, **{path.name: file_entry(path) for path in new}}
        freed = max((self.bundle.full_manifest.freed, *(name_number(name) for name in known.keys() - files.keys())))
        complete = dataclasses.replace(manifest, files=dict(sorted(files.items())), freed=freed)
        check_references(complete)
        text = json.dumps(to_dict(complete), indent=1, ensure_ascii=False, allow_nan=False)
        (self.path / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        fsync_tree(self.path)
        self._move_in(new)
        if self._lock is not None:
            os.fsync(self._lock)  # before the files go that the old manifest lists: after a crash it may be back
        for name in outdated:
            with suppress(OSError):  # they take room, no more
                (root / name).unlink()
        return Bundle.open(root)

    def _move_in(self, new: list[Path]) -> None:
        root, manifest = self.bundle.path, self.path / MANIFEST_NAME
        try:
            for path in new:
                os.replace(path, root / path.name)
            os.replace(manifest, root / MANIFEST_NAME)
        finally:
            if manifest.exists():  # it did not move: nobody knows of the others
                for path in new:
                    with suppress(OSError):
                        (root / path.name).unlink(missing_ok=True)

    def _release(self) -> None:
        self._sibling.remove()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _translated(self, error: OSError) -> StorageError | None:
        return as_storage_error(error, self.bundle.path, "Copy the bundle to a path")

    def _cannot_open(self, error: OSError) -> BundleError:
        remedy = "Give the directory that accel.export wrote"
        return BundleError(f"The bundle cannot be opened: {error.strerror}", where=str(self.bundle.path), remedy=remedy)


def _give_name(source: Path, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, name)
    except OSError:  # no hard links here, or none to another's file
        shutil.copyfile(source, name)


__all__ = ["BundleExtension"]
