"""Engines behind one protocol, tried in order; every rejection is recorded with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from accel.engines.kv_cache import check_count, resolve_cache, with_cache
from accel.engines.session import DecoderSession, EncoderSession, Fallback, SessionOptions
from accel.errors import DependencyError, EngineError, EngineUnavailableError, InputError
from accel.machine import available_cores

if TYPE_CHECKING:
    from accel.bundle import Bundle

DEVICES = ("auto", "cpu", "cuda")
MAX_THREADS = 1024  # each is started at once; far more would take the machine down
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedSession:
    """A running session, and the engines that were passed over for it."""

    session: EncoderSession | DecoderSession
    fallbacks: tuple[Fallback, ...] = ()


@dataclass(frozen=True)
class Engine:
    """One entry of the registry.

    Attributes:
        name: What ``engine=`` takes and ``EngineInfo.name`` says.
        device: The device it runs on.
        probe: (bundle, variant name or "auto") -> why it cannot run this bundle here, or None.
        open: (bundle, variant name or "auto", options with everything settled) -> session.
    """

    name: str
    device: str
    probe: Callable[[Bundle, str], str | None]
    open: Callable[[Bundle, str, SessionOptions], EncoderSession | DecoderSession]


def pick_variant(bundle: Bundle, variant: str, target: str) -> str | None:
    """The variant to run on a target: the one asked for, or fp32 first, then the manifest's order.

    Returns:
        None when there is none with a graph for this target.

    Raises:
        BundleError: The variant asked for does not exist.
    """
    if variant != "auto":
        return variant if target in bundle.variant(variant).graphs else None
    variants = bundle.manifest.variants
    usable = [name for name in variants if target in variants[name].graphs]
    return "fp32" if "fp32" in usable else next(iter(usable), None)


def _probe_ort(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.ort.common import import_onnxruntime

    try:
        import_onnxruntime()
    except DependencyError as error:
        return str(error)
    if pick_variant(bundle, variant, "ort-cpu") is None:
        return f"the bundle has no ort-cpu graph for variant {variant!r}"
    return None


def _open_ort(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.ort.decoder import OrtDecoderSession
    from accel.engines.ort.encoder import OrtEncoderSession

    name = pick_variant(bundle, variant, "ort-cpu")
    assert name is not None, "probe comes first"
    path = bundle.file(bundle.graph(name, "ort-cpu").file)
    threads = options.threads or available_cores()
    if bundle.manifest.arch.kind == "encoder":
        return OrtEncoderSession(path, name, threads)
    return OrtDecoderSession(path, bundle.manifest, name, threads, resolve_cache(bundle.manifest.arch, options))


def _probe_torch(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.torch_reference import probe

    return probe(bundle, variant)


def _open_torch(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.torch_reference import open_reference

    return open_reference(bundle, variant, options)


ENGINES: tuple[Engine, ...] = (
    Engine("ort-cpu", "cpu", _probe_ort, _open_ort),
    Engine("torch", "cpu", _probe_torch, _open_torch),
)


def open_session(
    bundle: Bundle,
    device: str = "auto",
    engine: str = "auto",
    variant: str = "auto",
    options: SessionOptions | None = None,
    strict: bool = False,
) -> OpenedSession:
    """Opens the bundle on the first engine that can run it.

    Args:
        bundle: An opened bundle.
        device: ``auto``, ``cpu`` or ``cuda`` (which no engine of this version has).
        engine: ``auto``, or the name of the one engine to use: it is never replaced by another.
        variant: ``auto``, or the precision to use.
        options: Threads, and for decoders cache rows and capacity.
        strict: Raise instead of falling back to a later engine.

    Raises:
        EngineUnavailableError: No engine (or not the one asked for, or with ``strict`` not the first) can run it.
        InputError: An unknown engine or device, or an option out of range.
        CapacityError: The cache asked for does not fit.
        BundleError: The bundle has no such variant.
    """
    options = options or SessionOptions()
    _check_threads(options.threads)
    candidates = _candidates(device, engine)
    if variant != "auto":
        bundle.variant(variant)
    if bundle.manifest.arch.kind == "decoder":
        options = with_cache(options, resolve_cache(bundle.manifest.arch, options))
    else:
        options = replace(options, capacity=None, max_batch=None)
    passed_over: list[Fallback] = []
    for candidate in candidates:
        reason = _reject_device(candidate, device) or candidate.probe(bundle, variant)
        if reason is None:
            try:
                session = candidate.open(bundle, variant, options)
            except (EngineError, DependencyError) as error:
                reason = str(error)
            else:
                for fallback in passed_over:
                    _log.warning("%s runs because %s cannot: %s", candidate.name, fallback.engine, fallback.reason)
                return OpenedSession(session, tuple(passed_over))
        passed_over.append(Fallback(candidate.name, reason))
        if strict:
            break
    raise _unavailable(bundle, passed_over, strict and len(candidates) > 1)


def _check_threads(threads: int | None) -> None:
    if (check_count("threads", threads) or 0) > MAX_THREADS:
        what = f"threads must be at most {MAX_THREADS}, not {threads}"
        raise InputError(what, where="threads", remedy=f"This process may use {available_cores()} cores")


def _candidates(device: str, engine: str) -> tuple[Engine, ...]:
    from accel.schema import suggest

    if device not in DEVICES:
        raise InputError(f"unknown device {device!r}", where="device", remedy=suggest(str(device), list(DEVICES)))
    if engine == "auto":
        return ENGINES
    chosen = tuple(candidate for candidate in ENGINES if candidate.name == engine)
    if not chosen:
        known = ["auto", *(candidate.name for candidate in ENGINES)]
        raise InputError(f"unknown engine {engine!r}", where="engine", remedy=suggest(str(engine), known))
    return chosen


def _reject_device(engine: Engine, device: str) -> str | None:
    if device in ("auto", engine.device):
        return None
    return f"it runs on {engine.device} only; this version of accel has no engine for {device}"


def _unavailable(bundle: Bundle, passed_over: list[Fallback], strict: bool) -> EngineUnavailableError:
    reasons = "; ".join(f"{fallback.engine}: {fallback.reason}" for fallback in passed_over)
    what = "the first engine cannot run this bundle here" if strict else "no engine can run this bundle here"
    remedy = "Mend the reason, or load with strict=False" if strict else "Mend one of the reasons; accel doctor helps"
    return EngineUnavailableError(f"{what} ({reasons})", where=str(bundle.path), remedy=remedy)


__all__ = ["DEVICES", "ENGINES", "Engine", "OpenedSession", "SessionOptions", "open_session", "pick_variant"]
