"""Looks every engine up in the store, and says what the missing ones will cost; builds nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from accel.bundle import Bundle
from accel.engine_build import past_seconds
from accel.engine_request import DEFAULT_PRECISION, BuildRequest, load_builder, prepare, resolve_precision, settle
from accel.engines import ENGINES, SessionOptions
from accel.engines.kv_cache import check_count, resolve_cache
from accel.engines.tensorrt.adapter import Flavour
from accel.engines.tensorrt.lookup import TARGET
from accel.engines.tensorrt.packages import current_sm
from accel.errors import AccelError, InputError, RefusedEngineError, StorageError
from accel.schema import suggest
from accel.scheme import parse_scheme
from accel.spec import ArchSpec
from accel.storage import check_writable
from accel.store import EngineManifest, EngineStore
from accel.variant_checks import quantize_command
from accel.variant_targets import check_target, find_target
from accel.variants import LIMITS, is_current
from accel.warmup_jobs.jobs import WARMED, Wanted

MEMORY_PER_WEIGHT = 2.5  # peak of a build by the bytes of its weights
BUILD_BASE = 512 << 20  # the library itself: a build without weights
VARIANT_BASE = 1 << 30  # PyTorch, which checks a new variant
VARIANT_MISSING = "variant missing"
VARIANT_OUTDATED = "variant outdated"  # another version of the lowering made it


@dataclass(frozen=True)
class PlannedEngine:
    """One engine of a plan.

    Attributes:
        wanted: What was asked for.
        state: ``hit``: the store has it; of ``WARMED`` targets: the bundle has its graph. ``miss``: to be built, or
            lowered. ``failed``: it cannot be.
        reason: Why it is no hit.
        missing: Precision that must be added to the bundle, or lowered again, first; None: it is there.
        variant: Precision that it has or will have.
        digest: Its name in the store; None as long as it is not known.
        bytes: Size of a hit's plan.
        memory: Bytes that its build is expected to take.
        seconds: That the build is expected to take; None: there was none like it on this machine.
        note: What of the job is not used for this engine.
        alone: Whether its build times kernels on the GPU and so must not be disturbed.
    """

    wanted: Wanted
    state: Literal["hit", "miss", "failed"]
    reason: str | None = None
    missing: str | None = None
    variant: str | None = None
    digest: str | None = None
    bytes: int | None = None
    memory: int = 0
    seconds: float | None = None
    note: str | None = None
    alone: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return self.wanted.title(self.variant)


class Planner:
    """Plans engines, opening each bundle and listing each folder of the store once.

    Args:
        store: Where engines are looked up.
        verify: Whether the plan of a hit is read too, which finds truncated and altered ones; else its manifest alone.
    """

    def __init__(self, store: EngineStore, verify: bool = False) -> None:
        self._store, self._verify = store, verify
        self._bundles: dict[str, Bundle] = {}
        self._found: dict[str, list[EngineManifest]] = {}

    def plan(self, wanted: Sequence[Wanted]) -> list[PlannedEngine]:
        """Plans all; what is wrong with one is its reason. What turns out to be the same engine is planned once."""
        found: list[PlannedEngine] = []
        for one in wanted:
            planned = self._plan_one(one)
            if all(planned.wanted != other.wanted for other in found):
                found.append(planned)
        return found

    def _plan_one(self, wanted: Wanted) -> PlannedEngine:
        try:
            if wanted.target in WARMED:
                return self._plan_warmed(wanted)
            bundle, flavour = self._open(wanted.bundle), load_builder(wanted.target)
            wanted, note = replace(wanted, sm=_resolve_sm(wanted.sm, flavour)), None
            if wanted.capacity is not None and bundle.manifest.arch.kind == "encoder":
                wanted, note = replace(wanted, capacity=None), "an encoder has no cache: capacity is not used"
            variant = _resolve_variant(bundle, wanted.precision)
            common: dict[str, Any] = {
                "variant": variant, "memory": _build_memory(bundle, variant), "alone": flavour.needs_gpu, "note": note,
            }  # fmt: skip
            if not is_current(bundle, variant):
                self._store.check_writable()
                settled = settle(bundle, flavour, wanted.sm, **wanted.asked())
                why = VARIANT_OUTDATED if has_variant(bundle, variant) else VARIANT_MISSING
                _check_extensible(bundle, variant, why)
                seconds = past_seconds(bundle, flavour, variant, settled.settings)
                return PlannedEngine(wanted, "miss", why, missing=variant, seconds=seconds, **common)
            (request,) = prepare(bundle, flavour, wanted.sm, **wanted.asked(), show_progress=False)
            manifest, reason = self._look_up(request)
            seconds = past_seconds(bundle, flavour, variant, request.settings)
            if manifest is None:
                self._store.check_writable()
        except AccelError as error:
            return PlannedEngine(wanted, "failed", str(error))
        except Exception as error:  # one engine's trouble is not the others'
            return PlannedEngine(wanted, "failed", f"{type(error).__name__}: {error}")
        size = None if manifest is None else manifest.size
        state: Literal["hit", "miss"] = "miss" if manifest is None else "hit"
        return PlannedEngine(wanted, state, reason, digest=request.key.digest, bytes=size, seconds=seconds, **common)

    def _plan_warmed(self, wanted: Wanted) -> PlannedEngine:
        """Of an engine that compiles where it runs. Whether it runs here is found where it is warmed up."""
        bundle, target = self._open(wanted.bundle), find_target(wanted.target)
        arch = bundle.manifest.arch
        wanted, note = wanted.for_any_gpu(arch.kind == "encoder")
        variant = _resolve_graph(bundle, wanted)
        _check_sizes(arch, wanted)
        bundle.refuse_lost(variant, target.name)
        common: dict[str, Any] = {
            "variant": variant, "memory": _build_memory(bundle, variant, target.name), "alone": True, "note": note,
        }  # fmt: skip
        if is_current(bundle, variant, target.name):
            return PlannedEngine(wanted, "hit", **common)
        check_target(arch, parse_scheme(variant), target, bundle.path)
        why = VARIANT_OUTDATED if has_variant(bundle, variant, target.name) else VARIANT_MISSING
        _check_extensible(bundle, variant, why, target.name)
        return PlannedEngine(wanted, "miss", why, missing=variant, **common)

    def _open(self, path: str) -> Bundle:
        if path not in self._bundles:
            self._bundles[path] = Bundle.open(path)
        return self._bundles[path]

    def _look_up(self, request: BuildRequest) -> tuple[EngineManifest | None, str | None]:
        """The stored engine's manifest, or why there is none."""
        key = request.key
        if key.identity not in self._found:
            self._found[key.identity] = self._store.find(key.identity)
        found = next((manifest for manifest in self._found[key.identity] if manifest.key == key), None)
        if found is None:
            return None, "not in the store"
        if self._verify:
            try:
                engine = self._store.get(key)
            except RefusedEngineError as error:
                return None, f"the stored one is refused: {error.what}"
            if engine is None:
                return None, "not in the store"
            engine.close()
        return found, None


