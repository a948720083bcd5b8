"""One variant's graph for one target on its way into a bundle: lowered, written, checked."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accel.bundle import Bundle
from accel.errors import BundleError
from accel.manifest import GraphEntry, Manifest, ParityResult, Variant
from accel.scheme import Scheme
from accel.variant_checks import BASE, CANONICAL, check_precision, evaluated
from accel.variant_targets import Plan, Target, float_type

if TYPE_CHECKING:
    import onnx_ir as ir

    from accel.exporter.progress import ExportProgress

_log = logging.getLogger("accel")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass
class Addition:
    """Writes a variant's graph, and the weights that lie in no file yet, into a folder.

    Attributes:
        bundle: The bundle as it stands.
        folder: Where new files go.
        scheme: The variant's.
        target: Of its graph.
        progress: Shows stages.
    """

    bundle: Bundle
    folder: Path
    scheme: Scheme
    target: Target
    progress: ExportProgress

    @property
    def variant(self) -> str:
        """Its name in the bundle."""
        return self.scheme.name

    def make(self, check: bool) -> Manifest:
        """Writes the files; returns the manifest with them.

        Raises:
            ParityError: With ``check``: the graph differs from fp32 by more than the limit.
        """
        with _links_in_words():
            model, entry = self._write()
        manifest, name = self.bundle.manifest, f"{self.variant}/{self.target.name}"
        parity = {key: result for key, result in manifest.parity.items() if key != name}
        if check:
            self.progress.stage("Checking parity")
            parity[name] = self._check(model)
        dtype = DTYPES[self.scheme.base]
        old = manifest.variants.get(self.variant, Variant(dtype, (), {}))
        kept = [file for file in old.weights if file not in self.outdated()]
        weights = tuple(dict.fromkeys((*kept, *(entry.weights or ()))))
        new = dataclasses.replace(old, weights=weights, graphs={**old.graphs, self.target.name: entry})
        return dataclasses.replace(manifest, variants={**manifest.variants, self.variant: new}, parity=parity)

    def outdated(self) -> tuple[str, ...]:
        """The files of the graph that is lowered again; weights that other graphs read are left."""
        entry = self._graphs().get(self.target.name)
        if entry is None:
            return ()
        read = {name for _, target in self._others() for name in self.bundle.weights(self.variant, target)}
        read |= {parameter.file for parameter in self.bundle.manifest.parameters.values()}
        own = self.bundle.weights(self.variant, self.target.name)
        return (entry.file, *(name for name in own if name not in read))

    def _others(self) -> list[tuple[Path, str]]:
        """The variant's graphs for other targets, and these."""
        graphs = self._graphs().items()
        return [(self.bundle.file(graph.file), name) for name, graph in graphs if name != self.target.name]

    def _graphs(self) -> dict[str, GraphEntry]:
        found = self.bundle.manifest.variants.get(self.variant)
        return {} if found is None else found.graphs

    def _stem(self) -> str:
        """What the names of the weights that only this target reads begin with."""
        return f"{self.variant}.{self.target.name}" if self._others() else self.variant

    def _free(self, stem: str, ending: str) -> Path:
        """A file whose name the bundle has not: readers of the old one go on with it until the manifest is new."""
        numbers = (f".{number}" for number in itertools.count(2))
        names = (f"{stem}{number}{ending}" for number in itertools.chain([""], numbers))
        return self.folder / next(name for name in names if not self.bundle.has(name))

    def _write(self) -> tuple[ir.Model, GraphEntry]:
        from accel import __version__
        from accel.graph.external import StoredTensors, external_files, write_external
        from accel.graph.save import load_canonical, save_graph

        arch = self.bundle.manifest.arch
        self.progress.stage(f"Lowering to {self.target.title}, {self.variant}")
        canonical = self.bundle.graph(BASE, CANONICAL)
        model = load_canonical(self.bundle.file(canonical.file))
        model, passes = self.target.lower(model, arch, self._plan())
        self.progress.stage("Writing the weights")
        # Other precisions keep nothing in fp32's file: an engine's key covers the variant's own files alone.
        keep = self.bundle.path if self._reads_base() else None
        stored = StoredTensors(path for path, _ in self._others())
        write_external(model, self._free(self._stem(), ".weights"), keep, self.progress.advance, stored)
        names = tuple(f"layers.{index}.attention" for index in range(len(arch.layers)))
        graph = self._free(f"{self.variant}.{self.target.name}", ".onnx")
        entry = save_graph(model, graph, names, (*canonical.passes, *passes), __version__)
        return model, dataclasses.replace(entry, lowering=self.target.version, weights=external_files(model))

    def _plan(self) -> Plan:
        return Plan(self.scheme, parameters=frozenset(self.bundle.manifest.parameters if self._reads_base() else ()))

    def _reads_base(self) -> bool:
        """Whether the weights are fp32's own."""
        return self.scheme.base == BASE and not self.scheme.quantized

    def _check(self, model: ir.Model) -> ParityResult:
        session = evaluated(model, self.bundle, self.target, float_type(self.scheme))
        result = check_precision(self.bundle, self.scheme, self.target, session)
        name = f"{self.variant} for {self.target.title}"
        _log.info("%s: error %.1e of the largest value, limit %.1e", name, result.max_rel_error, result.limit)
        return result


@contextmanager
def _links_in_words() -> Iterator[None]:
    """onnx_ir reads no weights from files with several names: another could lie anywhere."""
    try:
        yield
    except ValueError as error:
        if "External data path" not in str(error):
            raise
        remedy = "Copy the bundle so that its files are files of their own: cp -r"
        raise BundleError(f"The weights cannot be read: {error}", where="fp32.weights", remedy=remedy) from error


__all__ = ["DTYPES", "Addition"]
