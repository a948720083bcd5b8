"""``accel.build``: a bundle's engines, built where the store has none yet."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.bundle import Bundle
from accel.engines.kv_cache import DEFAULT_MAX_BATCH, bytes_per_token, check_count
from accel.engines.session import SessionOptions
from accel.engines.tensorrt.adapter import Compatibility, Flavour, load_flavour
from accel.engines.tensorrt.lookup import (
    TARGET,
    Sources,
    find_engine,
    hash_sources,
    open_store,
    passes_of,
    pick_precision,
)
from accel.engines.tensorrt.memory import ALIGNMENT
from accel.engines.tensorrt.packages import cuda_version, current_sm
from accel.errors import EngineUnavailableError, InputError, StorageError
from accel.spec import ArchSpec, TensorSpec
from accel.store import EngineKey, EngineStore, StoredEngine, cache_folder

if TYPE_CHECKING:
    from accel.builder.build import BuildSettings, BuiltPlan
    from accel.builder.profiles import Profile

_log = logging.getLogger("accel")
DEFAULT_CAPACITY = 2048  # positions; a cache is reserved whole on a GPU
DEFAULT_PRECISION = "fp16"


@dataclass(frozen=True)
class BuildRequest:
    """Everything that is asked of one engine, settled.

    Attributes:
        bundle: Opened; it has the variant's TensorRT graph.
        variant: Its precision.
        settings: For the builder.
        max_batch: Most rows.
        key: What it is stored under.
        sources: Files of the bundle that it is made from -> their sha256.
    """

    bundle: Bundle
    variant: str
    settings: BuildSettings
    max_batch: int
    key: EngineKey
    sources: dict[str, str]


@dataclass(frozen=True)
class EngineReport:
    """One engine of a build.

    Attributes:
        digest: Its name in the store.
        target, sm, variant, capacity, max_batch: What it is for.
        built: Whether it was built now; False: the store had it.
        size: Of the plan, in bytes.
        facts: What was measured when it was built.
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