def has_variant(bundle: Bundle, variant: str, target: str = TARGET) -> bool:
    """Whether the bundle has a precision's graph for a target, TensorRT unless one is named."""
    variants = bundle.manifest.variants
    return variant in variants and target in variants[variant].graphs


def _check_extensible(bundle: Bundle, variant: str, why: str, target: str = TARGET) -> None:
    """A precision is added to the bundle itself.

    Raises:
        StorageError: It cannot be written to; the remedy names the command that adds the precision elsewhere.
    """
    try:
        check_writable(bundle.path)
    except StorageError as error:
        what = f"{why}, and {variant} cannot be added to the bundle: {error.what}"
        remedy = f"Add it where the bundle can be written: {quantize_command(bundle, variant, target)}"
        raise StorageError(what, where=str(bundle.path), remedy=remedy) from error


def variant_memory(bundle: str) -> int:
    """Bytes that adding a variant is expected to take: fp32 weights, as read, lowered and compared."""
    return VARIANT_BASE + int(MEMORY_PER_WEIGHT * 4 * Bundle.open(bundle).manifest.arch.parameters)


def _resolve_sm(sm: str, flavour: Flavour) -> str:
    if sm != "auto":
        return sm
    here = current_sm()
    if here is None:
        known = ", ".join(flavour.known_sms())
        remedy = f"Name the SMs in the job, e.g. sm: [sm89]{f'; known: {known}' if known else ''}"
        raise InputError("There is no GPU here to build for", where="sm: auto", remedy=remedy)
    return here


def _resolve_variant(bundle: Bundle, precision: str) -> str:
    variant = resolve_precision(bundle, precision)
    if variant not in LIMITS and not has_variant(bundle, variant):
        remedy = suggest(variant, ["auto", *LIMITS])
        raise InputError(f"There is no precision {variant!r}", where="precision", remedy=remedy)
    return variant


def _resolve_graph(bundle: Bundle, wanted: Wanted) -> str:
    """The variant that an engine of ``WARMED`` is to run; ``auto``: as ``accel.load``, else fp16.

    Raises:
        InputError: No such precision.
    """
    engine = next(engine for engine in ENGINES if engine.name == wanted.target)
    if wanted.precision == "auto":
        return engine.pick(bundle.whole, "auto") or DEFAULT_PRECISION
    return parse_scheme(wanted.precision).name


def _check_sizes(arch: ArchSpec, wanted: Wanted) -> None:
    """As far as the model tells: whether a cache fits into a GPU's memory is found where it is warmed up.

    Raises:
        InputError: A capacity or max_batch below 1.
        CapacityError: The capacity exceeds the model's positions.
    """
    check_count("max_batch", wanted.max_batch)
    if arch.kind == "decoder":
        sizes = SessionOptions(capacity=wanted.capacity, max_batch=wanted.max_batch)
        resolve_cache(arch, sizes, available=sys.maxsize)


def _build_memory(bundle: Bundle, variant: str, target: str = TARGET) -> int:
    manifest = bundle.manifest
    if has_variant(bundle, variant, target):
        weights = sum(manifest.files[name].size for name in bundle.weights(variant, target))
    else:
        weights = manifest.arch.parameters * (4 if variant == "fp32" else 2)
    return BUILD_BASE + int(MEMORY_PER_WEIGHT * weights)


__all__ = ["VARIANT_MISSING", "PlannedEngine", "Planner", "has_variant", "variant_memory"]
