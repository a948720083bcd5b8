"""One variant's graph for one target on its way into a bundle: lowered, written, checked."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.errors import BundleError, EngineUnavailableError, InputError, QualityError
from accel.lost_files import weights_of
from accel.manifest import GraphEntry, Manifest, ParityResult, Quality, Quantization, QuantizedLayer, Variant
from accel.quality import Gate, Settings, TextSet, measure_reference, measure_variant
from accel.recorded_choices import difference, same_choice
from accel.runtime.text import TOKENIZER_FILE
from accel.scheme import Scheme
from accel.spec import Kind
from accel.variant_checks import (
    BASE,
    CANONICAL,
    check_evaluated,
    check_integers,
    check_precision,
    evaluated,
    opened,
    widened,
)
from accel.variant_files import GraphFiles
from accel.variant_targets import CPU, Plan, Target, float_type

if TYPE_CHECKING:
    import onnx_ir as ir

    from accel.compress.report import QuantizationReport
    from accel.compress.texts import Calibration
    from accel.exporter.progress import ExportProgress
    from accel.kv_quantization import KvQuantization
    from accel.runtime.text import Tokenizer

_log = logging.getLogger("accel")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float16"}  # fp8: what is not in 8 bits


@dataclasses.dataclass(frozen=True)
class Quantizing:
    """How a variant with integer weights is made and judged.

    Attributes:
        algorithm: ``auto``, or one of ``accel.compress``.
        calibration: What the algorithm, and caches, look at: see ``accel.compress``. None: the built-in text.
        measure: Measure what the variant costs, and keep the record in the manifest.
        gate: What it may lose; needs ``measure``.
        text: To measure on; None: the built-in texts.
        keep, head_bits: See ``accel.compress.quantize.quantize_graph``.
        max_bytes, max_layer_error, q_budget: Budgets of bytes, of a layer's error and of Q, see
            ``accel.compress.sensitivity``; None: there is none.
    """

    algorithm: str = "auto"
    calibration: Any = None
    measure: bool = True
    gate: Gate = field(default_factory=Gate)
    text: TextSet | None = None
    keep: Mapping[str, int] | None = None
    head_bits: int | None = None
    max_bytes: int | None = None
    max_layer_error: float | None = None
    q_budget: float | None = None

    @property
    def budgets(self) -> dict[str, float | None]:
        """By their names here."""
        return {name: getattr(self, name) for name in ("max_bytes", "max_layer_error", "q_budget")}

    def check(self, kind: Kind, scheme: Scheme, target: Target) -> None:
        """Refuses what would be ignored: limits that nothing is measured for, choices that the scheme does not have.

        Raises:
            InputError: Names the option, and what it is for.
        """
        self.gate.check(kind)
        if self.q_budget is not None and kind != "decoder":
            what = "q_budget is of log probabilities, which an encoder does not have"
            raise InputError(what, where="q_budget", remedy="Give max_layer_error or max_bytes")
        measured = {"max_q_drop": self.gate.max_q_drop, "min_cosine": self.gate.min_cosine, "text": self.text}
        asked = [name for name, value in measured.items() if value is not None]
        for where in asked if not (self.measure and is_measured(scheme, target)) else ():
            why = f"{scheme.name} for {target.title} is not measured here" if self.measure else "measuring is off"
            remedy = f"Leave it out; graphs for {CPU} are measured, and accel report measures what runs here"
            raise InputError(f"{where} needs a measurement, and {why}", where=where, remedy=remedy)
        algorithm = None if self.algorithm == "auto" else self.algorithm
        chosen = {"algorithm": algorithm, "keep": self.keep or None, "head_bits": self.head_bits}
        if scheme.base != "fp8" and scheme.kv_bits is None:
            chosen["calibration"] = self.calibration
        for where, value in {**chosen, **self.budgets}.items():
            if value is not None and not scheme.quantized:
                what = f"{scheme.name} has no integer weights to choose, and takes no {where}"
                raise InputError(what, where=where, remedy="Leave it out, or take a variant with integer weights")


def is_measured(scheme: Scheme, target: Target) -> bool:
    """Whether a variant is measured as it is added: its graph runs here, in the target's own engine."""
    return target.name == CPU or (target.rounds and scheme.name != BASE)


