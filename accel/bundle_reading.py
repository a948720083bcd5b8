"""Reading a bundle's manifest and files, with whatever is wrong with them said; nothing is executed or unpickled."""

from __future__ import annotations

import hashlib
import json
import shlex
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from accel.errors import BundleError
from accel.manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest
from accel.schema import from_dict
from accel.spec import ArchSpec

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


def read_json(path: Path) -> Any:
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


def read_manifest(root: Path) -> Manifest:
    if not (root / MANIFEST_NAME).exists():
        remedy = "Give the directory that accel.export wrote; a model folder must be exported first"
        raise BundleError(f"The directory is no bundle: it has no {MANIFEST_NAME}", where=str(root), remedy=remedy)
    path = inside(root, MANIFEST_NAME)
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or type(version) is not int:  # before the fields: another schema has other fields
        what = f"The bundle has schema version {version!r}; this accel reads version {SCHEMA_VERSION}"
        newer = type(version) is int and version > SCHEMA_VERSION
        raise BundleError(what, where=str(path), remedy="Upgrade: pip install -U accelrt" if newer else RE_EXPORT)
    return from_dict(Manifest, data, str(path))


def check_sizes(arch: ArchSpec) -> None:
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


def inside(root: Path, name: str) -> Path:
    """``root / name``, refused when the name or a link in it leaves ``root`` (which is resolved)."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    unsafe = not posix.parts or "\\" in name or "\0" in name or ".." in posix.parts
    if unsafe or posix.is_absolute() or windows.drive or posix.as_posix() != name:
        what = f"The manifest names an unsafe path {name!r}"
        raise BundleError(what, where=str(root), remedy="Do not use this bundle; get it from a source that you trust")
    path = root / name
    try:
        stays = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:  # a loop of links
        raise BundleError(f"Cannot follow {name!r}: {error}", where=str(root), remedy=RE_EXPORT) from error
    if not stays:
        what = f"The file {name!r} is a link that leads out of the bundle"
        raise BundleError(what, where=str(root), remedy="Replace the link by the file that it points to")
    return path


def check_file(root: Path, name: str, entry: FileEntry, verify: bool, dispensable: bool) -> bool:
    """Whether the file is there; what is there must be right."""
    path = inside(root, name)
    remedy = RE_EXPORT
    if dispensable:
        mend = f"then accel inspect {root} says what makes these again, or drops them"
        remedy += f"; or delete it (rm {shlex.quote(str(path))}): all but its own graphs run without it, {mend}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError("The bundle's file is not a regular file", where=str(path), remedy=RE_EXPORT)
        if status.st_size != entry.size:
            kind = "truncated" if status.st_size < entry.size else "longer than it was"
            what = f"The file is {kind}: {status.st_size:,} bytes instead of {entry.size:,}"
            raise BundleError(what, where=str(path), remedy=remedy)
        if verify and _sha256(path) != entry.sha256:
            raise BundleError("The file is corrupt: its sha256 differs", where=str(path), remedy=remedy)
    except FileNotFoundError:
        return False
    except OSError as error:
        remedy = "Check the file's permissions"
        raise BundleError(f"Cannot read the file: {error.strerror}", where=str(path), remedy=remedy) from error
    return True


__all__ = [
    "ITEM_BYTES",
    "RE_EXPORT",
    "check_file",
    "check_references",
    "check_sizes",
    "file_entry",
    "inside",
    "read_json",
    "read_manifest",
]
