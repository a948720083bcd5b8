"""Measures a variant against the bundle's fp32, through the engines that run them, and holds it to a limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from accel.bundle import Bundle
from accel.engines.session import EngineInfo, SessionOptions
from accel.errors import BundleError, InputError, QualityError
from accel.machine import probe_cpu
from accel.manifest import Quality
from accel.quality.progress import MeasureProgress
from accel.quality.size import stored_size
from accel.quality.text_set import TextSet, resolve_text
from accel.runtime.load import open_model
from accel.runtime.text import TOKENIZER_FILE

if TYPE_CHECKING:
    from accel.compress.progress import Progress

REFERENCE, REFERENCE_ENGINE = "fp32", "ort-cpu"  # the engine that the export's parity check compared with PyTorch
MAX_TOKENS, NEW_TOKENS = 1 << 16, 32
_FINER = "Take a finer scheme (more bits, smaller groups) or a better algorithm; or relax "


class Measures(Protocol):
    """What is measured of one kind of model: the modules ``decoders`` and ``encoders``."""

    def make_plan(self, model: Any, text: TextSet, max_tokens: int, new_tokens: int) -> Any:
        """The inputs, the same for every variant; ``.tokens`` of them."""
        ...

    def observe(self, model: Any, plan: Any, advance: Callable[[int], None]) -> Any:
        """What an opened model does with them; ``.engine`` and ``.timings`` of it."""
        ...

    def compare(self, plan: Any, observed: Any, reference: Any) -> dict[str, Any]:
        """Fields of the ``Quality`` of one observation against another."""
        ...

    def compare_to_itself(self, plan: Any, observed: Any) -> dict[str, Any]:
        """The same fields of the reference's own ``Quality``."""
        ...


