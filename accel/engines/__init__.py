"""Engines behind one protocol, tried in order; every rejection is recorded with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from accel.engines.kv_cache import cache_item_bytes, check_count, integer_cache_bits, resolve_cache
from accel.engines.session import DecoderSession, EncoderSession, Fallback, SessionOptions
from accel.errors import (
    AccelError,
    CapacityError,
    DependencyError,
    EngineBrokenError,
    EngineError,
    EngineUnavailableError,
    InputError,
    UncoveredError,
)
from accel.machine import available_cores, has_nvidia_device, hidden_gpu

if TYPE_CHECKING:
    from accel.bundle import Bundle

DEVICES = ("auto", "cpu", "cuda")
MAX_THREADS = 1024  # each is started at once; far more would take the machine down
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """One entry of the registry.

    Attributes:
        name: What ``engine=`` takes and ``EngineInfo.name`` says.
        device: The device it runs on.
        probe: (bundle, variant name or "auto") -> why it cannot run this bundle here, or None.
        open: (bundle, variant name or "auto", checked options) -> session; what is None is the engine's choice.
        installed: Whether its package is there at all.
        integer_caches: Whether it runs variants whose KV cache holds integers.
    """

    name: str
    device: str
    probe: Callable[[Bundle, str], str | None]
    open: Callable[[Bundle, str, SessionOptions], EncoderSession | DecoderSession]
    installed: Callable[[], bool] = lambda: True
    integer_caches: bool = False


@dataclass(frozen=True)
class Request:
    """What was asked of ``open_session``, checked and settled.

    Attributes:
        bundle, device, variant, options, strict: Its arguments.
        engines: The engines that were not tried yet, in order.
        named: Whether the caller chose the engine.
    """

    bundle: Bundle
    device: str
    variant: str
    options: SessionOptions
    strict: bool
    engines: tuple[Engine, ...]
    named: bool


@dataclass(frozen=True)
class OpenedSession:
    """A running session, the engines that were passed over for it, and what opens the next one."""

    session: EncoderSession | DecoderSession
    fallbacks: tuple[Fallback, ...] = ()
    request: Request | None = None

    def open_next(self, error: EngineBrokenError) -> OpenedSession:
        """Opens the next engine that can run the bundle, after this one broke; close its session first.

        A decoder's next session is asked for as many rows and positions as this one holds, or, where
        they do not fit, for as many positions as do. Whatever an engine raises is a reason to try the one after it.

        Args:
            error: How this engine broke; it becomes its reason in ``fallbacks``.

        Raises:
            EngineBrokenError: ``error`` itself, when the caller wanted this engine alone (``strict``, or by name).
            EngineUnavailableError: No engine is left; lists all reasons.
        """
        request = self.request
        if request is None or request.strict or request.named:
            raise error
        options = request.options
        if request.bundle.manifest.arch.kind == "decoder":
            session = cast(DecoderSession, self.session)
            options = replace(options, capacity=session.capacity, max_batch=session.max_batch)
        return self._open_after(error, replace(request, options=options))

    def open_beside(self, error: UncoveredError) -> OpenedSession:
        """Opens the next engine that can run the bundle, for runs that this one was not built for; this one stays open.

        Args:
            error: What it was not built for; it becomes the reason in ``fallbacks``.

        Raises:
            UncoveredError: ``error`` itself, when the caller wanted this engine alone (``strict``, or by name).
            EngineUnavailableError: No engine is left; lists all reasons.
        """
        request = self.request
        if request is None or request.strict or request.named:
            raise error
        return self._open_after(error, request)

    def _open_after(self, error: EngineError, request: Request) -> OpenedSession:
        reason = Fallback(self.session.info.name, str(error))
        try:
            return _open_first(request, (*self.fallbacks, reason), replacing=True)
        except EngineUnavailableError as unavailable:
            raise unavailable from error


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
    from accel.engines.ort.common import import_onnxruntime, missing_operators

    try:
        import_onnxruntime()
    except DependencyError as error:
        return str(error)
    name = pick_variant(bundle, variant, "ort-cpu")
    if name is None:
        return f"the bundle has no ort-cpu graph for variant {variant!r}"
    return missing_operators(name)


def _open_ort(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.ort.decoder import OrtDecoderSession
    from accel.engines.ort.encoder import OrtEncoderSession

    name = pick_variant(bundle, variant, "ort-cpu")
    assert name is not None, "probe comes first"
    path = bundle.file(bundle.graph(name, "ort-cpu").file)
    threads = options.threads or available_cores()
    if bundle.manifest.arch.kind == "encoder":
        return OrtEncoderSession(path, name, threads)
    shape = resolve_cache(bundle.manifest.arch, options, _item_bytes(bundle, name))
    return OrtDecoderSession(path, bundle.manifest, name, threads, shape)


def _item_bytes(bundle: Bundle, variant: str) -> float:
    """Of one number in the caches of ONNX Runtime's graph for the CPU; without such a graph: float32's."""
    name = pick_variant(bundle, variant, "ort-cpu")
    return 4 if name is None else cache_item_bytes(bundle.manifest.arch, bundle.graph(name, "ort-cpu"))


def _probe_torch(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.torch_reference import probe

    return probe(bundle, variant)


def _open_torch(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.torch_reference import open_reference

    return open_reference(bundle, variant, options)


def _tensorrt(target: Literal["tensorrt", "rtx"]) -> Engine:
    def probe(bundle: Bundle, variant: str) -> str | None:
        from accel.engines.tensorrt.registry import probe_for

        return probe_for(target)(bundle, variant)

    def open_engine(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
        from accel.engines.tensorrt.registry import open_for

        return open_for(target)(bundle, variant, options)

    def installed() -> bool:
        from accel.engines.tensorrt.packages import is_installed

        return is_installed(target)

    return Engine(target, "cuda", probe, open_engine, installed)


def _probe_cuda(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.cuda.registry import probe

    return probe(bundle, variant)


def _open_cuda(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.cuda.registry import open_cuda

    return open_cuda(bundle, variant, options)


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _probe_ort_cuda(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.ort_cuda.registry import probe

    return probe(bundle, variant)


def _open_ort_cuda(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.ort_cuda.registry import open_engine

    return open_engine(bundle, variant, options)


def _has_ort_cuda() -> bool:
    from accel.engines.ort_cuda.package import is_installed

    return is_installed()


ENGINES: tuple[Engine, ...] = (
    _tensorrt("tensorrt"),
    _tensorrt("rtx"),
    Engine("cuda", "cuda", _probe_cuda, _open_cuda, _has_triton),
    Engine("ort-cuda", "cuda", _probe_ort_cuda, _open_ort_cuda, _has_ort_cuda),
    Engine("ort-cpu", "cpu", _probe_ort, _open_ort, integer_caches=True),
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
        device: ``auto`` (CUDA engines are tried where a GPU can be seen; one that is hidden from this process is an
            entry of the fallbacks), ``cpu`` or ``cuda``.
        engine: ``auto``, or the name of the one engine to use: it is never replaced by another.
        variant: ``auto``, or the precision to use.
        options: Threads, and for decoders cache rows and capacity.
        strict: Raise instead of falling back to a later engine. With ``auto``, a flavour of TensorRT that is not
            installed is passed over all the same if the other one is.

    Raises:
        EngineUnavailableError: No engine (or not the one asked for, or with ``strict`` not the first) can run it.
        InputError: An unknown engine or device, or an option out of range.
        CapacityError: The cache asked for does not fit.
        BundleError: The bundle has no such variant.
    """
    options = options or SessionOptions()
    _check_threads(options.threads)
    hidden = hidden_gpu() if device == engine == "auto" else None
    candidates = _candidates(device, engine, has_nvidia_device() and hidden is None)
    if variant != "auto":
        bundle.variant(variant)
    if bundle.manifest.arch.kind == "encoder":
        options = replace(options, capacity=None, max_batch=None)
    elif candidates and candidates[0].device == "cpu":
        item = _item_bytes(bundle, variant) if candidates[0].integer_caches else 4
        resolve_cache(bundle.manifest.arch, options, item)  # raises before anything is probed
    else:
        check_count("capacity", options.capacity)
        check_count("max_batch", options.max_batch)
    known = () if hidden is None else (Fallback("cuda", hidden),)
    return _open_first(Request(bundle, device, variant, options, strict, candidates, engine != "auto"), known)


