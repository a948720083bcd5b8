"""Files of a bundle that are gone: which graphs they take with them, and the manifest as it is without those.

What an export wrote cannot be made again from the rest; graphs that were added later can, so a bundle that lost files
of such graphs alone still serves all others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from accel.manifest import Manifest, Variant

GraphKey = tuple[str, str]  # variant, target
_NUMBERED = re.compile(r"\.(\d+)\.(?:onnx|weights)$")
# Every variant is made from the first, judged by the second, and both are written by an export alone.
EXPORTED: tuple[GraphKey, ...] = (("fp32", "canonical"), ("fp32", "ort-cpu"))


def weights_of(manifest: Manifest, variant: str, target: str) -> tuple[str, ...]:
    """The weight files that a graph reads: see ``Bundle.weights``."""
    owner = manifest.variants[variant]
    recorded = owner.graphs[target].weights
    if recorded is not None:
        return recorded
    others = tuple(f"{variant}.{other}." for other in owner.graphs if other != target)
    return tuple(name for name in owner.weights if not name.startswith(others))


def files_of(manifest: Manifest, variant: str, target: str) -> tuple[str, ...]:
    """The files that a graph consists of: its own and its weights."""
    return (manifest.variants[variant].graphs[target].file, *weights_of(manifest, variant, target))


def graph_keys(manifest: Manifest) -> list[GraphKey]:
    """All graphs."""
    return [(name, target) for name, variant in manifest.variants.items() for target in variant.graphs]


def dispensable(manifest: Manifest) -> set[str]:
    """The files that only graphs read which were added to what the export wrote."""
    keys = graph_keys(manifest)
    added = {file for key in keys if key not in EXPORTED for file in files_of(manifest, *key)}
    exported = {file for key in keys if key in EXPORTED for file in files_of(manifest, *key)}
    return added - exported - {entry.file for entry in manifest.parameters.values()}


def lost_graphs(manifest: Manifest, missing: Collection[str]) -> dict[GraphKey, tuple[str, ...]]:
    """The graphs that cannot run any more -> the files that each of them lacks."""
    found = {key: tuple(file for file in files_of(manifest, *key) if file in missing) for key in graph_keys(manifest)}
    return {key: files for key, files in found.items() if files}


def name_number(file: str) -> int:
    """The number in a graph's or weight file's name; 1: a plain one."""
    found = _NUMBERED.search(file)
    return int(found[1]) if found else 1


def without_lost(manifest: Manifest, missing: Collection[str]) -> Manifest:
    """The manifest of what is left: variants without a graph are none."""
    if not missing:
        return manifest
    lost, variants = lost_graphs(manifest, missing), dict[str, Variant]()
    for name, variant in manifest.variants.items():
        graphs = {target: graph for target, graph in variant.graphs.items() if (name, target) not in lost}
        if graphs:
            weights = tuple(file for file in variant.weights if file not in missing)
            variants[name] = dataclasses.replace(variant, graphs=graphs, weights=weights)
    files = {name: entry for name, entry in manifest.files.items() if name not in missing}
    return dataclasses.replace(manifest, variants=variants, files=files)


__all__ = [
    "EXPORTED",
    "GraphKey",
    "dispensable",
    "files_of",
    "graph_keys",
    "lost_graphs",
    "name_number",
    "weights_of",
    "without_lost",
]
