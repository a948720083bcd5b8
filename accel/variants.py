"""Adds a precision, or its graph for another target, to a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.capabilities import install_export
from accel.errors import BundleError, DependencyError, QualityError, StorageError
from accel.manifest import GraphEntry
from accel.quality import Gate, Settings, measure_reference, measure_variant, resolve_text
from accel.scheme import Scheme, parse_scheme
from accel.sizes import parse_size
from accel.variant_addition import Addition, Quantizing
from accel.variant_checks import BASE, CANONICAL, LIMITS, quantize_command
from accel.variant_targets import DEFAULT, Target, check_target, default_targets, find_target


def add_variant(
    bundle: Bundle | str | Path,
    variant: str,
    *,
    target: str | None = None,
    check: bool = True,
    algorithm: str = "auto",
    calibration: str | Path | Sequence[str] | None = None,
    keep: Mapping[str, int] | None = None,
    head_bits: int | None = None,
    max_bytes: int | str | None = None,
    max_layer_error: float | None = None,
    q_budget: float | None = None,
    measure: bool = True,
    text: str | Path | Sequence[str] | None = None,
    max_q_drop: float | None = None,
    min_cosine: float | None = None,
    show_progress: bool | None = None,
) -> Bundle:
    """Adds a variant's graph for a target, and its weights, to a bundle, unless they are there.

    One that is there stays as it was made, whatever is asked for now; ``max_q_drop`` and ``min_cosine`` hold it too.

    A graph in floats is evaluated with PyTorch in its own precision (OpenVINO's, which rounds by itself, in
    OpenVINO, which must be installed) and compared with the bundle's fp32 engine. One with integers runs in its
    engine (for GPUs it is evaluated) and is compared with PyTorch on the same integers; what the rounding costs a
    CPU's graph is measured on text and recorded, see ``accel.quality``. Weights that the variant's graph for
    another target has stored already are read there, and so are those of a variant for the same target that differs in
    the cache alone, where they are the same. A graph that another version of the lowering wrote, or an
    accel that recorded no version, is lowered again: new files take the place of the old ones, which go. So is one that
    lost files, with what is asked for now.

    Args:
        bundle: A bundle or its directory; its other files stay as they are.
        variant: A scheme's name, see ``accel.scheme``: ``fp32``, ``fp16``, ``bf16``, ``w8a8-dyn``, ``w4g32+kv8``, ...
        target: ``ort-cpu``, ``openvino``, ``tensorrt``, ``cuda`` or ``ort-cuda``. None: ``tensorrt`` for floats, and
            for integers the first that takes them.
        check: Compare. Off only for graphs that are checked elsewhere.
        algorithm: Chooses the integers: ``auto``, ``rtn``, ``gptq``, ... see ``accel.compress``.
        calibration: Text that algorithms and caches are calibrated on: a UTF-8 file, or passages. None: a built-in one.
        keep: Names or patterns of weights -> 8, 4 or 32 (float) bits.
        head_bits: Of the LM head and a table tied to it; None: chosen by the scheme.
        max_bytes: The most sensitive layers are kept finer as long as the weights stay within; None: none is.
        max_layer_error: Layers whose outputs lose more (relative, Frobenius norm) are kept finer.
        q_budget: Decoders: as few layers are kept finer as let Q, the mean log probability per token of the
            calibration text, fall by this at most; within ``max_bytes``, if that is given too.
        measure: Measure what a variant that runs here costs, and record it.
        text: To measure on: a UTF-8 file, or passages. None: the built-in texts.
        max_q_drop: Decoders: the most that the mean log probability per token may fall.
        min_cosine: Encoders: the least mean cosine of outputs to fp32's.
        show_progress: Show stages on stderr; None: when it is a terminal.

    Returns:
        The bundle, opened anew.

    Raises:
        InputError: An unknown variant or target, a target that cannot run the variant, or an option that would be
            ignored: a limit where nothing is measured, a choice of integers where there are none.
        ParityError: The rounding, or the graph, costs more than the limit; nothing was added.
        QualityError: The variant loses more than ``max_q_drop`` or ``min_cosine`` allows; nothing was added (one that
            was there already stays).
        BundleError: It is damaged, its weight file has hard links, or an outdated variant cannot be lowered again.
        ExportError: A weight exceeds the variant's range, or a layer has no lowering.
        StorageError: Writing failed; nothing was added.
        DependencyError: A package that this variant needs is missing.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    quantizing = read_choices(
        algorithm, calibration, keep, head_bits, max_bytes, max_layer_error, q_budget, measure, text,
        Gate(max_q_drop, min_cosine),
    )  # fmt: skip
    scheme, chosen = check_addition(opened, variant, target, quantizing)
    if not is_current(opened, scheme.name, chosen.name):
        with _outdated_in_words(opened, scheme.name, chosen.name):
            check_packages(scheme, chosen, check)
            from accel.exporter.progress import ExportProgress

            with BundleExtension(opened) as extension, ExportProgress(show_progress) as progress:
                opened = extension.bundle
                if not is_current(opened, scheme.name, chosen.name):  # no other process was faster
                    addition = Addition(extension, scheme, chosen, quantizing, progress)
                    manifest = addition.make(check)
                    progress.stage("Hashing and syncing")
                    return extension.commit(manifest, addition.outdated(manifest))
    _hold_known(opened, scheme.name, chosen.name, quantizing)
    return opened