def _open_first(request: Request, known: tuple[Fallback, ...] = (), replacing: bool = False) -> OpenedSession:
    """Opens the first of the request's engines that can run it.

    Args:
        request: What to open.
        known: The engines that were passed over before.
        replacing: Whether an engine broke, or cannot take a run: sequences are under way, so whatever goes wrong is a
            reason to try on.
    """
    tolerated = (Exception,) if replacing else (EngineError, DependencyError)
    passed_over = list(known)
    logged = len(known) - 1 if replacing else 0  # the last one is news
    for index, candidate in enumerate(request.engines):
        try:
            reason = _reject_device(candidate, request.device) or _reject_cache(candidate, request)
            reason = reason or candidate.probe(request.bundle, request.variant)
            if reason is None:
                session = _open(candidate, request, replacing)
        except tolerated as error:
            reason = str(error) if isinstance(error, AccelError) else f"{type(error).__name__}: {error}"
        if reason is None:
            for fallback in passed_over[logged:]:
                _log.warning("%s runs because %s cannot: %s", candidate.name, fallback.engine, fallback.reason)
            return OpenedSession(session, tuple(passed_over), replace(request, engines=request.engines[index + 1 :]))
        passed_over.append(Fallback(candidate.name, reason))
        if request.strict and not _has_twin(candidate, request):
            break
    raise _unavailable(request, passed_over)


