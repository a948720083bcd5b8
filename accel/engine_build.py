"""``accel.build``: a bundle's engines, built where the store has none yet."""

from __future__ import annotations

import logging
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.bundle import Bundle
from accel.engine_request import BuildRequest, SmNames, load_builder, prepare
from accel.engines.kv_cache import bytes_per_token
from accel.engines.session import SessionOptions
from accel.engines.tensorrt.adapter import Compatibility, Flavour
from accel.engines.tensorrt.buffers import buffer_bytes
from accel.engines.tensorrt.lookup import TARGET, find_engine, open_store, pick_precision
from accel.engines.tensorrt.packages import current_sm
from accel.errors import AccelError, EngineStoreError, EngineUnavailableError, StorageError
from accel.store import EngineStore, StoredEngine, cache_folder

if TYPE_CHECKING:
    from accel.builder.build import BuildSettings, BuiltPlan

_log = logging.getLogger("accel")


@dataclass(frozen=True)
class EngineReport:
    """One engine of a build.

    Attributes:
        digest: Its name in the store.
        target, sm, variant, capacity, max_batch: What it is for.
        built: Whether it was built now; False: the store had it.
        size: Of the plan, in bytes.
        facts: What was measured when it was built.
        latency_ms: Median milliseconds of a call by profile, on this machine's GPU; None: not measured.
        not_measured: Why not; None: it was.
    """

    digest: str
    target: str
    sm: tuple[str, ...]
    variant: str
    capacity: int | None
    max_batch: int
    built: bool
    size: int
    facts: dict[str, Any]
    latency_ms: dict[str, float] | None = None
    not_measured: str | None = None


