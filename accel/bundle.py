"""The bundle: one flat directory with a manifest, graphs, weights and tokenizer files.

Reading never executes or unpickles anything. Writing goes to a temporary sibling that is
renamed at the end, so that a killed export leaves nothing half made.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accel.bundle_reading import (
    ITEM_BYTES,
    RE_EXPORT,
    check_file,
    check_references,
    check_sizes,
    file_entry,
    inside,
    read_json,
    read_manifest,
)
from accel.errors import BundleError, InputError, StorageError
from accel.lost_files import dispensable, lost_graphs, weights_of, without_lost
from accel.manifest import MANIFEST_NAME, SCHEMA_VERSION, GraphEntry, Manifest, Variant
from accel.recorded_choices import options_of
from accel.refusals import how_to_get, how_to_mend
from accel.schema import suggest, to_dict
from accel.scheme import BASES, QUANTIZED, full_name, suggest_variant
from accel.storage import TemporarySibling, as_storage_error, fsync_tree


class Bundle:
    """An opened bundle. Immutable; holds no file open.

    Attributes:
        path: The directory, resolved.
        manifest: Its manifest, checked, without the graphs whose files are lost: what can be run.
        full_manifest: As it is written: what a new manifest is made from.
        missing: Listed files that are not there.
        lost: (variant, target) of each graph that reads such files -> these.
    """

    def __init__(self, path: Path, manifest: Manifest, missing: Collection[str] = ()) -> None:
        self.path, self.full_manifest, self.missing = path, manifest, frozenset(missing)
        self.manifest, self.lost = without_lost(manifest, missing), lost_graphs(manifest, missing)

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Bundle:
        """Opens a bundle and checks it.

        Files that are missing, and that only graphs read which were added to what the export wrote, cost those graphs
        alone: see ``lost``.

        Args:
            path: The bundle's directory.
            verify: Also read every file and compare its sha256; all must be there. Sizes are always compared.

        Raises:
            InputError: The path is empty, or none.
            BundleError: No bundle there; junk or unknown manifest; a file that all need is missing, or one is
                truncated, too long, corrupt, or outside the directory.
        """
        if not isinstance(path, (str, os.PathLike)) or path == "":  # Path("") would be the current directory
            remedy = "Give the directory that accel.export wrote"
            raise InputError(f"{path!r} is not the path of a bundle", where="bundle", remedy=remedy)
        root = Path(path).expanduser()
        if not root.is_dir():
            remedy = "Give the directory that accel.export wrote"
            raise BundleError("There is no bundle directory", where=str(root), remedy=remedy)
        root = root.resolve()
        manifest = read_manifest(root)
        check_sizes(manifest.arch)
        check_references(manifest)
        spare = dispensable(manifest)
        found = {name: check_file(root, name, entry, verify, name in spare) for name, entry in manifest.files.items()}
        bundle = cls(root, manifest, [name for name, is_there in found.items() if not is_there])
        if bundle.missing and read_manifest(root) != manifest:  # not lost: somebody replaced them meanwhile
            return cls.open(root, verify)
        bundle._check_missing(spare, verify)
        return bundle

    def _check_missing(self, spare: Collection[str], verify: bool) -> None:
        """Refuses a bundle of which not all is there that must be: what the export wrote, and with ``verify`` all."""
        needed = [name for name in self.full_manifest.files if name in self.missing and name not in spare]
        for name in needed:
            raise BundleError("A file of the bundle is missing", where=str(self.path / name), remedy=RE_EXPORT)
        if self.lost and verify:
            (variant, target), files = next(iter(self.lost.items()))
            remedy = self._how_to_mend(variant, (target,))
            raise BundleError("A file of the bundle is missing", where=str(self.path / files[0]), remedy=remedy)

    @property
    def whole(self) -> Bundle:
        """The bundle as if no file were lost, to tell what would run then; its files may not be there."""
        return Bundle(self.path, self.full_manifest) if self.lost else self

    def lost_reason(self, variant: str, target: str) -> str | None:
        """Why a graph that the manifest lists cannot run, with the commands that mend it; None: it lacks no file."""
        files = self.lost.get((variant, target))
        if files is None:
            return None
        return f"{_missing(files)}: {self._how_to_mend(variant, (target,))}"

    def refuse_lost(self, variant: str, target: str | None = None) -> None:
        """Refuses a graph, or all of a variant's, that files are lost of.

        Raises:
            BundleError: They are; names them, and the commands that make the graphs again, and that drop them.
        """
        names = {variant, full_name(variant)} if isinstance(variant, str) else ()
        keys = [key for key in self.lost if key[0] in names and target in (None, key[1])]
        if not keys:
            return
        targets, files = [key[1] for key in keys], dict.fromkeys(file for key in keys for file in self.lost[key])
        name = keys[0][0]
        what = f"The variant {name!r} cannot run for {' and '.join(targets)}: {_missing(tuple(files))}"
        raise BundleError(what, where=str(self.path), remedy=self._how_to_mend(name, targets))

    def _how_to_mend(self, variant: str, targets: Sequence[str]) -> str:
        whole = set(targets) == self.full_manifest.variants[variant].graphs.keys()
        options, left_out = options_of(self.full_manifest, variant)
        return how_to_mend(self.path, self.manifest.arch.kind, variant, targets, whole, options, left_out)

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file of this name; it may be lost."""
        return name in self.full_manifest.files

    def file(self, name: str) -> Path:
        """The path of a listed file, checked to stay inside the directory.

        Raises:
            BundleError: The manifest does not list it, or it leads outside.
        """
        if not self.has(name):
            known = suggest(name, list(self.manifest.files))
            raise BundleError(f"The bundle has no file {name!r}", where=str(self.path), remedy=known)
        return inside(self.path, name)

    def read_json(self, name: str) -> Any:
        """Parses a listed JSON file.

        Raises:
            BundleError: Not listed, or not JSON.
        """
        return read_json(self.file(name))

    def variant(self, name: str) -> Variant:
        """One precision of the model.

        Raises:
            BundleError: The bundle has no such variant; lists those it has, with the command that adds it, where some
                target runs it, or the nearest name; of a cache's also what goes beside it on other targets. Or it lost
                files of all its graphs; names them, and what mends it.
        """
        try:
            return self.manifest.variants[name]
        except (KeyError, TypeError):  # TypeError: a list, say
            self.refuse_lost(name)
            have = f"It has: {', '.join(self.manifest.variants) or 'none'}"
            remedy = f"{have}. {self._how_to_get(name)}"
            raise BundleError(f"The bundle has no variant {name!r}", where=str(self.path), remedy=remedy) from None

    def _how_to_get(self, name: str) -> str:
        """How to come by a variant that is not there: added, or called by its right name."""
        if not isinstance(name, str):
            return "Give one of these names"
        graphs = {known: tuple(variant.graphs) for known, variant in self.manifest.variants.items()}
        try:
            return how_to_get(self.path, self.manifest.arch.kind, name, graphs)
        except InputError:
            return suggest_variant(name, list(dict.fromkeys([*graphs, *BASES, *QUANTIZED])))

    def graph(self, variant: str, target: str) -> GraphEntry:
        """The graph of a variant for a target such as ``canonical`` or ``ort-cpu``.

        Raises:
            BundleError: No such variant or target; lists those there are. Or files of it are lost.
        """
        graphs = self.variant(variant).graphs
        if target not in graphs:
            self.refuse_lost(variant, target)
            have = ", ".join(graphs) or "none"
            what = f"Variant {variant!r} has no graph for target {target!r}"
            raise BundleError(what, where=str(self.path), remedy=f"It has: {have}")
        return graphs[target]

    def weights(self, variant: str, target: str) -> tuple[str, ...]:
        """The weight files that a graph reads.

        Where the manifest does not say: the variant's, without those that were written for another target.

        Raises:
            BundleError: No such variant or target.
        """
        self.graph(variant, target)
        return weights_of(self.full_manifest, variant, target)


