"""The files of one graph of a variant: which stored weights it may read, what new ones are called, which ones go."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from accel.bundle import Bundle
from accel.manifest import GraphEntry, Variant
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
        """The variant's, by their targets."""
        found = self.bundle.manifest.variants.get(self.scheme.name)
        return {} if found is None else found.graphs

    @property
    def others(self) -> list[str]:
        """The other targets that the variant has graphs for."""
        return [name for name in self.graphs if name != self.target.name]

    @property
    def reads_base(self) -> bool:
        """Whether the weights are fp32's own; a GPU's are in fp16 where caches are integers."""
        return self.target.rounds or self.scheme.lossless or (self.target.name == CPU and not self.scheme.quantized)

    def stored(self) -> list[Path]:
        """The graphs whose tensors this one reads where they are the same."""
        paths = [self.bundle.file(self.graphs[name].file) for name in self.others]
        # What fp32's graph for this target packed.
        packed = self.bundle.variant(BASE).graphs.get(self.target.name) if self.reads_base else None
        return paths if packed is None else [*paths, self.bundle.file(packed.file)]

    def new_weights(self, folder: Path) -> Path:
        """Where tensors go that lie in no file yet; the name says so where only this target reads them."""
        name = self.scheme.name
        return self._free(folder, f"{name}.{self.target.name}" if self.others else name, ".weights")

    def new_graph(self, folder: Path) -> Path:
        """Where the graph goes."""
        return self._free(folder, f"{self.scheme.name}.{self.target.name}", ".onnx")

    def _free(self, folder: Path, stem: str, ending: str) -> Path:
        """A file whose name the bundle has not: readers of the old one go on with it until the manifest is new."""
        numbers = (f".{number}" for number in itertools.count(2))
        names = (f"{stem}{number}{ending}" for number in itertools.chain([""], numbers))
        return folder / next(name for name in names if not self.bundle.has(name))

    def of_variant(self, new: GraphEntry) -> tuple[str, ...]:
        """The variant's own weight files once it has the new graph."""
        manifest, variant = self.bundle.manifest, self.scheme.name
        old = manifest.variants.get(variant, Variant("", (), {}))
        kept = [file for file in old.weights if file not in self.outdated()]
        # fp32's own file, read by another precision's graph, is no file of that precision: engines' keys would change.
        lent = manifest.variants[BASE].weights if variant != BASE and self.target.rounds else ()
        return tuple(dict.fromkeys((*kept, *(file for file in new.weights or () if file not in lent))))

    def outdated(self) -> tuple[str, ...]:
        """The files of the graph that is lowered again; weights that other graphs read are left."""
        entry = self.graphs.get(self.target.name)
        if entry is None:
            return ()
        read = {name for target in self.others for name in self.bundle.weights(self.scheme.name, target)}
        read |= {parameter.file for parameter in self.bundle.manifest.parameters.values()}
        own = self.bundle.weights(self.scheme.name, self.target.name)
        return (entry.file, *(name for name in own if name not in read))


__all__ = ["GraphFiles"]