def _has_twin(engine: Engine, request: Request) -> bool:
    """Whether the engine is not installed, but another one for the same device is, whose turn comes."""
    if request.named or engine.installed():
        return False
    return any(other.device == engine.device and other.installed() for other in request.engines)


def _open(engine: Engine, request: Request, replacing: bool) -> EncoderSession | DecoderSession:
    try:
        return engine.open(request.bundle, request.variant, request.options)
    except CapacityError:
        if not replacing:
            raise
        return engine.open(request.bundle, request.variant, replace(request.options, capacity=None))


def _check_threads(threads: int | None) -> None:
    if (check_count("threads", threads) or 0) > MAX_THREADS:
        what = f"threads must be at most {MAX_THREADS}, not {threads}"
        raise InputError(what, where="threads", remedy=f"This process may use {available_cores()} cores")


def _candidates(device: str, engine: str, sees_gpu: bool) -> tuple[Engine, ...]:
    from accel.schema import suggest

    if device not in DEVICES:
        raise InputError(f"unknown device {device!r}", where="device", remedy=suggest(str(device), list(DEVICES)))
    if engine == "auto":
        gpu = device == "cuda" or (device == "auto" and sees_gpu)
        return tuple(candidate for candidate in ENGINES if gpu or candidate.device != "cuda")
    chosen = tuple(candidate for candidate in ENGINES if candidate.name == engine)
    if not chosen:
        known = ["auto", *(candidate.name for candidate in ENGINES)]
        raise InputError(f"unknown engine {engine!r}", where="engine", remedy=suggest(str(engine), known))
    return chosen


def _reject_device(engine: Engine, device: str) -> str | None:
    if device in ("auto", engine.device):
        return None
    return f"it runs on {engine.device} only, not on {device}"


def _reject_cache(engine: Engine, request: Request) -> str | None:
    if engine.integer_caches or request.variant == "auto":
        return None
    bits = integer_cache_bits(request.bundle, request.variant)
    able = ", ".join(other.name for other in ENGINES if other.integer_caches)
    return None if bits is None else f"it has no int{bits} KV cache; {request.variant!r} runs on {able}"


def _unavailable(request: Request, passed_over: list[Fallback]) -> EngineUnavailableError:
    reasons = "; ".join(f"{fallback.engine}: {fallback.reason}" for fallback in passed_over)
    first = request.strict and not request.named
    what = "the first engine cannot run this bundle here" if first else "no engine can run this bundle here"
    remedy = "Mend the reason, or load with strict=False" if first else "Mend one of the reasons; accel doctor helps"
    return EngineUnavailableError(f"{what} ({reasons})", where=str(request.bundle.path), remedy=remedy)


__all__ = ["DEVICES", "ENGINES", "Engine", "OpenedSession", "SessionOptions", "open_session", "pick_variant"]
