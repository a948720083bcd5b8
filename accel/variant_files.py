"""The files of one graph of a variant: which stored weights it may read, what new ones are called, which ones go."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from accel.bundle import Bundle
from accel.lost_files import graph_keys, weights_of
from accel.manifest import GraphEntry
from accel.scheme import Scheme
from accel.variant_checks import BASE
from accel.variant_targets import CPU, Target


@dataclass(frozen=True)
class GraphFiles:
    """Those of a graph that is written, or written anew.

    Attributes:
        bundle: As it stands before.
        scheme: The variant's.
        target: The graph's.
    """

    bundle: Bundle
    scheme: Scheme
    target: Target

    @property
    def graphs(self) -> dict[str, GraphEntry]:
        """The variant's, by their targets; those whose files are lost too."""
        found = self.bundle.full_manifest.variants.get(self.scheme.name)
        return {} if found is None else found.graphs

    @property
    def others(self) -> list[str]:
        """The other targets that the variant has graphs for, whose files are there."""
        found = self.bundle.manifest.variants.get(self.scheme.name)
        return [] if found is None else [name for name in found.graphs if name != self.target.name]

    @property
    def reads_base(self) -> bool:
        """Whether the weights are fp32's own; a GPU's are in fp16 where caches are integers."""
        return self.target.rounds or self.scheme.lossless or (self.target.name == CPU and not self.scheme.quantized)

    def stored(self) -> list[Path]:
        """The graphs whose tensors this one reads where they are the same."""
        paths = [self.bundle.file(self.graphs[name].file) for name in self.others]
        if not self.reads_base or self.scheme.name == BASE:  # fp32's own graph for this target: the one that goes
            return paths
        packed = self.bundle.variant(BASE).graphs.get(self.target.name)  # its layouts of fp32's weights
        return paths if packed is None else [*paths, self.bundle.file(packed.file)]

    def kin(self) -> list[Path]:
        """Graphs for this target of variants that differ in the cache alone: their weights may well be the same."""
        if self.reads_base:  # so do they
            return []
        variants, name = self.bundle.manifest.variants, self.scheme.name
        alike = [one for one in variants if one != name and one.partition("+")[0] == name.partition("+")[0]]
        graphs = [variants[one].graphs.get(self.target.name) for one in sorted(alike)]  # first the one without cache
        return [self.bundle.file(graph.file) for graph in graphs if graph is not None]

    def new_weights(self, folder: Path) -> Path:
        """Where tensors go that lie in no file yet; the name says so where only this target reads them."""
        name = self.scheme.name
        return self._free(folder, f"{name}.{self.target.name}" if self.others else name, ".weights")

    def new_graph(self, folder: Path) -> Path:
        """Where the graph goes."""
        return self._free(folder, f"{self.scheme.name}.{self.target.name}", ".onnx")

    def _free(self, folder: Path, stem: str, ending: str) -> Path:
        """A file whose name the bundle has not and never had: who opened it before goes on with the old one, or fails.

        A name that is used again would give such a reader other integers.
        """
        numbers = itertools.count(self.bundle.full_manifest.freed + 1)
        names = (f"{stem}{'' if number == 1 else f'.{number}'}{ending}" for number in numbers)
        return folder / next(name for name in names if not self.bundle.has(name))

    def of_variant(self, new: GraphEntry) -> tuple[str, ...]:
        """The variant's own weight files once it has the new graph.

        Files that stood before and were not the variant's are no files of it, though the graph reads them: they would
        change the keys of engines of its other graphs, where the manifest does not say what those read.
        """
        known = self.bundle.full_manifest.variants.get(self.scheme.name)
        left = self._left(new, [self.scheme.name])
        kept = [] if known is None else [file for file in known.weights if file not in left]
        return tuple(dict.fromkeys((*kept, *(file for file in new.weights or () if not self.bundle.has(file)))))

    def outdated(self, new: GraphEntry) -> tuple[str, ...]:
        """The files of the graph that is lowered again; weights that another graph or the new one reads are left."""
        old = self.graphs.get(self.target.name)
        return () if old is None else (old.file, *self._left(new, self.bundle.full_manifest.variants))

    def _left(self, new: GraphEntry, variants: Collection[str]) -> tuple[str, ...]:
        """The weights of the graph that is lowered again which neither it nor other graphs of these variants read."""
        manifest, mine = self.bundle.full_manifest, (self.scheme.name, self.target.name)
        if self.target.name not in self.graphs:
            return ()
        read = {*(new.weights or ()), *(parameter.file for parameter in manifest.parameters.values())}
        others = [key for key in graph_keys(manifest) if key[0] in variants and key != mine]
        read |= {name for key in others for name in weights_of(manifest, *key)}
        return tuple(name for name in weights_of(manifest, *mine) if name not in read)


__all__ = ["GraphFiles"]
