"""``accel.report``: stored qualities, and measured ones where there are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.engines import ENGINES
from accel.errors import BundleError, EngineError, InputError
from accel.manifest import Quality
from accel.measurements import graph_digest
from accel.quality.measure import MAX_TOKENS, NEW_TOKENS, REFERENCE, Settings, measure_reference, measure_variant
from accel.quality.records import Report, VariantReport
from accel.quality.text_set import resolve_text


def report(
    bundle: Bundle | str | Path,
    variant: str | Sequence[str] | None = None,
    text: str | Path | Sequence[str] | None = None,
    *,
    measure: bool = False,
    save: bool = False,
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
        engine, device: What runs the variants, as in ``accel.load``. fp32 runs on ``ort-cpu``.
        threads: Worker threads; None: all cores that this process may use.
        max_tokens: Tokens of the text that are measured at most.
        new_tokens: Tokens that decoders generate after each of eight prompts.
        show_progress: A bar on stderr; None: when it is a terminal.

    Returns:
        The report. A variant that no engine runs here, or whose engine fails, is in it with the reason.

    Raises:
        BundleError: No bundle there, a damaged one, or no such variant.
        InputError: The text or a setting is of no use.
        EngineError: The engine of fp32 failed.
        StorageError: With ``save``: the manifest cannot be written.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    names = _chosen(opened, variant)
    settings = Settings(engine, device, threads, max_tokens, new_tokens)
    settings.check()
    texts = resolve_text(text)
    afresh = measure or text is not None
    measured: dict[str, Quality] = {}
    missing = _lost(opened, names)
    whole = [name for name in names if name not in missing]
    unknown = [name for name in whole if afresh or opened.variant(name).quality is None]
    if unknown and (whole == unknown or unknown != [REFERENCE]):  # fp32's figures are in the others' records, too
        if save:
            with BundleExtension(opened):  # raises now what it would after the measuring
                pass
        reference = measure_reference(opened, texts, settings, show_progress)
        measured[REFERENCE] = reference.quality
        for name in unknown:
            try:
                measured[name] = measure_variant(opened, name, reference=reference, show_progress=show_progress)
            except EngineError as error:
                missing[name] = str(error)
    variants = tuple(_variant(opened, name, measured.get(name), missing.get(name)) for name in names)
    if variants[0].quality is None:
        known = next(item.quality for item in variants if item.quality is not None)
        variants = (dataclasses.replace(variants[0], quality=_of_reference(known)), *variants[1:])
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
        BundleError: The bundle is damaged, or a variant went meanwhile, or was made otherwise.
    """
    with BundleExtension(bundle) as extension:
        manifest, changed = extension.bundle.full_manifest, {}
        for name, quality in measured.items():
            _check_same(bundle, extension.bundle, name, quality)
            changed[name] = dataclasses.replace(manifest.variants[name], quality=quality)
        return extension.commit(dataclasses.replace(manifest, variants={**manifest.variants, **changed}))


def _check_same(bundle: Bundle, now: Bundle, name: str, quality: Quality) -> None:
    """Refuses figures of a graph that is not the variant's any more.

    Raises:
        BundleError: The variant went, or its graph for the engine that was measured is another one.
    """
    now.variant(name)  # raises where it went
    ran = [engine.target for engine in ENGINES if engine.name == quality.engine.partition(" ")[0] and engine.target]
    for target in ran or bundle.variant(name).graphs:
        if graph_digest(bundle, name, target) != graph_digest(now, name, target):
            what = f"The variant {name!r} was made anew for {target} while it was measured"
            raise BundleError(what, where=str(now.path), remedy="Measure it again")


def _chosen(bundle: Bundle, variant: str | Sequence[str] | None) -> list[str]:
    everything = bundle.full_manifest.variants
    asked = [variant] if isinstance(variant, str) else list(everything if variant is None else variant)
    if not asked:
        raise InputError("No variant is asked for", where="variant", remedy="Name one, or leave it out for all")
    for name in asked if variant is not None else ():
        bundle.variant(name)
    return list(dict.fromkeys([REFERENCE, *asked]))


def _lost(bundle: Bundle, names: Sequence[str]) -> dict[str, str]:
    """Variants that lost files of all their graphs -> which."""
    found = {name: [key for key in bundle.lost if key[0] == name] for name in names}
    gone = {name: keys for name, keys in found.items() if name not in bundle.manifest.variants}
    return {name: "; ".join(f"{key[1]}: {bundle.lost_reason(*key)}" for key in keys) for name, keys in gone.items()}


def _variant(bundle: Bundle, name: str, measured: Quality | None, missing: str | None) -> VariantReport:
    content = bundle.full_manifest.variants[name]
    quality = measured if measured is not None or missing is not None else content.quality
    targets = tuple(content.graphs)
    return VariantReport(name, content.dtype, targets, quality, content.quantization, measured is not None, missing)


def _of_reference(quality: Quality) -> Quality:
    """What a variant's record says of fp32."""
    likelihood = quality.likelihood
    if likelihood is not None:
        likelihood = dataclasses.replace(likelihood, q=likelihood.reference_q, difference=0.0, interval=None)
    return dataclasses.replace(
        quality, engine=quality.reference_engine, size=quality.reference_size, likelihood=likelihood, greedy=None,
        encoder=None, timings=quality.reference_timings,
    )  # fmt: skip


__all__ = ["report", "save_quality"]
