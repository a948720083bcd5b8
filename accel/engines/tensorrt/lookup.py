"""Finds an engine for a bundle in the engine store."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.bundle import Bundle
from accel.engines.session import SessionOptions
from accel.engines.tensorrt.adapter import Flavour
from accel.engines.tensorrt.engine import EngineFacts
from accel.errors import BundleError, EngineUnavailableError, RefusedEngineError
from accel.sizes import parse_size
from accel.store import (
    EngineManifest,
    EngineStore,
    HashCache,
    StoredEngine,
    cache_folder,
    engine_identity,
    read_signer,
    read_verifier,
)
from accel.store.key import ShapeRange

_log = logging.getLogger("accel")
MAX_BYTES = "ACCEL_STORE_MAX_BYTES"
TARGET = "tensorrt"  # of the graph that both flavours are built from
PASSES = "1"  # of parsing and repair: raise it when the same graph makes another network
PRECISIONS = ("fp16", "bf16", "fp32")  # what a GPU prefers, where the bundle does not say


@dataclass(frozen=True)
class Sources:
    """The files that an engine is made from.

    Attributes:
        graph, weights: Their sha256, of the bytes that lie on the disk now.
        files: Name in the bundle -> sha256 in its manifest.
    """

    graph: str
    weights: str
    files: dict[str, str]


def hash_sources(bundle: Bundle, variant: str, hashes: HashCache | None = None) -> Sources:
    """Hashes a variant's TensorRT graph and weights; what was hashed before and has not changed is remembered.

    Raises:
        BundleError: The variant has no such graph, or a file is not what the manifest says.
    """
    hashes = hashes or HashCache()
    graph = bundle.graph(variant, TARGET).file
    names = bundle.weights(variant, TARGET)
    found = {name: hashes.sha256(bundle.file(name)) for name in (graph, *names)}
    listed = {name: bundle.manifest.files[name].sha256 for name in found}
    for name, digest in found.items():
        if digest != listed[name]:
            remedy = "Export the model again, or copy the bundle again from its source"
            raise BundleError("The file is corrupt: its sha256 differs", where=name, remedy=remedy)
    return Sources(found[graph], hashes.combined({name: bundle.file(name) for name in names}), listed)


def pick_precision(bundle: Bundle, variant: str) -> str | None:
    """The variant to run: the one asked for, else fp16, bf16, fp32, whichever has a TensorRT graph."""
    if variant != "auto":
        return variant if TARGET in bundle.variant(variant).graphs else None
    variants = bundle.manifest.variants
    return next((name for name in PRECISIONS if name in variants and TARGET in variants[name].graphs), None)


def passes_of(bundle: Bundle, variant: str) -> str | None:
    """What made a variant's graph and makes its network, as engines' keys say it; None: the bundle does not know.

    Raises:
        BundleError: The variant has no TensorRT graph.
    """
    lowering = bundle.graph(variant, TARGET).lowering
    return None if lowering is None else f"{lowering}.{PASSES}"


def open_store(url: str | Path | None = None, **options: Any) -> EngineStore:
    """The engine store: the one given, else ``ACCEL_STORE``, else a folder in this user's cache.

    Engines are code. With ``ACCEL_STORE_KEY`` (a file, or ``env:NAME``) engines without its signature are refused; a
    key that can sign signs what is put. ``ACCEL_STORE_MAX_BYTES``, e.g. ``20G``, limits the store's size.

    Raises:
        InputError: ``ACCEL_STORE_MAX_BYTES`` is no size.
        EngineStoreError, DependencyError: See ``EngineStore`` and ``read_verifier``.
    """
    place = url or os.environ.get("ACCEL_STORE") or cache_folder() / "engines"
    limit = os.environ.get(MAX_BYTES)
    if limit and "max_bytes" not in options:
        options = {**options, "max_bytes": parse_size(limit, MAX_BYTES)}
    source = os.environ.get("ACCEL_STORE_KEY")
    if source and "verifier" not in options and "signer" not in options:
        verifier = read_verifier(source)
        options = {
            **options,
            "verifier": verifier,
            **({"signer": read_signer(source)} if hasattr(verifier, "sign") else {}),
        }
    return EngineStore(place, **options)


def find_engine(
    store: EngineStore,
    bundle: Bundle,
    variant: str,
    flavour: Flavour,
    sm: str,
    options: SessionOptions,
    gpu: str | None = None,
) -> tuple[StoredEngine, EngineFacts]:
    """The stored engine that fits best: the smallest that holds what is asked; where nothing is asked, the largest.

    Among equals, one that was timed on a GPU of this name (``gpu``): another of its SM runs it too, but perhaps not as
    fast. One that is damaged, altered or not signed by the store's key is logged and passed over.
    One that other passes made, or that was built from other files, does not fit.

    Raises:
        EngineUnavailableError: The store has none; names the command that builds it.
    """
    sources = hash_sources(bundle, variant)
    identity = engine_identity(sources.graph, sources.weights, flavour.target, flavour.version, variant)
    passes = passes_of(bundle, variant)
    found = [manifest for manifest in store.find(identity) if _is_from(manifest, sources)]
    current = [manifest for manifest in found if manifest.key.passes == passes]
    fitting = [manifest for manifest in current if _fits(manifest, sm, options) and _takes(manifest, options)]
    for manifest in sorted(fitting, key=lambda manifest: _rank(manifest, options, gpu)):
        try:
            engine = store.get(manifest.key)
        except RefusedEngineError as error:
            _log.warning("a stored engine is passed over: %s", error)
            continue
        if engine is not None:
            return engine, facts_of(engine.manifest)
    command = f"accel build {bundle.path} --target {flavour.target} --sm {sm} --precision {variant}{_asked(options)}"
    remedy = f"Build it beforehand: {command}; or load with build='allow'"
    if found and not current:
        made = ", ".join(sorted({manifest.key.passes for manifest in found}))
        what = f"the store's engines of this bundle were made by passes {made}; its variant {variant} has {passes}"
        raise EngineUnavailableError(what, where=store.url, remedy=remedy)
    raise EngineUnavailableError(_reason(current, flavour, sm, options), where=store.url, remedy=remedy)


def _is_from(manifest: EngineManifest, sources: Sources) -> bool:
    """Whether an engine was built from these files, by its key and by what was noted when it was built."""
    key, noted = manifest.key, _sources(manifest)
    same = (key.graph, key.weights) == (sources.graph, sources.weights)
    return same and sorted(noted.values()) == sorted(sources.files.values())  # names differ between copies


def _sources(manifest: EngineManifest) -> dict[str, str]:
    """Files of the bundle that an engine was built from -> their sha256 then."""
    noted = manifest.facts.get("sources")
    return {str(name): str(digest) for name, digest in noted.items()} if isinstance(noted, dict) else {}


def facts_of(manifest: EngineManifest) -> EngineFacts:
    """What a session wants to know of a stored engine."""
    key, facts = manifest.key, manifest.facts
    return EngineFacts(
        target=key.target,
        version=key.library_version,
        sms=key.sm,
        size=manifest.size,
        profiles=tuple(facts.get("profile_order", sorted(key.profiles))),
        compatibility=facts.get("hardware_compatibility", "none"),
        sources=_sources(manifest),
    )


def _fits(manifest: EngineManifest, sm: str, options: SessionOptions) -> bool:
    portable = manifest.facts.get("hardware_compatibility") == "ampere+" and int(sm[2:]) >= 80
    if sm not in manifest.key.sm and not portable:
        return False
    capacity, rows = manifest.key.capacity, manifest.facts.get("max_batch", 1)
    enough = options.capacity is None or (capacity is not None and capacity >= options.capacity)
    return enough and (options.max_batch is None or rows >= options.max_batch)


def _takes(manifest: EngineManifest, options: SessionOptions) -> bool:
    """Whether a decoder's profiles take steps of single tokens, of the rows asked for."""
    ranges = _input_ranges(manifest)
    if manifest.key.capacity is None or not ranges:
        return True
    single = [(low[0], high[0]) for low, _, high in ranges if low[1] == 1]
    return any(options.max_batch is None or low <= options.max_batch <= high for low, high in single)