def build(
    bundle: Bundle | str | Path,
    target: str = "tensorrt",
    sm: SmNames = "auto",
    *,
    profiles: Mapping[str, Any] | None = None,
    precision: str = "auto",
    capacity: int | None = None,
    max_batch: int | None = None,
    optimization_level: int = 3,
    workspace: int | str | None = None,
    refittable: bool = False,
    hardware_compatibility: Compatibility = "none",
    store: EngineStore | str | Path | None = None,
    show_progress: bool | None = None,
    measure: bool = True,
) -> list[EngineReport]:
    """Builds a bundle's TensorRT engines, one per SM, unless the store has them.

    A precision that the bundle lacks, or that another version of the lowering made, is added to it first (see
    ``add_variant``). What is built for the GPU of this machine is also loaded, warmed up and timed; an engine that does
    not run stays in the store, and the report says so.

    Args:
        bundle: A bundle or its directory.
        target: ``tensorrt`` (for the GPU of this machine) or ``rtx`` (for any SM it knows, without a GPU).
        sm: ``auto``: this machine's GPU; or names such as ``sm86`` (or ``86``), as a list or between commas.
        profiles: ``{name: {batch: {min, opt, max}, sequence: {min, opt, max}}}``; None: those of the
            recipe that the bundle was exported with, else, and where ``max_batch`` is given, the usual ones.
        precision: ``auto`` (what the bundle has, fp16 first), ``fp32``, ``fp16``, ``bf16``, or a
            variant with fewer bits, such as ``w4g32``, ``w8a8`` or ``fp8``.
        capacity: Cache positions per row, decoders only; None: 2,048 or what the model covers.
        max_batch: Most rows; None: 8, encoders 32. With ``profiles`` theirs counts.
        optimization_level: 0 (fast to build) to 5 (tries most).
        workspace: Scratch memory that a layer may take, in bytes or as ``"2G"``; None: the library's default.
        refittable: Whether weights can be replaced later.
        hardware_compatibility: TensorRT only: ``same`` (SM) or ``ampere+`` lets other GPUs run the engine.
        store: Where engines are kept: a store, a directory or URL; None: ``ACCEL_STORE``, else this user's cache.
        show_progress: Bars on stderr; None: when it is a terminal.
        measure: Time each profile after a build, where there is a GPU for it.

    Returns:
        One report per SM.

    Raises:
        InputError, DependencyError, EngineBuildError, EngineProofError: see ``accel.builder.build.build_plan``.
        BundleError: A damaged bundle, a precision (of ``auto`` too) whose files it lost, or an outdated one that cannot
            be lowered again here.
        StorageError, EngineStoreError, RefusedEngineError: The store cannot be used, holds a bad engine, or may not
            hold all that is asked for: its size limit removed the first engines for the last, which stay.
        KeyboardInterrupt: Ctrl-C, or SIGTERM where this program handles it and its handler raises nothing; nothing
            half made is left.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    flavour = load_builder(target)
    requests = prepare(
        opened, flavour, sm, profiles=profiles, precision=precision, capacity=capacity, max_batch=max_batch,
        optimization_level=optimization_level, workspace=workspace, refittable=refittable,
        hardware_compatibility=hardware_compatibility, show_progress=show_progress,
    )  # fmt: skip
    place = store if isinstance(store, EngineStore) else open_store(store)
    reports = [build_one(request, flavour, place, show_progress, measure) for request in requests]
    _check_kept(place, reports)
    return reports


def removed_engines(store: EngineStore, digests: Collection[str]) -> set[str]:
    """Those of the engines that the store's size limit has removed again. It removes the first for the last.

    Raises:
        EngineStoreError: The store cannot be read.
    """
    if store.max_bytes is None:
        return set()
    return set(digests) - {entry.digest for entry in store.entries()}


def _check_kept(store: EngineStore, reports: Sequence[EngineReport]) -> None:
    removed = removed_engines(store, [report.digest for report in reports])
    most, needed = store.max_bytes, sum(one.size for one in reports)
    if most is None or (not removed and needed <= most):
        return
    names = ", ".join(f"{'+'.join(one.sm)} {one.variant}" for one in reports if one.digest in removed)
    gone = f"{len(removed)} of {len(reports)} engines were removed from the store for later ones, which stay: {names}"
    said = gone if removed else "The store holds more than it may, as the newest engine always stays"
    what = f"{said}. It may hold {most / 1e6:.1f} MB, and all take {needed / 1e6:.1f} MB"
    remedy = "Raise the limit (ACCEL_STORE_MAX_BYTES), or give another store (--store, store=)"
    raise EngineStoreError(what, where=store.url, remedy=remedy)


def build_missing(
    bundle: Bundle, target: str, variant: str, capacity: int | None, max_batch: int | None, store: str | Path | None
) -> None:
    """Builds the engine that ``accel.load`` would not find; nothing where it would, or where there is no GPU.

    Raises:
        As ``build``.
    """
    flavour, sm = load_builder(target), current_sm()
    if sm is None:
        return
    chosen = pick_precision(bundle, variant)
    if chosen is not None:
        options = SessionOptions(capacity=capacity, max_batch=max_batch)
        try:
            find_engine(open_store(store), bundle, chosen, flavour, sm, options)[0].close()
            return
        except EngineUnavailableError:
            pass
    build(bundle, target, precision=variant, capacity=capacity, max_batch=max_batch, store=store, measure=False)


def build_one(
    request: BuildRequest,
    flavour: Flavour,
    store: EngineStore,
    show_progress: bool | None = None,
    measure: bool = False,
) -> EngineReport:
    """One engine from the store, or built and put there. Many processes may ask for it: one builds (and measures)."""

    def make() -> tuple[Any, dict[str, Any]]:
        built = _build(request, flavour, show_progress)
        return built.plan, _facts(request, built)

    engine = store.get_or_build(request.key, make, on_wait=_say_waiting(request))
    with engine:
        report = _report(request, engine)
        if not measure:
            return replace(report, not_measured="not asked for")
        return _measured(report, request, engine, flavour)


def _measured(report: EngineReport, request: BuildRequest, engine: StoredEngine, flavour: Flavour) -> EngineReport:
    """The report with the engine's latency. The engine stands whatever this finds."""
    from accel.engine_latency import measure_engine

    if not engine.built:
        return replace(report, not_measured="the store had it")
    try:
        return replace(report, latency_ms=measure_engine(request, engine, flavour))
    except AccelError as error:
        return replace(report, not_measured=error.what)