def read_choices(
    algorithm: str,
    calibration: str | Path | Sequence[str] | None,
    keep: Mapping[str, int] | None,
    head_bits: int | None,
    max_bytes: int | str | None,
    max_layer_error: float | None,
    q_budget: float | None,
    measure: bool,
    text: str | Path | Sequence[str] | None,
    gate: Gate,
) -> Quantizing:
    """The options of ``add_variant`` as one; its text is read.

    Raises:
        InputError: A size or a text of no use.
    """
    most = None if max_bytes is None else parse_size(max_bytes, "max_bytes", least=1)
    evaluation = None if text is None else resolve_text(text)
    budgets = most, max_layer_error, q_budget
    return Quantizing(algorithm, calibration, measure, gate, evaluation, keep, head_bits, *budgets)


def check_addition(bundle: Bundle, variant: str, target: str | None, quantizing: Quantizing) -> tuple[Scheme, Target]:
    """The scheme and target that ``add_variant`` would add, before anything is made.

    Raises:
        InputError: An unknown variant or target, one that cannot run the other, or a choice that would be ignored.
    """
    scheme, arch = parse_scheme(variant), bundle.manifest.arch
    chosen = find_target(target or _first_target(bundle, variant))
    asked = dataclasses.replace(scheme, name=variant)  # messages call it as the caller does: kv8, not fp32+kv8
    check_target(arch, asked, chosen, bundle.path)
    quantizing.check(arch.kind, asked, chosen)
    return scheme, chosen


def check_packages(scheme: Scheme, target: Target, check: bool) -> None:
    """Refuses a variant that cannot be made or compared with the packages that are here, before anything is begun.

    Raises:
        DependencyError: Names the packages, and the pip command that brings them.
    """
    needed = {
        "onnx": True,
        "onnx_ir": True,
        "onnxruntime": True,  # computes tables of positions, and what graphs are compared with
        "onnxscript": not target.rounds,  # folds constants, which is left to OpenVINO
        "torch": scheme.quantized or scheme.base == "fp8" or (check and not target.rounds),
    }
    missing = [name for name, wanted in needed.items() if wanted and find_spec(name) is None]
    if missing:
        what = f"Adding {scheme.name} for {target.title} needs packages that are not installed: {', '.join(missing)}"
        raise DependencyError(what, remedy=f"Install them: {install_export(missing)}")


def is_current(bundle: Bundle, variant: str, target: str = DEFAULT) -> bool:
    """Whether a bundle has a variant's graph for a target, as this version of the lowering writes it."""
    entry = _entry(bundle, variant, target)
    return entry is not None and entry.lowering == find_target(target).version


def canonical_graph(bundle: Bundle) -> Path | None:
    """The graph that all variants are lowered from; None: the bundle does not hold it."""
    base = bundle.manifest.variants.get(BASE)
    return bundle.file(base.graphs[CANONICAL].file) if base is not None and CANONICAL in base.graphs else None


def _first_target(bundle: Bundle, variant: str) -> str:
    able = default_targets(bundle.manifest.arch, variant, bundle.path)
    return DEFAULT if DEFAULT in able else able[0]


def _hold_known(bundle: Bundle, variant: str, target: str, quantizing: Quantizing) -> None:
    """Holds a variant that is there already to the gate, measured where no record is of the text that is asked for.

    Raises:
        QualityError: It lost more than it may; it stays in the bundle.
    """
    gate, text = quantizing.gate, quantizing.text
    if gate == Gate():
        return
    quality = bundle.variant(variant).quality
    if quality is None or (text is not None and quality.text_sha256 != text.sha256):
        reference = measure_reference(bundle, text, Settings(engine=target))
        quality = measure_variant(bundle, variant, reference=reference)
    try:
        gate.hold(variant, quality, str(bundle.path))
    except QualityError as error:
        remedy = f"It was in the bundle already, and stays there. {error.remedy}"
        raise QualityError(
            error.what, value=error.value, limit=error.limit, where=error.where, remedy=remedy
        ) from error


def _entry(bundle: Bundle, variant: str, target: str) -> GraphEntry | None:
    found = bundle.manifest.variants.get(variant)
    return None if found is None else found.graphs.get(target)


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
        remedy = f"Run it {where}: {quantize_command(bundle, variant, target)}"
        raise BundleError(what, where=str(bundle.path), remedy=remedy) from error


__all__ = ["LIMITS", "add_variant", "canonical_graph", "check_addition", "check_packages", "is_current", "read_choices"]