def _input_ranges(manifest: EngineManifest) -> list[ShapeRange]:
    return [inputs["input_ids"] for inputs in manifest.key.profiles.values() if "input_ids" in inputs]


def _rank(manifest: EngineManifest, options: SessionOptions, gpu: str | None) -> tuple[int, ...]:
    """Engines for this SM alone first; then by capacity (encoders: longest row) and rows, by the GPU they were timed
    on, and by the effort of their build."""
    longest = max((high[1] for _, _, high in _input_ranges(manifest)), default=0)
    capacity, rows = manifest.key.capacity or longest, int(manifest.facts.get("max_batch", 1))
    return (
        len(manifest.key.sm),
        -capacity if options.capacity is None else capacity,
        -rows if options.max_batch is None else rows,
        manifest.key.gpu not in (None, gpu),
        -manifest.key.optimization_level,
    )


def _reason(found: Sequence[EngineManifest], flavour: Flavour, sm: str, options: SessionOptions) -> str:
    if not found:
        return f"the store has no {flavour.title} {flavour.version} engine of this bundle"
    have = sorted({f"{'+'.join(m.key.sm)}, capacity {m.key.capacity}, batch {_batches(m)}" for m in found})
    return f"the store's engines of this bundle do not fit {sm}{_asked(options)}: it has {'; '.join(have)}"


def _batches(manifest: EngineManifest) -> str:
    """Rows that an engine takes: the most, and the least where its widest profile has one."""
    most = manifest.facts.get("max_batch", 1)
    least = min((low[0] for low, _, high in _input_ranges(manifest) if high[0] == most), default=1)
    return str(most) if least == 1 else f"{least} to {most}"


def _asked(options: SessionOptions) -> str:
    capacity = "" if options.capacity is None else f" --capacity {options.capacity}"
    return capacity + ("" if options.max_batch is None else f" --max-batch {options.max_batch}")


__all__ = [
    "PASSES",
    "PRECISIONS",
    "TARGET",
    "Sources",
    "facts_of",
    "find_engine",
    "hash_sources",
    "open_store",
    "passes_of",
    "pick_precision",
]
