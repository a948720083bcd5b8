"""Adds a precision, or its graph for another target, to a bundle."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.errors import BundleError, InputError, ParityError, StorageError
from accel.manifest import GraphEntry, Manifest, ParityResult, Variant
from accel.recipe import ParityRecipe
from accel.schema import suggest
from accel.variant_targets import DEFAULT, Target, find_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from accel.exporter.progress import ExportProgress

_log = logging.getLogger("accel")
CANONICAL, BASE = "canonical", "fp32"
# Largest error against fp32, relative to the largest value. Rounding alone costs MiniLM and SmolLM2 some 2e-3 in fp16
# and 2e-2 in bf16; a wrong graph costs more than half.
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
ROUNDING = 0.5  # an error above it is no rounding


def add_variant(
    bundle: Bundle | str | Path,
    variant: str,
    *,
    target: str = DEFAULT,
    check: bool = True,
    show_progress: bool | None = None,
) -> Bundle:
    """Adds a variant's graph for a target, and its weights, to a bundle, unless they are there.

    The graph is evaluated with PyTorch in its own precision and compared with the bundle's fp32 engine. Weights that
    the variant's graph for another target has stored already are read there. A graph that another version of the
    lowering wrote, or an accel that recorded no version, is lowered again: new files take the place of the old ones,
    which go.

    Args:
        bundle: A bundle or its directory; its other files stay as they are.
        variant: ``fp32``, ``fp16`` or ``bf16``.
        target: ``tensorrt``, ``cuda`` or ``ort-cuda``.
        check: Compare. Off only for graphs that are checked elsewhere.
        show_progress: Show stages on stderr; None: when it is a terminal.

    Returns:
        The bundle, opened anew.

    Raises:
        InputError: An unknown variant or target.
        ParityError: The rounding, or the graph, costs more than the limit; nothing was added.
        BundleError: It is damaged, its weight file has hard links, or an outdated variant cannot be lowered again.
        ExportError: A weight exceeds the variant's range, or a layer has no lowering.
        StorageError: Writing failed; nothing was added.
    """
    if variant not in LIMITS:
        raise InputError(f"unknown variant {variant!r}", where="variant", remedy=suggest(variant, list(LIMITS)))
    chosen = find_target(target)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if is_current(opened, variant, target):
        return opened
    with _outdated_in_words(opened, variant, target):
        from accel.exporter.progress import ExportProgress

        with BundleExtension(opened) as extension, ExportProgress(show_progress) as progress:
            if is_current(extension.bundle, variant, target):  # another process was faster
                return extension.bundle
            addition = _Addition(extension.bundle, extension.path, variant, chosen, progress)
            manifest = addition.make(check)
            progress.stage("Hashing and syncing")
            return extension.commit(manifest, addition.outdated())


def is_current(bundle: Bundle, variant: str, target: str = DEFAULT) -> bool:
    """Whether a bundle has a variant's graph for a target, as this version of the lowering writes it."""
    entry = _entry(bundle, variant, target)
    return entry is not None and entry.lowering == find_target(target).lowering().VERSION


def canonical_graph(bundle: Bundle) -> Path | None:
    """The graph that all variants are lowered from; None: the bundle does not hold it."""
    base = bundle.manifest.variants.get(BASE)
    return bundle.file(base.graphs[CANONICAL].file) if base is not None and CANONICAL in base.graphs else None


def _entry(bundle: Bundle, variant: str, target: str) -> GraphEntry | None:
    found = bundle.manifest.variants.get(variant)
    return None if found is None else found.graphs.get(target)


def _command(bundle: Bundle, variant: str, target: str) -> str:
    return f"accel quantize {bundle.path} --variant {variant}" + ("" if target == DEFAULT else f" --target {target}")


@contextmanager
def _outdated_in_words(bundle: Bundle, variant: str, target: str) -> Iterator[None]:
    """Why an outdated variant stays so, with the command that makes it new where that can be done."""
    try:
        yield
    except (BundleError, StorageError, ImportError) as error:
        entry = _entry(bundle, variant, target)
        if entry is None:
            raise
        by = "an older accel" if entry.lowering is None else f"version {entry.lowering} of the lowering"
        what = f"The variant {variant} was made by {by}, and cannot be lowered again here: {error}"
        where = "where the bundle can be written and the export tools are installed"
        remedy = f"Run it {where}: {_command(bundle, variant, target)}"
        raise BundleError(what, where=str(bundle.path), remedy=remedy) from error


