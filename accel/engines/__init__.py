"""Engines behind one protocol, tried in order; every rejection is recorded with its reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from accel.engines.choice import FASTEST, Candidate, lost_choice, order_engines
from accel.engines.kv_cache import check_count, resolve_cache, rounded_cache
from accel.engines.registry import ENGINES, Engine, cache_item_bytes_of, pick_variant
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
from accel.machine import available_cores, has_nvidia_device, hidden_gpu, missing_gpu

if TYPE_CHECKING:
    from accel.bundle import Bundle

DEVICES = ("auto", "cpu", "cuda")
MAX_THREADS = 1024  # each is started at once; far more would take the machine down
_WITH_GPU = "Run it where this process sees an NVIDIA GPU"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What was asked of ``open_session``, checked and settled.

    Attributes:
        bundle, device, options, strict: Its arguments.
        candidates: The engines that were not tried yet, in order, each with the variant that it is to run.
        named: Whether the caller chose the engine.
        variant: What was asked for.
        left_out: Engines that are not candidates for want of a GPU, where the bundle has graphs for them.
    """

    bundle: Bundle
    device: str
    options: SessionOptions
    strict: bool
    candidates: tuple[Candidate, ...]
    named: bool
    variant: str
    left_out: tuple[Fallback, ...] = ()


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
            entry of the fallbacks, and without one those are that the bundle has graphs for), ``cpu`` or ``cuda``.
        engine: ``auto``: the fastest that ``accel bench`` or a warm-up measured for this bundle here, else the first of
            the documented order; or the name of the one engine to use: it is never replaced by another.
        variant: ``auto``: what each engine runs unasked; ``fastest``: the fastest that was measured, which may be a
            lossy one; or the precision to use.
        options: Threads, and for decoders cache rows and capacity.
        strict: Raise instead of falling back to a later engine, or to what was measured to be slower than what lost
            files. With ``auto``, a flavour of TensorRT that is not installed is passed over all the same if the other
            one is.

    Raises:
        EngineUnavailableError: No engine (or not the one asked for, or with ``strict`` not the first) can run it;
            lists the reasons, or says that ``cuda`` was asked for and there is no GPU.
        InputError: An unknown engine or device, or an option out of range.
        CapacityError: The cache asked for does not fit.
        BundleError: The bundle has no such variant.
    """
    options = options or SessionOptions()
    _check_threads(options.threads)
    hidden = hidden_gpu() if device == engine == "auto" else None
    sees_gpu = has_nvidia_device()
    engines = _engines(device, engine, sees_gpu and hidden is None)
    if variant not in ("auto", FASTEST):
        bundle.variant(variant)
    candidates = order_engines(bundle, engines, variant, options, named=engine != "auto")
    if bundle.manifest.arch.kind == "encoder":
        options = replace(options, capacity=None, max_batch=None)
    elif candidates and candidates[0].engine.device == "cpu":
        first = candidates[0]
        item = cache_item_bytes_of(bundle, first.variant) if first.engine.rounded_caches else 4
        resolve_cache(bundle.manifest.arch, options, item)  # raises before anything is probed
    else:
        check_count("capacity", options.capacity)
        check_count("max_batch", options.max_batch)
    known = () if hidden is None else (Fallback("cuda", hidden),)
    left_out = _left_out(bundle, variant) if device == engine == "auto" and not sees_gpu and hidden is None else ()
    request = Request(bundle, device, options, strict, candidates, engine != "auto", variant, left_out)
    opened = _open_first(request, known)
    return replace(opened, fallbacks=(*left_out, *opened.fallbacks))


def _left_out(bundle: Bundle, variant: str) -> tuple[Fallback, ...]:
    """The GPU's engines that the bundle has graphs for, of a variant by name its own, where there is no GPU.

    That is no surprise: nothing is logged.
    """
    every = variant in ("auto", FASTEST)
    variants = bundle.manifest.variants.values() if every else [bundle.variant(variant)]
    targets = {target for known in variants for target in known.graphs}
    reason = "the bundle has graphs for it, and there is no NVIDIA GPU here"
    able = (engine for engine in ENGINES if engine.device == "cuda" and engine.target in targets)
    return tuple(Fallback(engine.name, reason) for engine in able)


def _open_first(request: Request, known: tuple[Fallback, ...] = (), replacing: bool = False) -> OpenedSession:
    """Opens the first of the request's engines that can run it.

    Args:
        request: What to open.
        known: The engines that were passed over before.
        replacing: Whether an engine broke, or cannot take a run: sequences are under way, so whatever goes wrong is a
            reason to try on.
    """
    tolerated = (Exception,) if replacing else (EngineError, DependencyError)
    old, news = (known[:-1], list(known[-1:])) if replacing else ((), list(known))
    for index, candidate in enumerate(request.candidates):
        engine = candidate.engine
        try:
            lost = _lost(candidate, request.bundle)
            reason = _reject(candidate, request, lost)
            if reason is None:
                session = _open(candidate, request, replacing)
        except tolerated as error:
            reason = str(error) if isinstance(error, AccelError) else f"{type(error).__name__}: {error}"
        if reason is None:
            for fallback in news:
                _log.warning("%s runs because %s cannot: %s", engine.name, fallback.engine, fallback.reason)
            if candidate.why:
                _log.info("%s runs, %s", engine.name, candidate.why)
                session.info = replace(session.info, why=candidate.why)
            rest = replace(request, candidates=request.candidates[index + 1 :])
            if lost is not None:
                news.append(lost)
                _log.warning("%s runs because %s cannot: %s", session.info.variant, lost.engine, lost.reason)
            passed = (*candidate.slower, *candidate.lost, *old, *news)
            others = [found for found in passed if found.engine != engine.name]
            return OpenedSession(session, _latest(others), rest)
        news.append(Fallback(engine.name, reason))
        if request.strict and not _has_twin(engine, request):
            break
    if not request.named and not replacing:  # one that broke had found a GPU
        refuse_without_gpu(request.bundle, request.device, request.variant)
    absent = () if request.strict or replacing else request.left_out
    raise _unavailable(request, _latest([*absent, *old, *news]))


def _latest(passed_over: list[Fallback]) -> tuple[Fallback, ...]:
    """One reason per engine: one that was measured to be slower may have failed since."""
    reasons = {fallback.engine: fallback for fallback in passed_over}
    return tuple(fallback for fallback in passed_over if reasons[fallback.engine] is fallback)


def _has_twin(engine: Engine, request: Request) -> bool:
    """Whether the engine is not installed, but another one for the same device is, whose turn comes."""
    if request.named or engine.installed():
        return False
    return any(
        other.engine.device == engine.device and other.engine.installed() for other in request.candidates
    )


def _open(candidate: Candidate, request: Request, replacing: bool) -> EncoderSession | DecoderSession:
    open_session = candidate.engine.open
    try:
        return open_session(request.bundle, candidate.variant, request.options)
    except CapacityError:
        if not replacing:
            raise
        return open_session(request.bundle, candidate.variant, replace(request.options, capacity=None))


def _check_threads(threads: int | None) -> None:
    if (check_count("threads", threads) or 0) > MAX_THREADS:
        what = f"threads must be at most {MAX_THREADS}, not {threads}"
        raise InputError(what, where="threads", remedy=f"This process may use {available_cores()} cores")


def check_device(device: object) -> None:
    """Refuses what is no device.

    Raises:
        InputError: It is none; says the nearest.
    """
    from accel.schema import suggest

    if device not in DEVICES:
        meant = "cuda" if str(device).lower().startswith("gpu") else str(device)  # by its letters it is nearer to cpu
        raise InputError(f"unknown device {device!r}", where="device", remedy=suggest(meant, list(DEVICES)))


def _engines(device: str, engine: str, sees_gpu: bool) -> tuple[Engine, ...]:
    from accel.schema import suggest

    check_device(device)
    if engine == "auto":
        gpu = device == "cuda" or (device == "auto" and sees_gpu)
        return tuple(known for known in ENGINES if gpu or known.device != "cuda")
    chosen = tuple(known for known in ENGINES if known.name == engine)
    if not chosen:
        names = ["auto", *(known.name for known in ENGINES)]
        raise InputError(f"unknown engine {engine!r}", where="engine", remedy=suggest(str(engine), names))
    return chosen


def _reject(candidate: Candidate, request: Request, lost: Fallback | None) -> str | None:
    """Why an engine cannot run the bundle, or may not run what is left of it; None: it can."""
    engine, bundle, variant = candidate.engine, request.bundle, candidate.variant
    reason = _reject_device(engine, request.device) or _reject_cache(candidate, bundle)
    if reason is None and request.strict and candidate.lost:
        return "; ".join(f"{faster.engine}: {faster.reason}" for faster in candidate.lost)
    if reason is not None or lost is None:
        return reason or engine.probe(bundle, variant)
    if request.strict or engine.pick(bundle, variant) is None:  # what else it lacks comes first
        reasons = engine.probe(bundle.whole, variant), f"{lost_choice(engine, bundle, variant)}: {lost.reason}"
        return "; ".join(reason for reason in reasons if reason is not None)
    return engine.probe(bundle, variant)


def _reject_device(engine: Engine, device: str) -> str | None:
    if device in ("auto", engine.device):
        return None
    return f"it runs on {engine.device} only, not on {device}"


def _lost(candidate: Candidate, bundle: Bundle) -> Fallback | None:
    """The variant that the engine would run, if files of it are lost."""
    wanted = lost_choice(candidate.engine, bundle, candidate.variant)
    reason = None if wanted is None else bundle.lost_reason(wanted, candidate.engine.target)
    return None if reason is None else Fallback(f"{candidate.engine.name} {wanted}", reason)


def _reject_cache(candidate: Candidate, bundle: Bundle) -> str | None:
    if candidate.variant == "auto":
        return None
    kind = rounded_cache(bundle, candidate.variant)
    if kind is None or kind in candidate.engine.rounded_caches:
        return None
    graphs = bundle.variant(candidate.variant).graphs
    able = ", ".join(other.name for other in ENGINES if kind in other.rounded_caches and other.target in graphs)
    return f"it has no {kind} KV cache; {candidate.variant!r} runs on {able}"


def _runs_on_cpu(bundle: Bundle, variant: str) -> bool:
    """Whether an engine on the CPU runs the variant, were its package installed; what is not named one can choose."""
    if variant in ("auto", FASTEST):
        return True
    able = (engine for engine in ENGINES if engine.device == "cpu")
    return any(engine.pick(bundle, variant) or not (engine.target or engine.probe(bundle, variant)) for engine in able)


def refuse_without_gpu(bundle: Bundle, device: str, variant: str = "auto") -> None:
    """For a caller whom no engine on a device serves: without a GPU, no package that an engine lacks would help.

    Raises:
        EngineUnavailableError: The device is ``cuda``, and there is no GPU, or it is hidden from this process.
    """
    what = hidden_gpu() if device == "cuda" else None
    if device != "cuda" or (what is None and has_nvidia_device()):
        return
    what = what or "There is no NVIDIA GPU here, and device 'cuda' needs one"
    remedy = 'Leave the device out, or take device="cpu" (--device cpu): engines on the CPU run this bundle'
    if not _runs_on_cpu(bundle, variant):
        left = "leave the variant and the device out (--variant, --device; variant=, device=)"
        remedy = f"{_WITH_GPU}: no engine on the CPU runs {variant!r}; or {left}: then what runs here is taken"
    raise EngineUnavailableError(what, where=str(bundle.path), remedy=remedy)


def _unavailable(request: Request, passed_over: tuple[Fallback, ...]) -> EngineUnavailableError:
    reasons = "; ".join(f"{fallback.engine}: {fallback.reason}" for fallback in passed_over)
    first = request.strict and not request.named
    what = "the first engine cannot run this bundle here" if first else "no engine can run this bundle here"
    remedy = "Mend the reason, or load with strict=False" if first else "Mend one of the reasons; accel doctor helps"
    lacking = missing_gpu() if request.named else None
    if lacking is not None and passed_over[-1].reason.startswith(lacking):
        on_cpu = _runs_on_cpu(request.bundle, request.variant)
        too = "" if on_cpu else ", and the variant, which no engine on the CPU runs"
        too += ", and the device" if request.device == "cuda" else ""  # which alone is refused as well
        remedy = f"{_WITH_GPU}, or leave the engine out (--engine, engine=){too}: then what runs here is taken"
    return EngineUnavailableError(f"{what} ({reasons})", where=str(request.bundle.path), remedy=remedy)


__all__ = [
    "DEVICES",
    "ENGINES",
    "FASTEST",
    "Engine",
    "OpenedSession",
    "SessionOptions",
    "check_device",
    "open_session",
    "pick_variant",
    "refuse_without_gpu",
]