class BundleWriter:
    """Writes a bundle: a context manager around a temporary sibling of ``out``.

    Files are written into ``.path``; ``.commit(manifest)`` hashes and syncs them, writes the
    manifest and renames the sibling to ``out``. Leaving the block in any other way (an
    exception, Ctrl-C, no commit) removes the sibling. Siblings that killed writers of the same
    ``out`` left behind are removed on entry.

    Args:
        out: Where the bundle shall stand.
        overwrite: Replace a bundle that stands there. Only a bundle or an empty directory is ever replaced.

    Raises:
        StorageError: ``out`` exists and may not be replaced; disk full, no permission, read-only.
    """

    def __init__(self, out: str | Path, overwrite: bool = False) -> None:
        self.out = Path(out).expanduser().resolve()
        self.overwrite = overwrite
        self._sibling = TemporarySibling(self.out)

    @property
    def path(self) -> Path:
        """The temporary directory to write into."""
        return self._sibling.path

    def __enter__(self) -> Self:
        self._check_target()
        try:
            self._sibling.create()
        except OSError as error:
            self._sibling.remove()
            raise as_storage_error(error, self.out.parent) or _cannot_create(error, self.out) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sibling.remove()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            translated = as_storage_error(error, self.out.parent)
            if translated is not None:
                raise translated from error

    def commit(self, manifest: Manifest) -> Bundle:
        """Publishes what was written.

        Args:
            manifest: The manifest; its ``files`` are filled in here from the directory.

        Raises:
            BundleError: The manifest names a file that was not written.
            StorageError: Disk full, no permission, or ``out`` was created meanwhile.
        """
        files = {
            p.relative_to(self.path).as_posix(): file_entry(p) for p in sorted(self.path.rglob("*")) if p.is_file()
        }
        files.pop(MANIFEST_NAME, None)
        complete = dataclasses.replace(manifest, schema_version=SCHEMA_VERSION, files=files)
        check_references(complete)
        text = json.dumps(to_dict(complete), indent=1, ensure_ascii=False, allow_nan=False)
        (self.path / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        fsync_tree(self.path)
        self._check_target()
        self._sibling.publish()
        return Bundle(self.out, complete)

    def _check_target(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise StorageError("The output path is a file", where=str(self.out), remedy="Give another path")
        if not any(self.out.iterdir()):
            return
        if not _has_manifest(self.out):
            what = "The output directory has other files in it and is no bundle"
            raise StorageError(what, where=str(self.out), remedy="Give a new path; it is never deleted for you")
        if not self.overwrite:
            what = "A bundle already stands at the output path"
            raise StorageError(what, where=str(self.out), remedy="Pass overwrite=True (--overwrite), or another path")


def _missing(files: Sequence[str]) -> str:
    return f"its file {files[0]} is missing" if len(files) == 1 else f"its files {', '.join(files)} are missing"


def _has_manifest(folder: Path) -> bool:
    """Whether a manifest of ours lies there: other programs have files of that name too."""
    try:
        data = read_json(folder / MANIFEST_NAME)
    except BundleError:
        return False
    return isinstance(data, dict) and {"schema_version", "accel_version", "files"} <= data.keys()


def _cannot_create(error: OSError, out: Path) -> StorageError:
    what = f"The output directory cannot be made: {error.strerror}"
    return StorageError(what, where=str(out), remedy="Give another output path")


__all__ = ["ITEM_BYTES", "Bundle", "BundleWriter", "check_references", "file_entry"]