def build(
    bundle: Bundle | str | Path,
    target: str = "tensorrt",
    sm: str | Sequence[str] = "auto",
    *,
    profiles: Mapping[str, Any] | None = None,
    precision: str = "auto",
    capacity: int | None = None,
    max_batch: int | None = None,
    optimization_level: int = 3,
    workspace: int | None = None,
    refittable: bool = False,
    hardware_compatibility: Compatibility = "none",
    store: EngineStore | str | Path | None = None,
    show_progress: bool | None = None,
) -> list[EngineReport]:
    """Builds a bundle's TensorRT engines, one per SM, unless the store has them.

    A precision that the bundle lacks, or that another version of the lowering made, is added to it first (see
    ``add_variant``).

    Args:
        bundle: A bundle or its directory.
        target: ``tensorrt`` (for the GPU of this machine) or ``rtx`` (for any SM it knows, without a GPU).
        sm: ``auto``: this machine's GPU; or names such as ``sm86``.
        profiles: ``{name: {batch: {min, opt, max}, sequence: {min, opt, max}}}``; None: the usual ones.
        precision: ``auto`` (what the bundle has, fp16 first), ``fp32``, ``fp16`` or ``bf16``.
        capacity: Cache positions per row, decoders only; None: 2,048 or what the model covers.
        max_batch: Most rows; None: 8, encoders 32. With ``profiles`` theirs counts.
        optimization_level: 0 (fast to build) to 5 (tries most).
        workspace: Bytes of scratch memory that a layer may take; None: the library's default.
        refittable: Whether weights can be replaced later.
        hardware_compatibility: TensorRT only: ``same`` (SM) or ``ampere+`` lets other GPUs run the engine.
        store: Where engines are kept: a store, a directory or URL; None: ``ACCEL_STORE``, else this user's cache.
        show_progress: Bars on stderr; None: when it is a terminal.

    Returns:
        One report per SM.

    Raises:
        InputError, DependencyError, EngineBuildError, EngineProofError: see ``accel.builder.build.build_plan``.
        BundleError: A damaged bundle, or an outdated precision that cannot be lowered again here.
        StorageError, EngineStoreError, RefusedEngineError: The store cannot be used, or holds a bad engine.
        KeyboardInterrupt: Ctrl-C; nothing half made is left.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    flavour = load_flavour(target)
    requests = prepare(
        opened, flavour, sm, profiles=profiles, precision=precision, capacity=capacity, max_batch=max_batch,
        optimization_level=optimization_level, workspace=workspace, refittable=refittable,
        hardware_compatibility=hardware_compatibility, show_progress=show_progress,
    )  # fmt: skip
    place = store if isinstance(store, EngineStore) else open_store(store)
    return [build_one(request, flavour, place, show_progress) for request in requests]


def build_missing(
    bundle: Bundle, target: str, variant: str, capacity: int | None, max_batch: int | None, store: str | Path | None
) -> None:
    """Builds the engine that ``accel.load`` would not find; nothing where it would, or where there is no GPU.

    Raises:
        As ``build``.
    """
    flavour, sm = load_flavour(target), current_sm()
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
    build(bundle, target, precision=variant, capacity=capacity, max_batch=max_batch, store=store)


def prepare(
    bundle: Bundle,
    flavour: Flavour,
    sm: str | Sequence[str] = "auto",
    *,
    profiles: Mapping[str, Any] | None = None,
    precision: str = "auto",
    capacity: int | None = None,
    max_batch: int | None = None,
    optimization_level: int = 3,
    workspace: int | None = None,
    refittable: bool = False,
    hardware_compatibility: Compatibility = "none",
    show_progress: bool | None = None,
) -> list[BuildRequest]:
    """Settles what is asked, adds the variant where it is missing, and computes the keys; builds nothing."""
    from accel.builder.build import BuildSettings, check_settings, per_sm
    from accel.builder.profiles import default_profiles, read_profiles

    arch = bundle.manifest.arch
    sms = _resolve_sms(flavour, sm)
    rows = check_count("max_batch", max_batch) or (32 if arch.kind == "encoder" else DEFAULT_MAX_BATCH)
    positions = _resolve_capacity(arch, check_count("capacity", capacity))
    chosen = read_profiles(profiles) if profiles is not None else default_profiles(arch, rows, positions)
    if not chosen:
        remedy = "Name at least one, or leave them out for the usual ones"
        raise InputError("There is no profile", where="profiles", remedy=remedy)
    settings = BuildSettings(
        target=flavour.target, sm=sms, profiles=chosen, capacity=positions, optimization_level=optimization_level,
        workspace=workspace, refittable=refittable, hardware_compatibility=hardware_compatibility,
    )  # fmt: skip
    check_settings(settings, flavour)
    rows = _most_rows(arch, settings)
    if max_batch is not None and rows != max_batch:
        _log.warning("max_batch=%d is not used: the profiles serve %d rows", max_batch, rows)
    bundle, variant = _ensure_variant(bundle, precision, show_progress)
    sources = hash_sources(bundle, variant)
    settings = replace(settings, dtype=bundle.variant(variant).dtype)
    _check_alignment(arch, settings, rows)
    return [
        BuildRequest(bundle, variant, one, rows, _key(flavour, sources, bundle, variant, one), sources.files)
        for one in per_sm(settings)
    ]


def build_one(
    request: BuildRequest, flavour: Flavour, store: EngineStore, show_progress: bool | None = None
) -> EngineReport:
    """One engine from the store, or built and put there. Many processes may ask for it: one builds."""

    def make() -> tuple[Any, dict[str, Any]]:
        built = _build(request, flavour, show_progress)
        return built.plan, _facts(request, built)

    engine = store.get_or_build(request.key, make, on_wait=_say_waiting(request))
    with engine:
        return _report(request, engine)


def _resolve_sms(flavour: Flavour, sm: str | Sequence[str]) -> tuple[str, ...]:
    names = (sm.lower(),) if isinstance(sm, str) else tuple(name.lower() for name in sm)
    if names != ("auto",):
        return names
    here = current_sm()
    if here is None:
        known = ", ".join(flavour.known_sms())
        remedy = f"Name the GPU it is for, e.g. sm='sm89' (--sm sm89); known: {known}" if known else "Use target='rtx'"
        raise InputError("There is no GPU here to build for", where="sm", remedy=remedy)
    return (here,)


def _resolve_capacity(arch: ArchSpec, asked: int | None) -> int | None:
    if arch.kind == "encoder":
        if asked is not None:
            what = "capacity sizes a decoder's cache, and this model is an encoder"
            raise InputError(what, where="capacity", remedy="Leave it out")
        return None
    most = min(DEFAULT_CAPACITY, arch.max_positions)
    return asked or most // 16 * 16 or most  # whole sixteens: cache rows begin at aligned addresses


def _most_rows(arch: ArchSpec, settings: BuildSettings) -> int:
    """Rows that the engine serves together: decoders run several rows on profiles of single tokens alone."""
    if not settings.profiles:
        raise InputError("An engine needs a profile", where="profiles", remedy="Leave them out to get the usual ones")
    single = [profile for profile in settings.profiles if profile.sequence.max == 1 and arch.kind == "decoder"]
    return max(profile.batch.max for profile in (single or settings.profiles))


def _check_alignment(arch: ArchSpec, settings: BuildSettings, rows: int) -> None:
    """A cache row must be a multiple of 256 bytes for runs over later rows."""
    item = 4 if settings.dtype == "float32" else 2
    for layer in arch.layers:
        size = layer.kv_heads * layer.head_dim * item
        step = ALIGNMENT // math.gcd(size, ALIGNMENT)
        if rows > 1 and settings.capacity is not None and settings.capacity % step:
            lower = settings.capacity // step * step
            near = f"{lower} or {lower + step}" if lower else str(step)
            what = f"a cache row of {settings.capacity} positions is no multiple of {ALIGNMENT} bytes"
            raise InputError(what, where="capacity", remedy=f"Take a capacity of {near}, or max_batch=1")


def _ensure_variant(bundle: Bundle, precision: str, show_progress: bool | None) -> tuple[Bundle, str]:
    from accel.variants import add_variant, is_current

    variant = pick_precision(bundle, "auto") or DEFAULT_PRECISION if precision == "auto" else precision
    known = is_current(bundle, variant)
    bundle = add_variant(bundle, variant, show_progress=show_progress)
    if not known:
        _log.info("%s: the variant %s was lowered for TensorRT and added to the bundle", bundle.path, variant)
    return bundle, variant


def _key(flavour: Flavour, sources: Sources, bundle: Bundle, variant: str, settings: BuildSettings) -> EngineKey:
    inputs, passes = bundle.graph(variant, TARGET).inputs, passes_of(bundle, variant)
    assert passes is not None, "the variant is current"
    return EngineKey(
        graph=sources.graph,
        weights=sources.weights,
        target=flavour.target,
        library_version=flavour.version,
        sm=settings.sm,
        variant=variant,
        passes=passes,
        optimization_level=settings.optimization_level,
        capacity=settings.capacity,
        profiles={profile.name: _shapes(profile, inputs, settings.capacity) for profile in settings.profiles},
        gpu=_gpu_name() if flavour.needs_gpu else None,
        cuda=cuda_version() if flavour.needs_gpu else None,
        workspace_bytes=settings.workspace,
        refittable=settings.refittable,
        flags={"hardware_compatibility": settings.hardware_compatibility},
    )


def _shapes(profile: Profile, inputs: tuple[TensorSpec, ...], capacity: int | None) -> dict[str, Any]:
    from accel.builder.profiles import input_shapes

    static = [
        TensorSpec(spec.name, spec.dtype, tuple(capacity if size == "C" and capacity else size for size in spec.shape))
        for spec in inputs
    ]
    return dict(input_shapes(profile, static))


def _gpu_name() -> str | None:
    from accel.machine import probe_gpus

    return next((gpu.name for gpu in probe_gpus()), None)


def _build(request: BuildRequest, flavour: Flavour, show_progress: bool | None) -> BuiltPlan:
    """Builds, with what earlier builds timed; notes what this one did."""
    from accel.builder.build import build_plan
    from accel.builder.files import History, TimingCaches
    from accel.builder.progress import BuildMonitor, ProgressBars
    from accel.variants import canonical_graph

    settings, bundle = request.settings, request.bundle
    folder = cache_folder() / "builds"
    timings, history = TimingCaches(folder), History(folder / "history.json")
    like = _like(bundle, flavour)
    graph = bundle.file(bundle.graph(request.variant, TARGET).file)
    canonical, weights = canonical_graph(bundle), bundle.variant(request.variant).weights
    title = f"{bundle.path.name} {request.variant} {'+'.join(settings.sm)}"
    cache = timings.load(flavour, settings.sm)
    with ProgressBars(title, show_progress) as bars:
        monitor = BuildMonitor(bars, history.seconds(like))
        built = build_plan(
            graph, bundle.manifest.arch, settings, canonical=canonical, weights=weights, timing_cache=cache,
            monitor=monitor,
        )  # fmt: skip
    with suppress(StorageError):  # they make the next build faster; this one is done
        timings.save(flavour, settings.sm, built.timing_cache)
        history.record(like, built.facts.phases)
    return built


def past_seconds(bundle: Bundle, flavour: Flavour) -> float | None:
    """What the latest build like this one took on this machine; None: there was none."""
    from accel.builder.files import History

    phases = History(cache_folder() / "builds" / "history.json").seconds(_like(bundle, flavour))
    return sum(phases.values()) if phases else None


def _like(bundle: Bundle, flavour: Flavour) -> str:
    arch = bundle.manifest.arch
    return f"{flavour.target} {flavour.version} {arch.architecture} {len(arch.layers)}"


def _facts(request: BuildRequest, built: BuiltPlan) -> dict[str, Any]:
    from accel.schema import to_dict

    return {
        **to_dict(built.facts),
        "max_batch": request.max_batch,
        "hardware_compatibility": request.settings.hardware_compatibility,
        "sources": request.sources,
        "profile_order": [profile.name for profile in request.settings.profiles],
        "cache_bytes": _cache_bytes(request),
        "proof": {"rows": len(built.proof.rows), "repairs": list(built.proof.repairs), "table": built.proof.text()},
        "python": platform.python_version(),
    }


def _cache_bytes(request: BuildRequest) -> int:
    """Device memory that the caches of all rows take."""
    arch, item = request.bundle.manifest.arch, 4 if request.settings.dtype == "float32" else 2
    return request.max_batch * (request.settings.capacity or 0) * bytes_per_token(arch, item)


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


__all__ = ["BuildRequest", "EngineReport", "build", "build_one", "past_seconds", "prepare"]
