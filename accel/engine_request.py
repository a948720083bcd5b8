"""What is asked of an engine, settled and checked before anything is made: for ``accel.build`` and warm-up jobs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from accel.bundle import Bundle
from accel.engines.kv_cache import DEFAULT_MAX_BATCH, check_count
from accel.engines.tensorrt.adapter import Compatibility, Flavour, load_flavour
from accel.engines.tensorrt.lookup import TARGET, Sources, hash_sources, passes_of, pick_precision
from accel.engines.tensorrt.memory import ALIGNMENT
from accel.engines.tensorrt.packages import MODULES, TITLES, cuda_version, current_gpu, current_sm
from accel.errors import BundleError, DependencyError, InputError
from accel.scheme import FLOAT8_SM, Scheme, parse_scheme
from accel.sizes import parse_size
from accel.spec import ArchSpec, ProfileRanges, TensorSpec
from accel.store import EngineKey

if TYPE_CHECKING:
    from accel.builder.build import BuildSettings
    from accel.builder.profiles import Profile

_log = logging.getLogger("accel")
SmNames = str | int | Sequence[str | int]
DEFAULT_CAPACITY = 2048  # positions; a cache is reserved whole on a GPU
DEFAULT_PRECISION = "fp16"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BFLOAT16_SM = INT4_SM = 80  # the first that computes in bf16, and that reads int4 [TensorRT-RTX 1.7.1 on sm75]


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
class Settled:
    """What is asked of a bundle's engines, checked as far as it can be without the variant's graph.

    Attributes:
        variant: The precision, whether or not the bundle has it.
        settings: For all SMs.
        max_batch: Most rows.
    """

    variant: str
    settings: BuildSettings
    max_batch: int


def load_builder(target: str) -> Flavour:
    """The flavour to build with.

    Raises:
        As ``load_flavour``; where only the other flavour is installed, the remedy names it too.
    """
    try:
        return load_flavour(target)
    except DependencyError as error:
        other = next((name for name in MODULES if name != target and find_spec(MODULES[name]) is not None), None)
        if other is None:
            raise
        instead = f"build for {TITLES[other]}, which is installed: --target {other} (target='{other}')"
        raise DependencyError(error.what, where=error.where, remedy=f"{error.remedy}; or {instead}") from error


def settle(
    bundle: Bundle,
    flavour: Flavour,
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
) -> Settled:
    """Fills in what is not said and checks all that a build would refuse before it reads the graph.

    Raises:
        As ``accel.build``.
    """
    from accel.builder.build import BuildSettings, check_settings
    from accel.builder.profiles import check_ranges

    arch = bundle.manifest.arch
    sms = _resolve_sms(flavour, sm)
    rows = check_count("max_batch", max_batch) or (32 if arch.kind == "encoder" else DEFAULT_MAX_BATCH)
    positions = _resolve_capacity(arch, check_count("capacity", capacity))
    recorded = bundle.manifest.profiles if max_batch is None else {}
    chosen = _choose_profiles(profiles, recorded, arch, rows, positions)
    if not isinstance(precision, str):
        raise InputError(f"{precision!r} is no precision", where="precision", remedy="Give a name, such as 'fp16'")
    variant = resolve_precision(bundle, precision)
    scheme = _check_variant(arch, variant)
    settings = BuildSettings(
        target=flavour.target, sm=sms, profiles=chosen, capacity=positions, dtype=DTYPES[scheme.gpu_base],
        optimization_level=optimization_level, refittable=refittable, hardware_compatibility=hardware_compatibility,
        workspace=None if workspace is None else parse_size(workspace, "workspace"),
    )  # fmt: skip
    check_settings(settings, flavour)
    check_ranges(chosen, arch, positions)
    _check_precision(settings, scheme, flavour)
    rows = _most_rows(arch, settings)
    _check_alignment(arch, settings, rows)
    return Settled(variant, settings, rows)


def resolve_precision(bundle: Bundle, precision: str) -> str:
    """The variant that a precision stands for; ``auto``: what the bundle has, or had before it lost files.

    Raises:
        BundleError: It lost files of that graph. Making it again may choose other integers, and another precision may
            lose more: neither is done without being asked.
    """
    variant = pick_precision(bundle.whole, "auto") or DEFAULT_PRECISION if precision == "auto" else precision
    try:
        bundle.refuse_lost(variant, TARGET)
    except BundleError as error:
        left = pick_precision(bundle, "auto") if precision == "auto" else None
        if left is None:
            raise
        remedy = f"{error.remedy}, or name the precision that is meant: --precision {left}"
        raise BundleError(error.what, where=error.where, remedy=remedy) from error
    return variant


def _choose_profiles(
    asked: Mapping[str, Any] | None,
    recorded: Mapping[str, ProfileRanges],
    arch: ArchSpec,
    rows: int,
    capacity: int | None,
) -> tuple[Profile, ...]:
    """Those asked for, else those of the bundle's recipe, else the usual ones."""
    from accel.builder.profiles import default_profiles, read_profiles, recorded_profiles

    if asked is None:
        return recorded_profiles(recorded) or default_profiles(arch, rows, capacity)
    if not isinstance(asked, Mapping):
        remedy = "Give the mapping that such a file holds, or the file to accel build --profiles"
        raise InputError(f"Profiles are a mapping, not {asked!r}", where="profiles", remedy=remedy)
    if not asked:
        remedy = "Name at least one, or leave them out for the usual ones"
        raise InputError("There is no profile", where="profiles", remedy=remedy)
    return read_profiles(asked)


