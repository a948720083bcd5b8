"""The bundle: one flat directory with a manifest, graphs, weights and tokenizer files.

Reading never executes or unpickles anything. Writing goes to a temporary sibling that is
renamed at the end, so that a killed export leaves nothing half made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Self

from accel.errors import BundleError, InputError, StorageError
from accel.manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, GraphEntry, Manifest, Variant
from accel.refusals import how_to_get
from accel.schema import from_dict, suggest, to_dict
from accel.scheme import BASES, QUANTIZED, suggest_variant
from accel.spec import ArchSpec
from accel.storage import TemporarySibling, as_storage_error, fsync_tree

MAX_JSON_BYTES = 64 << 20  # the manifest of a large model has some 1e4 entries; a weight file is not read as JSON
ITEM_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "float8_e4m3fn": 1,
    "uint8": 1,
    "bool": 1,
}
MAX_SIZE = 1 << 28  # of a vocabulary, width or position count; far above every model there is
RE_EXPORT = "Export the model again, or copy the bundle again from its source"


class Bundle:
    """An opened bundle. Immutable; holds no file open.

    Attributes:
        path: The directory, resolved.
        manifest: Its manifest, checked.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Bundle:
        """Opens a bundle and checks it.

        Args:
            path: The bundle's directory.
            verify: Also read every file and compare its sha256. Sizes are always compared.

        Raises:
            InputError: The path is empty, or none.
            BundleError: No bundle there; junk or unknown manifest; a file is missing, truncated, too long,
                corrupt, or outside the directory.
        """
        if not isinstance(path, (str, os.PathLike)) or path == "":  # Path("") would be the current directory
            remedy = "Give the directory that accel.export wrote"
            raise InputError(f"{path!r} is not the path of a bundle", where="bundle", remedy=remedy)
        root = Path(path).expanduser()
        if not root.is_dir():
            remedy = "Give the directory that accel.export wrote"
            raise BundleError("There is no bundle directory", where=str(root), remedy=remedy)
        root = root.resolve()
        bundle = cls(root, _read_manifest(root))
        _check_sizes(bundle.manifest.arch)
        check_references(bundle.manifest)
        for name, entry in bundle.manifest.files.items():
            _check_file(root, name, entry, verify)
        return bundle

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file of this name."""
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a listed file, checked to stay inside the directory.

        Raises:
            BundleError: The manifest does not list it, or it leads outside.
        """
        if name not in self.manifest.files:
            known = suggest(name, list(self.manifest.files))
            raise BundleError(f"The bundle has no file {name!r}", where=str(self.path), remedy=known)
        return _inside(self.path, name)

    def read_json(self, name: str) -> Any:
        """Parses a listed JSON file.

        Raises:
            BundleError: Not listed, or not JSON.
        """
        return _read_json(self.file(name))

    def variant(self, name: str) -> Variant:
        """One precision of the model.

        Raises:
            BundleError: The bundle has no such variant; lists those it has, with the command that adds it, where some
                target runs it, or the nearest name; of a cache's also what goes beside it on other targets.
        """
        try:
            return self.manifest.variants[name]
        except (KeyError, TypeError):  # TypeError: a list, say
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
            BundleError: No such variant or target; lists those there are.
        """
        graphs = self.variant(variant).graphs
        if target not in graphs:
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
        entry, all_files = self.graph(variant, target), self.variant(variant)
        if entry.weights is not None:
            return entry.weights
        others = tuple(f"{variant}.{other}." for other in all_files.graphs if other != target)
        return tuple(name for name in all_files.weights if not name.startswith(others))


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


def _has_manifest(folder: Path) -> bool:
    """Whether a manifest of ours lies there: other programs have files of that name too."""
    try:
        data = _read_json(folder / MANIFEST_NAME)
    except BundleError:
        return False
    return isinstance(data, dict) and {"schema_version", "accel_version", "files"} <= data.keys()


def _cannot_create(error: OSError, out: Path) -> StorageError:
    what = f"The output directory cannot be made: {error.strerror}"
    return StorageError(what, where=str(out), remedy="Give another output path")


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    return FileEntry(size=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BundleError("The JSON file is too large to be one", where=str(path), remedy=RE_EXPORT)
        text = path.read_bytes().decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except OSError as error:
        remedy = "Check that the file exists and may be read"
        raise BundleError(f"Cannot read the file: {error.strerror}", where=str(path), remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"The file is not valid JSON: {error}", where=str(path), remedy=RE_EXPORT) from error


def _read_manifest(root: Path) -> Manifest:
    if not (root / MANIFEST_NAME).exists():
        remedy = "Give the directory that accel.export wrote; a model folder must be exported first"
        raise BundleError(f"The directory is no bundle: it has no {MANIFEST_NAME}", where=str(root), remedy=remedy)
    path = _inside(root, MANIFEST_NAME)
    data = _read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or type(version) is not int:  # before the fields: another schema has other fields
        what = f"The bundle has schema version {version!r}; this accel reads version {SCHEMA_VERSION}"
        newer = type(version) is int and version > SCHEMA_VERSION
        raise BundleError(what, where=str(path), remedy="Upgrade: pip install -U accelrt" if newer else RE_EXPORT)
    return from_dict(Manifest, data, str(path))


def _check_sizes(arch: ArchSpec) -> None:
    """The numbers that buffers and tables are made from are sizes."""
    sizes = {"hidden_size": arch.hidden_size, "vocab_size": arch.vocab_size, "max_positions": arch.max_positions}
    for index, layer in enumerate(arch.layers):
        for name in ("heads", "kv_heads", "head_dim"):
            sizes[f"layers[{index}].{name}"] = getattr(layer, name)
    for name, size in sizes.items():
        if not 1 <= size <= MAX_SIZE:
            raise BundleError(f"arch.{name} is {size}, which is no size", where=MANIFEST_NAME, remedy=RE_EXPORT)


def check_references(manifest: Manifest) -> None:
    """Every file that the manifest speaks of is listed, and every parameter lies inside its file.

    Raises:
        BundleError: One is not.
    """
    wanted = {name for variant in manifest.variants.values() for name in variant.weights}
    graphs = [graph for variant in manifest.variants.values() for graph in variant.graphs.values()]
    wanted |= {name for graph in graphs for name in (graph.file, *(graph.weights or ()))}
    wanted |= {entry.file for entry in manifest.parameters.values()}
    for name in sorted(wanted - set(manifest.files)):
        raise BundleError(f"The manifest uses {name!r} but does not list it", where=MANIFEST_NAME, remedy=RE_EXPORT)
    for name, entry in manifest.parameters.items():
        size = ITEM_BYTES.get(entry.dtype)
        if size is None:
            what = f"Parameter {name!r} has unknown dtype {entry.dtype!r}"
            raise BundleError(what, where=MANIFEST_NAME, remedy=RE_EXPORT)
        for dimension in entry.shape:
            size *= dimension
        bad = entry.offset < 0 or min(entry.shape, default=0) < 0
        if bad or entry.offset + size > manifest.files[entry.file].size:
            what = f"Parameter {name!r} lies outside {entry.file!r}"
            raise BundleError(what, where=MANIFEST_NAME, remedy=RE_EXPORT)
    for name, target in manifest.tied.items():
        if target not in manifest.parameters:
            what = f"Parameter {name!r} is tied to {target!r}, which is not listed"
            raise BundleError(what, where=MANIFEST_NAME, remedy=RE_EXPORT)


def _inside(root: Path, name: str) -> Path:
    """``root / name``, refused when the name or a link in it leaves ``root`` (which is resolved)."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    unsafe = not posix.parts or "\\" in name or "\0" in name or ".." in posix.parts
    if unsafe or posix.is_absolute() or windows.drive or posix.as_posix() != name:
        what = f"The manifest names an unsafe path {name!r}"
        raise BundleError(what, where=str(root), remedy="Do not use this bundle; get it from a source that you trust")
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:  # a loop of links
        raise BundleError(f"Cannot follow {name!r}: {error}", where=str(root), remedy=RE_EXPORT) from error
    if not inside:
        what = f"The file {name!r} is a link that leads out of the bundle"
        raise BundleError(what, where=str(root), remedy="Replace the link by the file that it points to")
    return path


def _check_file(root: Path, name: str, entry: FileEntry, verify: bool) -> None:
    path = _inside(root, name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError("The bundle's file is not a regular file", where=str(path), remedy=RE_EXPORT)
        if status.st_size != entry.size:
            kind = "truncated" if status.st_size < entry.size else "longer than it was"
            what = f"The file is {kind}: {status.st_size:,} bytes instead of {entry.size:,}"
            raise BundleError(what, where=str(path), remedy=RE_EXPORT)
        if verify and _sha256(path) != entry.sha256:
            raise BundleError("The file is corrupt: its sha256 differs", where=str(path), remedy=RE_EXPORT)
    except FileNotFoundError as error:
        raise BundleError("A file of the bundle is missing", where=str(path), remedy=RE_EXPORT) from error
    except OSError as error:
        remedy = "Check the file's permissions"
        raise BundleError(f"Cannot read the file: {error.strerror}", where=str(path), remedy=remedy) from error


__all__ = ["Bundle", "BundleWriter", "check_references", "file_entry"]
