"""The quality report of a bundle: what its variants cost and gain against fp32."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.errors import EngineUnavailableError, InputError
from accel.manifest import Quality, Quantization
from accel.quality.measure import (
    MAX_TOKENS,
    NEW_TOKENS,
    REFERENCE,
    Gate,
    Reference,
    Settings,
    measure_reference,
    measure_variant,
)
from accel.quality.text_set import resolve_text
from accel.schema import to_dict
from accel.spec import ArchSpec


@dataclass(frozen=True)
class VariantReport:
    """One variant.

    Attributes:
        name, dtype: As in the manifest.
        targets: What it has graphs for.
        quality: None where it is not known; ``missing`` then says why.
        quantization: None where nothing was rounded to integers.
        measured: Whether ``quality`` was measured just now; else it was stored in the manifest.
    """

    name: str
    dtype: str
    targets: tuple[str, ...]
    quality: Quality | None
    quantization: Quantization | None
    measured: bool = False
    missing: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that ``accel report`` shows. ``str()`` is the text, ``to_json()`` one JSON object.

    Attributes:
        path: The bundle's directory.
        source: What it was exported from.
        variants: fp32 first.
        saved: Whether what was measured is in the manifest now.
    """

    path: str
    source: str
    accel_version: str
    arch: ArchSpec
    variants: tuple[VariantReport, ...]
    saved: bool = False

    def variant(self, name: str) -> VariantReport:
        """One of them; KeyError where there is none of this name."""
        return next(item for item in self.variants if item.name == name)

    def to_json(self) -> str:
        """One JSON object; ratios and perplexities beside what they are made of."""
        data = to_dict(self)
        for item, plain in zip(self.variants, data["variants"], strict=True):
            if item.quality is not None:
                _add_derived(item.quality, plain["quality"])
        return json.dumps(data, indent=1, allow_nan=False)

    def __str__(self) -> str:
        from accel.quality.text import render_text

        return render_text(self)


def _add_derived(quality: Quality, plain: dict[str, Any]) -> None:
    plain |= {"byte_ratio": quality.byte_ratio, "number_ratio": quality.number_ratio}
    likelihood = quality.likelihood
    if likelihood is not None:
        for name in ("perplexity", "reference_perplexity"):
            value = getattr(likelihood, name)
            plain["likelihood"][name] = value if value < float("inf") else None


def report(
    bundle: Bundle | str | Path,
    variant: str | Sequence[str] | None = None,
    text: str | Path | Sequence[str] | None = None,
    *,
    measure: bool = False,
    save: bool = False,
    max_q_drop: float | None = None,
    min_cosine: float | None = None,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    max_tokens: int = MAX_TOKENS,
    new_tokens: int = NEW_TOKENS,
    show_progress: bool | None = None,
) -> Report:
    """Says how a bundle's variants compare with its fp32: stored results, and measured where there are none.

    Args:
        bundle: A bundle or its directory.
        variant: One variant or several; None: all. fp32 is always shown.
        text: What to measure on: a UTF-8 file with blank lines between passages, or a list of passages; measures even
            what is stored. None: a small set that is built in (40 passages, and 40 pairs for encoders).
        measure: Measure what is stored, too.
        save: Put what was measured into the manifest.
        max_q_drop, min_cosine: Raise where a variant lost more, see ``accel.quality.measure_variant``.
        engine, device: What runs the variants, as in ``accel.load``. fp32 runs on ``ort-cpu``.
        threads: Worker threads; None: all cores that this process may use.
        max_tokens: Tokens of the text that are measured at most.
        new_tokens: Tokens that decoders generate after each of eight prompts.
        show_progress: A bar on stderr; None: when it is a terminal.

    Returns:
        The report. A variant that no engine runs here is in it, with the reason.

    Raises:
        BundleError: No bundle there, a damaged one, or no such variant.
        QualityError: A variant lost more than allowed; ``save`` saved nothing.
        InputError: The text or a setting is of no use.
        EngineError: An engine failed.
        StorageError: With ``save``: the manifest cannot be written.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    names = _chosen(opened, variant)
    settings, gate = Settings(engine, device, threads, max_tokens, new_tokens), Gate(max_q_drop, min_cosine)
    settings.check()
    gate.check(opened.manifest.arch.kind)
    texts = resolve_text(text)
    afresh = measure or text is not None
    unknown = [name for name in names if afresh or opened.variant(name).quality is None]
    measured: dict[str, Quality] = {}
    missing: dict[str, str] = {}
    if unknown:
        reference = measure_reference(opened, texts, settings, show_progress)
        for name in unknown:
            try:
                measured[name] = measure_variant(opened, name, reference=reference, show_progress=show_progress)
            except EngineUnavailableError as error:
                missing[name] = str(error)
    variants = tuple(_variant(opened, name, measured.get(name), missing.get(name)) for name in names)
    for item in variants:
        if item.quality is not None:
            gate.hold(item.name, item.quality, str(opened.path))
    if save and measured:
        opened = save_quality(opened, measured)
    manifest = opened.manifest
    return Report(
        str(opened.path), manifest.source, manifest.accel_version, manifest.arch, variants, bool(save and measured)
    )


def save_quality(bundle: Bundle, measured: dict[str, Quality]) -> Bundle:
    """Puts qualities into the manifest, by variant; returns the bundle opened anew.

    Raises:
        StorageError: The manifest cannot be written; nothing was changed.
        BundleError: The bundle is damaged, or a variant went meanwhile.
    """
    with BundleExtension(bundle) as extension:
        manifest, changed = extension.bundle.manifest, {}
        for name, quality in measured.items():
            changed[name] = dataclasses.replace(extension.bundle.variant(name), quality=quality)
        return extension.commit(dataclasses.replace(manifest, variants={**manifest.variants, **changed}))


def _chosen(bundle: Bundle, variant: str | Sequence[str] | None) -> list[str]:
    asked = [variant] if isinstance(variant, str) else list(bundle.manifest.variants if variant is None else variant)
    if not asked:
        raise InputError("No variant is asked for", where="variant", remedy="Name one, or leave it out for all")
    for name in asked:
        bundle.variant(name)
    return list(dict.fromkeys([REFERENCE, *asked]))


def _variant(bundle: Bundle, name: str, measured: Quality | None, missing: str | None) -> VariantReport:
    content = bundle.variant(name)
    quality = measured if measured is not None or missing is not None else content.quality
    targets = tuple(content.graphs)
    return VariantReport(name, content.dtype, targets, quality, content.quantization, measured is not None, missing)


__all__ = ["Reference", "Report", "VariantReport", "report", "save_quality"]