@dataclasses.dataclass
class _Addition:
    bundle: Bundle
    folder: Path
    variant: str
    target: Target
    progress: ExportProgress

    def make(self, check: bool) -> Manifest:
        """Writes the files; returns the manifest with them."""
        with _links_in_words():
            model, entry = self._write()
        manifest, name = self.bundle.manifest, f"{self.variant}/{self.target.name}"
        parity = {key: result for key, result in manifest.parity.items() if key != name}
        if check:
            self.progress.stage("Checking parity")
            parity[name] = self._check(model)
        dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.variant]
        old = manifest.variants.get(self.variant, Variant(dtype, (), {}))
        kept = [file for file in old.weights if file not in self.outdated()]
        weights = tuple(dict.fromkeys((*kept, *(entry.weights or ()))))
        new = dataclasses.replace(old, weights=weights, graphs={**old.graphs, self.target.name: entry})
        return dataclasses.replace(manifest, variants={**manifest.variants, self.variant: new}, parity=parity)

    def outdated(self) -> tuple[str, ...]:
        """The files of the graph that is lowered again; weights that other graphs read are left."""
        entry = _entry(self.bundle, self.variant, self.target.name)
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

        arch, lowering = self.bundle.manifest.arch, self.target.lowering()
        self.progress.stage(f"Lowering to {self.target.title}, {self.variant}")
        canonical = self.bundle.graph(BASE, CANONICAL)
        model = load_canonical(self.bundle.file(canonical.file))
        model, passes = lowering.lower(model, arch, arch.max_positions, _dtype(self.variant))
        self.progress.stage("Writing the weights")
        # Other precisions keep nothing in fp32's file: an engine's key covers the variant's own files alone.
        keep = self.bundle.path if self.variant == BASE else None
        stored = StoredTensors(path for path, _ in self._others())
        write_external(model, self._free(self._stem(), ".weights"), keep, self.progress.advance, stored)
        names = tuple(f"layers.{index}.attention" for index in range(len(arch.layers)))
        graph = self._free(f"{self.variant}.{self.target.name}", ".onnx")
        entry = save_graph(model, graph, names, (*canonical.passes, *passes), __version__)
        return model, dataclasses.replace(entry, lowering=lowering.VERSION, weights=external_files(model))

    def _check(self, model: ir.Model) -> ParityResult:
        from accel.engines import open_session
        from accel.engines.session import SessionOptions
        from accel.graph.evaluation.torch_graph import TorchGraph
        from accel.graph.parity import ROWS, capacity_of, check_parity, make_cases, references_from

        arch = self.bundle.manifest.arch
        recipe = ParityRecipe(limit=LIMITS[self.variant], greedy_tokens=0)
        cases = make_cases(arch, recipe, **self._ids())
        capacity = min(capacity_of(cases), arch.max_positions)
        options = SessionOptions(capacity=capacity, max_batch=ROWS)
        reference = open_session(self.bundle, engine="ort-cpu", variant=BASE, options=options).session
        try:
            references_from(reference, arch, cases)
        finally:
            reference.close()
        session: Any = self.target.session(TorchGraph(model).run, arch, ROWS, capacity, _dtype(self.variant))
        try:
            result = check_parity(session, arch, cases, recipe)
        except ParityError as error:
            raise self._in_words(error) from error
        name = f"{self.variant} for {self.target.title}"
        _log.info("%s: error %.1e of the largest value, limit %.1e", name, result.max_rel_error, result.limit)
        return dataclasses.replace(result, reference="ort-cpu fp32")

    def _in_words(self, error: ParityError) -> ParityError:
        """The error as this comparison's: what differs from what, in which bundle, and what helps."""
        what = error.what.replace("The exported graph", f"The {self.variant} graph")
        return ParityError(
            what.replace("PyTorch", "the fp32 engine"), where=f"{self.bundle.path}: {error.where}",
            remedy=self._remedy(error.value or 0.0),
        )  # fmt: skip

    def _remedy(self, value: float) -> str:
        if self.variant == "fp16" and math.isinf(value):
            return "Values overflow fp16: take bf16, whose range is fp32's, or fp32"
        if self.variant == BASE or value > ROUNDING:
            return "Rounding does not cost this much: the graph is wrong. Export the bundle again with this accel"
        finer = f"fp32, or bf16 (rounds more, limit {LIMITS['bf16']:g})" if self.variant == "fp16" else "fp32"
        anyway = f"{_command(self.bundle, self.variant, self.target.name)} --no-parity"
        return f"Take {finer}; or, if this much is well for you: {anyway}"

    def _ids(self) -> dict[str, int]:
        """The padding id, and how many token types the graph takes."""
        config = self.bundle.read_json("config.json") if self.bundle.has("config.json") else {}
        inputs = {spec.name for spec in self.bundle.graph(BASE, CANONICAL).inputs}
        types = int(config.get("type_vocab_size") or 0) if "token_type_ids" in inputs else 0
        return {"pad_id": int(config.get("pad_token_id") or 0), "token_types": types}


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


def _dtype(variant: str) -> ir.DataType:
    import onnx_ir as ir

    return {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[variant]


__all__ = ["LIMITS", "add_variant", "canonical_graph", "is_current"]