@dataclass(frozen=True)
class Settings:
    """What to measure with.

    Attributes:
        engine, device: Of the variants, as ``accel.load`` takes them; fp32, the reference, runs on ``ort-cpu``.
        threads: Of both; None: all cores that this process may use.
        max_tokens: Tokens of the text that are measured at most.
        new_tokens: Tokens that decoders generate after each of eight prompts.
    """

    engine: str = "auto"
    device: str = "auto"
    threads: int | None = None
    max_tokens: int = MAX_TOKENS
    new_tokens: int = NEW_TOKENS

    def check(self) -> None:
        """Raises InputError for a count that is none."""
        for name, least in (("max_tokens", 2), ("new_tokens", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be an integer of at least {least}, not {value!r}", where=name)


@dataclass(frozen=True)
class Gate:
    """What a variant may lose.

    Attributes:
        max_q_drop: Decoders: ``Q`` of fp32 less ``Q`` of the variant; None: anything.
        min_cosine: Encoders: mean cosine to fp32's outputs; None: anything.
    """

    max_q_drop: float | None = None
    min_cosine: float | None = None

    def check(self, kind: str) -> None:
        """Raises InputError for a limit that is none, or belongs to the other kind of model."""
        for name, value, wanted, high in (
            ("max_q_drop", self.max_q_drop, "decoder", float("inf")),
            ("min_cosine", self.min_cosine, "encoder", 1.0),
        ):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise InputError(f"{name} must be a number from 0 to {high:g}, not {value!r}", where=name)
            if kind != wanted:
                other = "min_cosine" if name == "max_q_drop" else "max_q_drop"
                what = f"{name} is for {wanted}s, and this model is none"
                raise InputError(what, where=name, remedy=f"Use {other}")

    def hold(self, variant: str, quality: Quality, where: str) -> None:
        """Raises QualityError where the variant lost more than it may."""
        likelihood, encoder = quality.likelihood, quality.encoder
        if self.max_q_drop is not None and likelihood is not None and -likelihood.difference > self.max_q_drop:
            span = ""
            if likelihood.interval is not None:
                span = f" (95 % interval {-likelihood.interval[1]:.4f} to {-likelihood.interval[0]:.4f})"
            what = f"The variant {variant} loses {-likelihood.difference:.4f} of Q per token{span} against fp32, "
            what += f"over {likelihood.tokens:,} tokens; {self.max_q_drop:g} is allowed"
            raise QualityError(
                what, value=-likelihood.difference, limit=self.max_q_drop, where=where, remedy=_FINER + "max_q_drop"
            )
        if self.min_cosine is not None and encoder is not None and encoder.cosine_mean < self.min_cosine:
            what = f"The {encoder.output} of variant {variant} have a mean cosine of {encoder.cosine_mean:.5f} to "
            what += f"those of fp32, over {encoder.texts} texts; {self.min_cosine:g} is the least allowed"
            raise QualityError(
                what, value=encoder.cosine_mean, limit=self.min_cosine, where=where, remedy=_FINER + "min_cosine"
            )


@dataclass(frozen=True)
class Reference:
    """fp32 on a text, measured once for any number of variants.

    Attributes:
        text: The texts.
        settings: What it was measured with.
        plan: The same inputs for all, see ``Measures``.
        observed: What fp32 did with them.
        quality: fp32's own record.
    """

    text: TextSet
    settings: Settings
    plan: Any
    observed: Any
    quality: Quality


def measure_reference(
    bundle: Bundle,
    text: TextSet | None = None,
    settings: Settings | None = None,
    show_progress: bool | None = False,
    progress: Progress | None = None,
) -> Reference:
    """Measures fp32, to which variants are compared.

    Args:
        bundle: Holds fp32.
        text: None: the built-in texts.
        settings: None: the defaults.
        show_progress: A bar on stderr; None: when it is a terminal.
        progress: Told of it in place of a bar of its own.

    Raises:
        EngineUnavailableError: No engine runs fp32 here.
        InputError: The text or a setting is of no use.
        BundleError: The bundle has no fp32, or no tokenizer.
        EngineError: The engine failed.
    """
    text, settings = text or resolve_text(None), settings or Settings()
    settings.check()
    if not bundle.has(TOKENIZER_FILE):
        remedy = "Export it again from a folder that has one; accel quantize --no-quality adds a variant unmeasured"
        what = "Quality is measured on text, and there is no tokenizer"
        raise BundleError(what, where=str(bundle.path), remedy=remedy)
    measures = _measures(bundle)
    engine = REFERENCE_ENGINE if REFERENCE_ENGINE in bundle.variant(REFERENCE).graphs else "auto"
    options = SessionOptions(threads=settings.threads)
    with open_model(bundle, "auto", engine, REFERENCE, options) as model:
        plan = measures.make_plan(model, text, settings.max_tokens, settings.new_tokens)
        observed = _observe(measures, model, REFERENCE, plan, show_progress, progress)
    size = stored_size(bundle, REFERENCE, observed.engine.name)
    name = describe_engine(observed.engine)
    quality = Quality(
        name, name, probe_cpu().model, text.name, text.sha256, size, size,
        timings=observed.timings, reference_timings=observed.timings, **measures.compare_to_itself(plan, observed),
    )  # fmt: skip
    return Reference(text, settings, plan, observed, quality)


def measure_variant(
    bundle: Bundle,
    variant: str,
    *,
    reference: Reference | None = None,
    max_q_drop: float | None = None,
    min_cosine: float | None = None,
    show_progress: bool | None = False,
    progress: Progress | None = None,
) -> Quality:
    """Measures one variant, and refuses it when it lost too much.

    Before a new variant is committed, measure what ``BundleExtension.preview`` shows.

    Args:
        bundle: Holds the variant.
        variant: Its name.
        reference: fp32, measured before; None: measured now, on the built-in texts.
        max_q_drop: Decoders: the most that ``Q = mean log p(y|x)`` may fall below fp32's, per token.
        min_cosine: Encoders: the least mean cosine of outputs to fp32's.
        show_progress: A bar on stderr; None: when it is a terminal.
        progress: Told of it in place of a bar of its own.

    Returns:
        The record for the manifest.

    Raises:
        QualityError: It lost more than allowed.
        EngineUnavailableError: No engine runs it here.
        InputError: A limit that belongs to the other kind of model; else as ``measure_reference``.
        EngineError: The engine failed, or gave what is no number.
    """
    gate = Gate(max_q_drop, min_cosine)
    gate.check(bundle.manifest.arch.kind)
    bundle.variant(variant)
    reference = reference or measure_reference(bundle, show_progress=show_progress, progress=progress)
    if variant == REFERENCE:
        return reference.quality
    settings, plan, measures = reference.settings, reference.plan, _measures(bundle)
    opened = open_model(bundle, settings.device, settings.engine, variant, SessionOptions(threads=settings.threads))
    with opened as model:
        observed = _observe(measures, model, variant, plan, show_progress, progress)
    quality = dataclasses.replace(
        reference.quality,
        engine=describe_engine(observed.engine),
        size=stored_size(bundle, variant, observed.engine.name),
        timings=observed.timings,
        **measures.compare(plan, observed, reference.observed),
    )
    gate.hold(variant, quality, str(bundle.path))
    return quality


def _observe(
    measures: Measures, model: Any, variant: str, plan: Any, show: bool | None, progress: Progress | None
) -> Any:
    name = f"{variant} on {model.engine.name}"
    if progress is not None:
        progress.stage(f"Measuring {name}", plan.tokens)
        return measures.observe(model, plan, progress.advance)
    with MeasureProgress(show) as bar:
        bar.start(name, plan.tokens)
        return measures.observe(model, plan, bar.advance)


def describe_engine(engine: EngineInfo) -> str:
    """``ort-cpu 1.32.0, cpu, 2 threads``."""
    threads = "1 thread" if engine.threads == 1 else f"{engine.threads} threads"
    return f"{engine.name} {engine.version}, {engine.device}, {threads}"


def _measures(bundle: Bundle) -> Measures:
    if bundle.manifest.arch.kind == "decoder":
        from accel.quality import decoders

        return decoders
    from accel.quality import encoders

    return encoders


__all__ = ["Gate", "Reference", "Settings", "describe_engine", "measure_reference", "measure_variant"]
