"""Takes a variant, or its graph for one target, out of a bundle, with the files that nothing else reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.errors import InputError
from accel.lost_files import EXPORTED, files_of, graph_keys, weights_of
from accel.manifest import Manifest
from accel.scheme import full_name


def drop_variant(bundle: Bundle | str | Path, variant: str, *, target: str | None = None) -> Bundle:
    """Takes a variant, or its graph for one target, out of a bundle, with its records; one whose files are missing too.

    Weight files go that no graph of another variant or target reads. The manifest is replaced first: whenever this is
    interrupted, the bundle is whole, and at worst files that it does not list take up room. Engines that were built
    from it stay in their store.

    Args:
        bundle: A bundle or its directory; its other variants stay as they are.
        variant: Its name.
        target: The graph's; None: all of the variant.

    Returns:
        The bundle, opened anew.

    Raises:
        InputError: The bundle has no such variant or graph, or it is what the export wrote, which all others need.
        BundleError: The bundle is damaged beyond its variants, or a file is there and wrong: delete that one first.
        StorageError: Writing failed; nothing was taken out.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    check_drop(opened, variant, target)
    with BundleExtension(opened) as extension:
        name, targets = check_drop(extension.bundle, variant, target)  # as it stands now
        manifest = extension.bundle.full_manifest
        left = _without(manifest, name, targets)
        return extension.commit(left, sorted(_read(manifest) - _read(left)))


def check_drop(bundle: Bundle, variant: str, target: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The variant's name in the bundle, and the targets whose graphs would go.

    Raises:
        InputError: As ``drop_variant``.
    """
    name = _find(bundle, variant)
    graphs = bundle.full_manifest.variants[name].graphs
    if target is not None and target not in list(graphs):  # a list is no key
        what = f"The variant {name!r} has no graph for target {target!r}"
        raise InputError(what, where="target", remedy=f"It has: {', '.join(graphs) or 'none'}")
    targets = tuple(graphs) if target is None else (target,)
    if any((name, one) in EXPORTED for one in targets):
        added = [one for one in graphs if (name, one) not in EXPORTED]
        others = ", ".join(other for other in bundle.full_manifest.variants if other != name)
        alone = f"Variants that can be dropped: {others}" if others else "No variant was added that could be dropped"
        remedy = f"Name the target of a graph that was added to it: {', '.join(added)}" if added else alone
        what = f"{name} is what the export wrote, and all other variants are made from it"
        raise InputError(what, where="variant", remedy=remedy)
    return name, targets


def _find(bundle: Bundle, variant: str) -> str:
    """The name by which the bundle has a variant: ``kv8`` is short for ``fp32+kv8``."""
    known = list(bundle.full_manifest.variants)
    name = variant if variant in known else full_name(variant)
    if name not in known:
        what = f"The bundle has no variant {variant!r}"
        raise InputError(what, where=str(bundle.path), remedy=f"It has: {', '.join(known)}")  # a guess would be dropped
    return name


def _without(manifest: Manifest, name: str, targets: Collection[str]) -> Manifest:
    """The manifest without a variant's graphs; the variant goes with its last one."""
    owner = manifest.variants[name]
    graphs = {target: graph for target, graph in owner.graphs.items() if target not in targets}
    read = {file for target in graphs for file in weights_of(manifest, name, target)}
    kept = dataclasses.replace(owner, graphs=graphs, weights=tuple(file for file in owner.weights if file in read))
    variants = {**manifest.variants, name: kept}
    if not graphs:
        del variants[name]
    gone = {f"{name}/{target}" for target in targets}
    parity = {key: result for key, result in manifest.parity.items() if key not in gone}
    return dataclasses.replace(manifest, variants=variants, parity=parity)


def _read(manifest: Manifest) -> set[str]:
    """All files that graphs, variants and parameters speak of; not the tokenizer's and the like."""
    listed: Iterable[str] = (file for variant in manifest.variants.values() for file in variant.weights)
    graphs = (file for key in graph_keys(manifest) for file in files_of(manifest, *key))
    return {*listed, *graphs, *(entry.file for entry in manifest.parameters.values())}


__all__ = ["check_drop", "drop_variant"]