@dataclasses.dataclass
class Addition:
    """Writes a variant's graph, and the weights that lie in no file yet, into a folder.

    Attributes:
        extension: Where new files go, and the bundle as it stands.
        scheme: The variant's.
        target: Of its graph.
        quantizing: How, where the scheme has integers.
        progress: Shows stages.
    """

    extension: BundleExtension
    scheme: Scheme
    target: Target
    quantizing: Quantizing
    progress: ExportProgress
    quantization: Quantization | None = None
    _told: Plan | None = None

    @property
    def bundle(self) -> Bundle:
        """The bundle as it stands."""
        return self.extension.bundle

    @property
    def files(self) -> GraphFiles:
        """Which files are the graph's, before and after."""
        return GraphFiles(self.bundle, self.scheme, self.target)

    @property
    def variant(self) -> str:
        """Its name in the bundle."""
        return self.scheme.name

    def make(self, check: bool) -> Manifest:
        """Writes the files; returns the manifest with them.

        Raises:
            ParityError: With ``check``: the graph differs from what it stands for by more than the limit.
            QualityError: The variant loses more than it may.
        """
        with _links_in_words():
            canonical, model, entry = self._write()
        manifest = self._with(entry)
        if check:
            self.progress.stage("Checking parity")
            result = self._check(canonical, model, manifest)
            manifest = dataclasses.replace(manifest, parity={**manifest.parity, self._key(): result})
        if self.quantizing.measure and is_measured(self.scheme, self.target):
            manifest = self._measured(manifest)
        return manifest

    def outdated(self, made: Manifest) -> tuple[str, ...]:
        """The files that go once the manifest that ``make`` returned stands."""
        return self.files.outdated(made.variants[self.variant].graphs[self.target.name])

    def _key(self) -> str:
        return f"{self.variant}/{self.target.name}"

    def _with(self, entry: GraphEntry) -> Manifest:
        """The manifest with the new graph, not checked yet."""
        manifest = self.bundle.full_manifest
        parity = {key: result for key, result in manifest.parity.items() if key != self._key()}
        dtype = DTYPES[self.scheme.base]
        old = manifest.variants.get(self.variant, Variant(dtype, (), {}))
        weights = self.files.of_variant(entry)
        # Where an older accel did not record what a graph reads, that would go by the variant's files, which change.
        read = {name: weights_of(manifest, self.variant, name) for name in old.graphs}
        graphs = {name: dataclasses.replace(graph, weights=read[name]) for name, graph in old.graphs.items()}
        graphs[self.target.name] = entry
        quantization, quality = self._recorded(old)
        variant = dataclasses.replace(old, weights=weights, graphs=graphs, quantization=quantization, quality=quality)
        return dataclasses.replace(manifest, variants={**manifest.variants, self.variant: variant}, parity=parity)

    def _recorded(self, old: Variant) -> tuple[Quantization | None, Quality | None]:
        """What the manifest says of the integers and of what they cost; both of the same ones.

        The record is that of the target that came first: what was measured ran there.
        """
        known, new = old.quantization, self.quantization
        if known is None or new is None:
            return new or known, old.quality
        if same_choice(known, new):
            return known if self.files.others else new, old.quality
        if not self.files.others:
            before = "what was lost" if (self.variant, self.target.name) in self.bundle.lost else "it was"
            _log.warning("%s is made otherwise than %s: %s", self.variant, before, difference(known, new))
            return new, None
        what = "%s for %s has other integers than its graphs for other targets, whose record and figures stay: %s"
        _log.warning(what, self.variant, self.target.title, difference(known, new))
        return known, old.quality

    def _write(self) -> tuple[ir.Model, ir.Model, GraphEntry]:
        """(canonical graph with the weights as they are now, lowered graph, its entry)."""
        from accel import __version__
        from accel.graph.external import StoredTensors, external_files, write_external
        from accel.graph.save import load_canonical, save_graph

        arch, entry = self.bundle.manifest.arch, self.bundle.graph(BASE, CANONICAL)
        canonical = load_canonical(self.bundle.file(entry.file))
        canonical, plan = self._plan(canonical)
        self._told = plan
        self.progress.stage(f"Lowering to {self.target.title}, {self.variant}")
        model, passes = self.target.lower(canonical, arch, plan)
        self.progress.stage("Writing the weights")
        # Other precisions keep nothing in fp32's file: an engine's key covers the variant's own files alone.
        keep = self.bundle.path if self.files.reads_base else None
        lender = next((path for path in self.files.kin() if _lends(path, model)), None)
        stored = StoredTensors([*([] if lender is None else [lender]), *self.files.stored()])
        write_external(model, self.files.new_weights(self.extension.path), keep, self.progress.advance, stored)
        names = tuple(f"layers.{index}.attention" for index in range(len(arch.layers)))
        graph = self.files.new_graph(self.extension.path)
        saved = save_graph(model, graph, names, (*entry.passes, *passes), __version__)
        return canonical, model, dataclasses.replace(saved, lowering=self.target.version, weights=external_files(model))

    def _plan(self, canonical: ir.Model) -> tuple[ir.Model, Plan]:
        """The canonical graph with the scheme's weights, and what the lowering is told."""
        parameters = frozenset(self.bundle.manifest.parameters) if self.files.reads_base else frozenset[str]()
        if self.scheme.base == "fp8":
            return canonical, self._float8(canonical)
        if not self.scheme.quantized:
            return canonical, Plan(self.scheme, parameters=parameters, kv=self._kv(canonical))
        from accel.compress.quantize import quantize_graph
        from accel.compress.sensitivity import Budget

        calibration, chosen = self._calibration(), self.quantizing
        limited = any(value is not None for value in chosen.budgets.values())
        budget = Budget(chosen.max_bytes, None, chosen.max_layer_error, chosen.q_budget) if limited else None
        canonical, report = quantize_graph(
            canonical, self.bundle.manifest.arch, self.scheme, chosen.algorithm, calibration,
            keep=chosen.keep, head_bits=chosen.head_bits, progress=self.progress, budget=budget,
        )  # fmt: skip
        sha256 = None if calibration is None else calibration.sha256
        self.quantization = _record(report, sha256)
        return canonical, Plan(self.scheme, report.input_scales, parameters, self._kv(canonical))

    def _float8(self, canonical: ir.Model) -> Plan:
        """What a lowering is told of 8-bit floats; there is one way to choose them.

        Raises:
            InputError: There is no text.
        """
        from accel.compress.float8 import calibrate_float8

        calibration = self._calibration()
        if calibration is None:
            what, remedy = "fp8 needs calibration text", "Give token ids: the model has no tokenizer"
            raise InputError(what, where="calibration", remedy=remedy)
        report = calibrate_float8(canonical, self.bundle.manifest.arch, calibration, self.progress)
        self.quantization = _record(report, calibration.sha256)
        return Plan(self.scheme, report.input_scales)

    def _calibration(self) -> Calibration | None:
        """What algorithms look at; None: nothing is needed, or the model has no tokenizer and none was given."""
        from accel.compress.texts import resolve_calibration

        asked, arch = self.quantizing.calibration, self.bundle.manifest.arch
        needed = self.quantizing.algorithm != "rtn" or self.quantizing.q_budget is not None
        if asked is None and not needed and self.scheme.activations != "static":
            return None
        tokenizer = self._tokenizer()
        if asked is None and tokenizer is None:
            return None
        return resolve_calibration(asked, arch, tokenizer)

    def _tokenizer(self) -> Tokenizer | None:
        from accel.runtime.text import TOKENIZER_FILE, Tokenizer

        return Tokenizer.from_bundle(self.bundle) if self.bundle.has(TOKENIZER_FILE) else None

    def _kv(self, canonical: ir.Model) -> KvQuantization | None:
        """Calibrated scales of the caches."""
        bundle, scheme, advance = self.bundle, self.scheme, self.progress.advance
        if scheme.kv_bits is None:
            return None
        from accel.compress.kv_scales import calibrate_cache
        from accel.compress.texts import resolve_calibration

        calibration = resolve_calibration(self.quantizing.calibration, bundle.manifest.arch, self._tokenizer())
        self.progress.stage("Calibrating the cache", calibration.tokens)
        return calibrate_cache(
            bundle, canonical, calibration.samples, scheme.kv_bits, float8=scheme.kv_float8, advance=advance
        )

    def _check(self, canonical: ir.Model, model: ir.Model, manifest: Manifest) -> ParityResult:
        if self.target.name == CPU:
            with ExitStack() as stack:

                def preview() -> Bundle:
                    return stack.enter_context(self.extension.preview(manifest))

                assert self._told is not None
                result = check_integers(self.bundle, self._told, canonical, preview)
        elif self.target.rounds:
            with self.extension.preview(manifest) as whole:
                session = opened(whole, self.scheme, self.target)
                result = check_precision(self.bundle, self.scheme, self.target, session)
        else:
            session = evaluated(model, self.bundle, self.target, float_type(self.scheme))
            if self.scheme.quantized or self.scheme.kv_bits is not None:
                assert self._told is not None
                result = check_evaluated(
                    self.bundle, self._told, canonical, session, lambda: self._in_fp32(canonical)
                )  # fmt: skip
            else:
                result = check_precision(self.bundle, self.scheme, self.target, session)
        name = f"{self.variant} for {self.target.title}"
        _log.info("%s: error %.1e of the largest value, limit %.1e", name, result.max_rel_error, result.limit)
        return result

    def _in_fp32(self, canonical: ir.Model) -> Callable[[int, int], Any]:
        """(rows, capacity) -> a session over the same graph, lowered in fp32."""
        import onnx_ir as ir

        assert self._told is not None
        model, _ = self.target.lower(canonical, self.bundle.manifest.arch, self._told, ir.DataType.FLOAT)
        return evaluated(widened(model), self.bundle, self.target, ir.DataType.FLOAT)

    def _measured(self, manifest: Manifest) -> Manifest:
        """The manifest with what the variant costs; without, where floats cannot be measured and no limit is set."""
        gate, settings = self.quantizing.gate, Settings(engine=self.target.name)  # no other graph that it may have
        optional = gate == Gate() and self.target.name != CPU
        if optional and not self.bundle.has(TOKENIZER_FILE):
            _log.warning("%s was not measured: the bundle has no tokenizer for the text", self.variant)
            return manifest
        with self.extension.preview(manifest) as preview:
            reference = measure_reference(preview, self.quantizing.text, settings, progress=self.progress)
            try:
                quality = measure_variant(
                    preview, self.variant, reference=reference, progress=self.progress,
                    max_q_drop=gate.max_q_drop, min_cosine=gate.min_cosine,
                )  # fmt: skip
            except QualityError as error:
                error.where = str(self.bundle.path)  # the caller's, not the preview's, which is gone
                raise
            except EngineUnavailableError as error:
                if not optional:
                    raise
                _log.warning("%s was not measured: %s", self.variant, error)
                return manifest
        variant = dataclasses.replace(manifest.variants[self.variant], quality=quality)
        return dataclasses.replace(manifest, variants={**manifest.variants, self.variant: variant})


def _lends(graph: Path, model: ir.Model) -> bool:
    """Whether the model's weights could be read from where a graph's lie, and are now."""
    from accel.graph.external import read_stored

    try:
        return read_stored(model, graph)
    except (OSError, ValueError) as error:  # damaged, or links: then the weights are written once more
        _log.debug("the weights of %s are not shared: %s", graph.name, error)
        return False


def _record(report: QuantizationReport, sha256: str | None) -> Quantization:
    """What the manifest keeps of a quantisation."""
    layers = tuple(QuantizedLayer(layer.name, layer.bits, layer.group, layer.error) for layer in report.layers)
    return Quantization(
        report.scheme, report.algorithm, sha256, report.calibration_tokens, layers,
        report.bytes_before, report.bytes_after, report.scales, report.error_of, dict(report.kept),
    )  # fmt: skip


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


__all__ = ["DTYPES", "Addition", "Quantizing", "is_measured"]