def prepare(
    bundle: Bundle,
    flavour: Flavour,
    sm: SmNames = "auto",
    *,
    show_progress: bool | None = None,
    **asked: Any,
) -> list[BuildRequest]:
    """Settles what is asked, adds the variant where it is missing or outdated, and computes the keys; builds nothing.

    Args:
        asked: As ``settle``.
    """
    from accel.builder.build import per_sm

    settled = settle(bundle, flavour, sm, **asked)
    rows, variant, most = settled.max_batch, settled.variant, asked.get("max_batch")
    if most is not None and rows != most:
        _log.warning("max_batch=%d is not used: the profiles serve %d rows", most, rows)
    bundle = _ensure_variant(bundle, variant, show_progress)
    sources = hash_sources(bundle, variant)
    return [
        BuildRequest(bundle, variant, one, rows, _key(flavour, sources, bundle, variant, one), sources.files)
        for one in per_sm(settled.settings)
    ]


def split_sms(sm: SmNames) -> tuple[str, ...]:
    """Names of SMs from one text or several, each with one name or several between commas; ``86`` means ``sm86``.

    Raises:
        InputError: Neither texts nor whole numbers.
    """
    given = sm if isinstance(sm, (list, tuple)) else [sm]
    wrong = [one for one in given if isinstance(one, bool) or not isinstance(one, (str, int))]
    if wrong:
        raise InputError(f"{wrong[0]!r} is not the name of an SM", where="sm", remedy="Write it like sm='sm86'")
    names = [name.strip().lower() for one in given for name in str(one).split(",")]
    return tuple(f"sm{name}" if name.isdecimal() else name for name in names)


def _resolve_sms(flavour: Flavour, sm: SmNames) -> tuple[str, ...]:
    names = split_sms(sm)
    if names != ("auto",):
        return names
    here = current_sm()
    if here is None:
        known = ", ".join(flavour.known_sms())
        remedy = f"Name the GPU it is for, e.g. sm='sm89' (--sm sm89); known: {known}" if known else "Use target='rtx'"
        raise InputError("There is no GPU here to build for", where="sm", remedy=remedy)
    return (here,)


def _check_variant(arch: ArchSpec, variant: str) -> Scheme:
    """The scheme, if TensorRT runs a model in it.

    Raises:
        InputError: It does not, or there is no such scheme.
    """
    from accel.variant_targets import check_target, find_target

    scheme = parse_scheme(variant)
    check_target(arch, scheme, find_target(TARGET))
    return scheme


def _check_precision(settings: BuildSettings, scheme: Scheme, flavour: Flavour) -> None:
    """Types that a GPU lacks, or the library on it.

    Raises:
        InputError: One of the SMs does.
    """
    first = flavour.float32_sm
    lacking = ", ".join(sm for sm in settings.sm if int(sm[2:]) < first)
    if scheme.gpu_base == "fp32" and lacking:
        what = f"{flavour.title} multiplies no matrices in fp32 on {lacking}: sm{first} is the first"
        raise InputError(what, where="precision", remedy="Take fp16 (--precision fp16), or leave this SM out")
    needs = [("bf16", BFLOAT16_SM, scheme.gpu_base == "bf16"), ("int4", INT4_SM, scheme.weight_bits == 4)]
    for name, first, needed in (*needs, ("fp8", FLOAT8_SM, scheme.base == "fp8")):
        old = [sm for sm in settings.sm if int(sm[2:]) < first]
        if needed and old:
            what = f"{', '.join(old)} does not compute in {name}: sm{first} was the first"
            raise InputError(what, where="precision", remedy="Take fp16 (--precision fp16), or leave this SM out")
        if needed and first > 80 and settings.hardware_compatibility == "ampere+":
            what = f"an engine for ampere+ runs on sm80 too, which does not compute in {name}"
            raise InputError(what, where="hardware_compatibility", remedy="Leave it out, or take fp16")


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


def _ensure_variant(bundle: Bundle, variant: str, show_progress: bool | None) -> Bundle:
    from accel.variants import add_variant, is_current

    known = is_current(bundle, variant)
    bundle = add_variant(bundle, variant, target=TARGET, show_progress=show_progress)
    if not known:
        _log.info("%s: the variant %s was lowered for TensorRT and added to the bundle", bundle.path, variant)
    return bundle


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
        gpu=current_gpu() if flavour.needs_gpu else None,
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


__all__ = [
    "BuildRequest",
    "Settled",
    "SmNames",
    "load_builder",
    "prepare",
    "resolve_precision",
    "settle",
    "split_sms",
]
