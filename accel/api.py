"""The stages of an export, put together. The only module that knows them all."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.bundle import Bundle, BundleWriter
from accel.capabilities import install_export
from accel.errors import AccelError, DependencyError, InputError
from accel.manifest import SCHEMA_VERSION, FileEntry, GraphEntry, Manifest, ParityResult, PassReport, Variant
from accel.recipe import ParityRecipe, Recipe, load_recipe
from accel.scheme import parse_scheme
from accel.spec import ArchSpec, Task
from accel.variant_targets import check_runnable
from accel.variants import add_variant

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from accel.exporter.progress import ExportProgress
    from accel.exporter.source import LoadedModel, Source
    from accel.exporter.weights import Parameters
    from accel.graph.parity import Case

_log = logging.getLogger("accel")
VARIANT = "fp32"
WEIGHTS = "fp32.weights"
CANONICAL, ORT_CPU = "canonical", "ort-cpu"
_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def export(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    task: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_positions: int | None = None,
    variants: Sequence[str] = (),
    show_progress: bool | None = None,
) -> Bundle:
    """Exports a model into a bundle.

    Args:
        model: A local folder, a GGUF file, a hub id, or a loaded ``PreTrainedModel`` (left as it is).
        out: The bundle's directory; written beside it and renamed at the end.
        recipe: How: a packaged recipe's name, a YAML file, a mapping or a ``Recipe``; None: the default of the kind.
        task: ``feature-extraction``, ``text-classification``, ``token-classification``, ``question-answering``,
            ``fill-mask`` or ``text-generation``; None: the recipe's, else what the architecture's name says.
        tokenizer: A tokenizer, or a folder with one, for a model that brings none.
        overwrite: Replace a bundle that stands at ``out``.
        trust_remote_code: Run Python code that the checkpoint brings.
        max_positions: Longest sequence; None: the recipe's, else what the model's position scheme covers.
        variants: Schemes to add once the bundle stands, such as ``w4g32``; see ``accel.add_variant``, whose errors
            leave the bundle without that variant. Those that this kind of model cannot run in are refused before any
            weight is read.
        show_progress: Show a progress bar on stderr; None: when it is a terminal.

    Returns:
        The bundle, opened.

    Raises:
        ExportError: The model cannot be exported (``CheckpointError``, ``UnsupportedArchitectureError``,
            ``FusionError``), or the exported graph's numbers are wrong (``ParityError``).
        RecipeError: The recipe is wrong.
        InputError: An argument is wrong.
        StorageError: Writing failed. Whatever is raised, nothing half made is left behind.
        DependencyError: A package that exporting needs is missing.
    """
    _check_packages()
    from accel.exporter.families import check_task, kind_of
    from accel.exporter.progress import ExportProgress
    from accel.exporter.source import resolve_source

    chosen = None if task is None else check_task(task)
    for variant in variants:
        parse_scheme(variant)  # raises before anything is downloaded
    if max_positions is not None and (type(max_positions) is not int or max_positions < 1):
        what = f"max_positions must be an integer of at least 1, not {max_positions!r}"
        raise InputError(what, where="max_positions")
    with BundleWriter(out, overwrite) as writer, ExportProgress(show_progress) as progress:
        progress.stage("Reading the config")
        source = resolve_source(model, trust_remote_code)
        settings = load_recipe(recipe, default=kind_of(chosen or source.task))
        final = chosen or settings.task or source.task
        for variant in variants:
            check_runnable(kind_of(final), variant)
        limit = max_positions if max_positions is not None else settings.max_positions
        bundle = _Export(source, final, settings, limit, tokenizer, writer, progress).run()
    for variant in variants:
        bundle = _add_to_export(bundle, variant, show_progress)
    return bundle


def _add_to_export(bundle: Bundle, variant: str, show_progress: bool | None) -> Bundle:
    """``add_variant``, whose errors say that the export itself is not lost."""
    try:
        return add_variant(bundle, variant, show_progress=show_progress)
    except AccelError as error:
        have = ", ".join(bundle.manifest.variants)
        stands = f"The exported bundle {bundle.path} stands, with {have}, but without {variant}"
        error.remedy = f"{error.remedy}. {stands}" if error.remedy else stands
        raise


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        what = f"Exporting needs packages that are not installed: {', '.join(missing)}"
        raise DependencyError(what, remedy=f"Install them: {install_export(missing)}")


@dataclass
class _Traced:
    """What is left of the PyTorch model once its graphs are made."""

    arch: ArchSpec
    canonical: ir.Model
    lowered: ir.Model
    passes: dict[str, tuple[PassReport, ...]]
    attention: dict[str, tuple[str, ...]]
    cases: list[Case]


@dataclass
class _Export:
    """One export, stage by stage."""

    source: Source
    task: Task
    recipe: Recipe
    max_positions: int | None
    tokenizer: Any
    writer: BundleWriter
    progress: ExportProgress
    notes: list[str] = field(default_factory=list)

    def run(self) -> Bundle:
        manifest, cases = self._write()
        gc.collect()  # modules and graphs refer to each other; the engine wants the memory
        manifest.parity.update(self._check(manifest.arch, cases, manifest))
        with self._stage("Hashing and syncing"):
            return self.writer.commit(manifest)

    def _write(self) -> tuple[Manifest, list[Case]]:
        """Everything that needs the PyTorch model; when it returns, model and graphs are garbage."""
        from accel.exporter.source import load_model
        from accel.exporter.weights import collect_parameters, total_bytes, write_weights

        with self._stage("Loading the weights"):
            loaded = load_model(self.source, self.task)
        self.notes += loaded.notes
        try:
            parameters = collect_parameters(loaded.model)
            traced = self._trace(loaded, parameters)
            with self._stage("Writing the weights", total_bytes(parameters)):
                graphs = (traced.canonical, traced.lowered)
                written = write_weights(self.writer.path / WEIGHTS, graphs, parameters, self.progress.advance)
        finally:
            loaded.release()
        with self._stage("Saving the graphs"):
            entries = self._save_graphs(traced)
        return self._manifest(traced.arch, entries, written.parameters, written.tied), traced.cases

    def _trace(self, loaded: LoadedModel, parameters: Parameters) -> _Traced:
        from accel.exporter.arch import read_arch
        from accel.exporter.families import kind_of
        from accel.exporter.files import copy_files
        from accel.exporter.tracer import probe_layers, trace_decoder, trace_encoder
        from accel.exporter.weights import name_initializers
        from accel.graph.checks import check_attention
        from accel.graph.lowering.ort_cpu import lower
        from accel.graph.pipeline import optimize

        model = loaded.model
        with self._stage("Reading the layers"):
            layers = probe_layers(model, kind_of(self.task))
            arch = read_arch(model, layers, self.task, self.max_positions)
            self._check_profiles(arch)
            self.notes += copy_files(self.source, model, self.tokenizer, self.writer.path)
        cases = self._references(model, arch)
        with self._stage("Tracing"):
            graph = trace_decoder(model, layers) if arch.kind == "decoder" else trace_encoder(model, self.task)
            name_initializers(graph, parameters)
        with self._stage("Optimising the graph"):
            canonical_passes = optimize(graph, arch)
            names = check_attention(graph, arch)
            lowered, lowered_passes = lower(graph, arch, arch.max_positions, parameters.tensors)
        return _Traced(
            arch, graph, lowered,
            {CANONICAL: canonical_passes, ORT_CPU: (*canonical_passes, *lowered_passes)},
            {CANONICAL: names, ORT_CPU: _lowered_names(lowered, names)},
            cases,
        )  # fmt: skip

    def _check_profiles(self, arch: ArchSpec) -> None:
        """Raises InputError where no engine could be built for the recipe's profiles."""
        from accel.builder.profiles import check_ranges, recorded_profiles

        if self.recipe.profiles:
            check_ranges(recorded_profiles(self.recipe.profiles), arch, capacity=None)

    def _references(self, model: PreTrainedModel, arch: ArchSpec) -> list[Case]:
        from accel.exporter.tracer import takes_token_types
        from accel.graph.parity import compute_references, make_cases

        if not self.recipe.parity.enabled:
            return []
        with self._stage("Computing reference outputs"):
            types = model.config.type_vocab_size if arch.kind == "encoder" and takes_token_types(model) else 0
            pad = getattr(model.config, "pad_token_id", None)
            cases = make_cases(arch, self.recipe.parity, pad_id=pad or 0, token_types=types)
            compute_references(model, arch, cases)
        return cases

    def _save_graphs(self, traced: _Traced) -> dict[str, GraphEntry]:
        from accel import __version__
        from accel.graph.functions import attach
        from accel.graph.save import save_graph

        attach(traced.canonical)
        models = {CANONICAL: traced.canonical, ORT_CPU: traced.lowered}
        entries = {}
        for target, graph in models.items():
            path = self.writer.path / f"{target}.onnx"
            entries[target] = save_graph(graph, path, traced.attention[target], traced.passes[target], __version__)
        return entries

    def _manifest(
        self, arch: ArchSpec, graphs: dict[str, GraphEntry], parameters: dict[str, Any], tied: dict[str, str]
    ) -> Manifest:
        from accel import __version__

        return Manifest(
            schema_version=SCHEMA_VERSION,
            accel_version=__version__,
            source=self.source.label,
            arch=arch,
            variants={VARIANT: Variant("float32", (WEIGHTS,), graphs)},
            files={},
            versions=_versions(),
            parameters=parameters,
            tied=tied,
            notes=tuple(self.notes),
            profiles=self.recipe.profiles,
        )

    def _check(self, arch: ArchSpec, cases: list[Case], manifest: Manifest) -> dict[str, ParityResult]:
        if not cases:
            _log.warning("The parity check is switched off: nothing says that the graph's numbers are right")
            return {}
        with self._stage("Checking parity"):
            result = run_parity(self.writer.path, manifest, arch, cases, self.recipe.parity)
        _log.info("Parity: error %.1e of the largest value, limit %.1e", result.max_rel_error, result.limit)
        return {f"{VARIANT}/{ORT_CPU}": result}

    @contextmanager
    def _stage(self, name: str, total: int | None = None) -> Iterator[None]:
        self.progress.stage(name, total)
        start = time.perf_counter()
        yield
        _log.info("%s took %.1f s", name, time.perf_counter() - start)