def _build(request: BuildRequest, flavour: Flavour, show_progress: bool | None) -> BuiltPlan:
    """Builds, with what earlier builds timed; notes what this one did."""
    from accel.builder.build import build_plan
    from accel.builder.files import History, TimingCaches
    from accel.builder.progress import BuildMonitor, ProgressBars
    from accel.variants import canonical_graph

    settings, bundle = request.settings, request.bundle
    folder = cache_folder() / "builds"
    timings, history = TimingCaches(folder), History(folder / "history.json")
    like, details = _like(bundle, flavour), _details(request.variant, settings)
    graph = bundle.file(bundle.graph(request.variant, TARGET).file)
    canonical, weights = canonical_graph(bundle), bundle.weights(request.variant, TARGET)
    title = f"{bundle.path.name} {request.variant} {'+'.join(settings.sm)}"
    cache = timings.load(flavour, settings.sm)
    with ProgressBars(title, show_progress) as bars:
        monitor = BuildMonitor(bars, history.seconds(like, details))
        built = build_plan(
            graph, bundle.manifest.arch, settings, canonical=canonical, weights=weights, timing_cache=cache,
            monitor=monitor,
        )  # fmt: skip
    with suppress(StorageError):  # they make the next build faster; this one is done
        timings.save(flavour, settings.sm, built.timing_cache)
        history.record(like, built.facts.phases, details)
    return built


def past_seconds(bundle: Bundle, flavour: Flavour, variant: str, settings: BuildSettings) -> float | None:
    """What the latest build most like this one took on this machine; None: there was none of such a model."""
    from accel.builder.files import History

    history = History(cache_folder() / "builds" / "history.json")
    phases = history.seconds(_like(bundle, flavour), _details(variant, settings))
    return sum(phases.values()) if phases else None


def _like(bundle: Bundle, flavour: Flavour) -> str:
    arch = bundle.manifest.arch
    return f"{flavour.target} {flavour.version} {arch.architecture} {len(arch.layers)} x {arch.hidden_size}"


def _details(variant: str, settings: BuildSettings) -> tuple[str, ...]:
    """What else the time of a build depends on, the more telling first."""
    return variant, f"level {settings.optimization_level}", "+".join(settings.sm), f"capacity {settings.capacity}"


def _facts(request: BuildRequest, built: BuiltPlan) -> dict[str, Any]:
    from accel.schema import to_dict

    return {
        **to_dict(built.facts),
        "model": request.bundle.manifest.source,
        "bundle": request.bundle.path.name,
        "max_batch": request.max_batch,
        "hardware_compatibility": request.settings.hardware_compatibility,
        "sources": request.sources,
        "profile_order": [profile.name for profile in request.settings.profiles],
        "cache_bytes": _cache_bytes(request),
        "buffer_bytes": _buffer_bytes(request),
        "proof": {"rows": len(built.proof.rows), "repairs": list(built.proof.repairs), "table": built.proof.text()},
        "python": platform.python_version(),
    }


def _cache_bytes(request: BuildRequest) -> int:
    """Device memory that the caches of all rows take."""
    arch, item = request.bundle.manifest.arch, 4 if request.settings.dtype == "float32" else 2
    return request.max_batch * (request.settings.capacity or 0) * bytes_per_token(arch, item)


def _buffer_bytes(request: BuildRequest) -> int:
    """Device memory that a session of all rows reserves, beside the engine's weights and scratch memory."""
    outputs = {spec.name: spec.shape for spec in request.bundle.graph(request.variant, TARGET).outputs}
    profiles = list(request.key.profiles.values())
    return buffer_bytes(request.bundle.manifest.arch, profiles, outputs, _cache_bytes(request))


def _report(request: BuildRequest, engine: StoredEngine) -> EngineReport:
    manifest = engine.manifest
    return EngineReport(
        manifest.key.digest, manifest.key.target, manifest.key.sm, request.variant, manifest.key.capacity,
        request.max_batch, engine.built, manifest.size, manifest.facts,
    )  # fmt: skip


def _say_waiting(request: BuildRequest) -> Any:
    said = False

    def say(seconds: float) -> None:
        nonlocal said
        if not said:
            _log.info("%s: another process builds this engine; waiting for it", request.bundle.path)
            said = True

    return say


__all__ = ["EngineReport", "build", "build_one", "past_seconds", "removed_engines"]