def run_parity(
    folder: Path, manifest: Manifest, arch: ArchSpec, cases: list[Case], recipe: ParityRecipe
) -> ParityResult:
    """Opens the graph in ``folder`` on ONNX Runtime and compares it with the reference outputs.

    Raises:
        ParityError: see ``accel.graph.parity.check_parity``.
        EngineUnavailableError: ONNX Runtime refuses the graph.
    """
    import dataclasses

    from accel.engines import open_session
    from accel.engines.session import SessionOptions
    from accel.graph.parity import ROWS, capacity_of, check_parity

    files = {path.name: FileEntry(path.stat().st_size, "") for path in folder.iterdir() if path.is_file()}
    bundle = Bundle(folder, dataclasses.replace(manifest, files=files))
    options = SessionOptions(capacity=min(capacity_of(cases), arch.max_positions), max_batch=ROWS)
    session = open_session(bundle, engine=ORT_CPU, variant=VARIANT, options=options).session
    try:
        return check_parity(session, arch, cases, recipe)
    finally:
        session.close()


def _lowered_names(model: ir.Model, canonical: tuple[str, ...]) -> tuple[str, ...]:
    """The lowered attention nodes: one per canonical node, of the same name, else those of ``canonical``."""
    present = {node.name for node in model.graph}
    return tuple(name for name in canonical if name in present)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return found


__all__ = ["export"]
