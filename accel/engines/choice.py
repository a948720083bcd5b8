"""The order in which engines are tried: the documented one, unless it was measured here which are faster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from accel.engines.registry import Engine
from accel.engines.session import Fallback, SessionOptions
from accel.machine import available_cores
from accel.measurements import Device, Measured, Measurements, current, recall, recall_other_threads

if TYPE_CHECKING:
    from accel.bundle import Bundle

_log = logging.getLogger(__name__)
FASTEST = "fastest"  # as a variant: the fastest one that was measured, lossy or not
MARGIN = 0.02  # an engine must be so much faster than one before it in the order: less is noise


@dataclass(frozen=True)
class Candidate:
    """An engine that may run, and what is to be said when it does.

    Attributes:
        engine: The engine.
        variant: What it is asked for: a variant's name or ``auto``.
        why: What was measured; empty: it has its place by the documented order.
        slower: Engines that come before it in the documented order, and what was measured of them.
        lost: What was measured to be faster on its device, but lost files since.
    """

    engine: Engine
    variant: str
    why: str = ""
    slower: tuple[Fallback, ...] = ()
    lost: tuple[Fallback, ...] = ()


def order_engines(
    bundle: Bundle, engines: Sequence[Engine], variant: str, options: SessionOptions, named: bool = False
) -> tuple[Candidate, ...]:
    """The engines in the order in which they are to be tried.

    Engines on a GPU stay before those on the CPU. Among the engines of one device those that were measured come
    first, the fastest before the others; the rest keeps the documented order.

    Args:
        bundle: The bundle.
        engines: In the documented order.
        variant: ``auto``: each engine runs the variant that it would run unmeasured; measuring changes the engine,
            never the precision. ``fastest``: each engine runs its fastest measured variant, lossy or not. Else the one
            to run.
        options: Threads and store, as the session will have them.
        named: Whether the caller chose the engine; then only ``fastest`` has anything to choose.
    """
    asked = "auto" if variant == FASTEST else variant
    documented = [Candidate(engine, asked) for engine in engines]
    if named and variant != FASTEST:
        return tuple(documented)
    found: list[Candidate] = []
    for device in dict.fromkeys(engine.device for engine in engines):
        group = [candidate for candidate in documented if candidate.engine.device == device]
        targets = {candidate.engine.name: candidate.engine.target for candidate in group if candidate.engine.target}
        recalled = recall(bundle, cast(Device, device), options.threads, options.store) if targets else None
        known = None if recalled is None else current(recalled, bundle, targets)
        lost = () if recalled is None else _lost(bundle, group, recalled, known, variant)
        ordered = group if known is None else _by_time(bundle, group, known, variant)
        found += [replace(candidate, lost=lost) for candidate in ordered]
    if variant == FASTEST and not any(candidate.why for candidate in found):
        said = Fallback(FASTEST, _unmeasured(bundle, documented, options))
        _log.warning("variant='fastest' runs what 'auto' would: %s", said.reason)
        found = [replace(candidate, slower=(*candidate.slower, said)) for candidate in found]
    return tuple(found)


def lost_choice(engine: Engine, bundle: Bundle, variant: str) -> str | None:
    """The variant that an engine would run, did its graph not lack files; None: it runs what it would anyway."""
    if not bundle.lost or not engine.target:
        return None
    wanted = engine.pick(bundle.whole, variant)
    return None if wanted == engine.pick(bundle, variant) else wanted


def _lost(
    bundle: Bundle, group: Sequence[Candidate], recalled: Measurements, known: Measurements | None, variant: str
) -> tuple[Fallback, ...]:
    """What was measured to be faster than all that is left, and lost files since."""
    if not bundle.lost:
        return ()
    engines = {candidate.engine.name: candidate.engine for candidate in group if candidate.engine.target}
    whole = current(recalled, bundle.whole, {name: engine.target for name, engine in engines.items()})
    rows = _eligible(bundle.whole, group, whole, variant) if whole is not None else []
    best = min(map(_cost, _eligible(bundle, group, known, variant) if known is not None else []), default=None)
    found = []
    for row in rows:
        reason = bundle.lost_reason(row.variant, engines[row.engine].target)
        if reason is not None and (best is None or row.cost < best):
            found.append(Fallback(f"{row.engine} {row.variant}", f"measured: {_shown(row.cost)}, but {reason}"))
            _log.warning("%s, which was measured to be the fastest, cannot run: %s", found[-1].engine, reason)
    return tuple(found)


def _unmeasured(bundle: Bundle, candidates: Sequence[Candidate], options: SessionOptions) -> str:
    """That nothing was measured with so many threads, with how many something was, and what measures it."""
    command = f"accel bench {bundle.path}" + ("" if options.threads is None else f" --threads {options.threads}")
    counts: dict[str, None] = {}
    for device in dict.fromkeys(candidate.engine.device for candidate in candidates):
        group = [c.engine for c in candidates if c.engine.device == device and c.engine.target]
        targets = {engine.name: engine.target for engine in group}
        for found in recall_other_threads(bundle, cast(Device, device), options.store):
            if current(found, bundle, targets) is not None:
                counts[found.machine["threads"]] = None
    if not counts:
        return f"nothing was measured of this bundle here: {command} does it"
    threads = options.threads or available_cores()
    measured = f"this bundle was measured with {_join(list(counts))} here, not with {threads}"
    return f"{measured}: {command} does it"


def _join(counts: Sequence[str]) -> str:
    return f"{' and '.join(counts)} thread{'' if counts == ['1'] else 's'}"


def _by_time(bundle: Bundle, group: list[Candidate], known: Measurements, variant: str) -> list[Candidate]:
    """The candidates of one device, those that were measured first."""
    names = [candidate.engine.name for candidate in group]
    eligible = _eligible(bundle, group, known, variant)
    best = {name: min((row for row in eligible if row.engine == name), key=_cost, default=None) for name in names}
    rows = fastest_first([row for row in best.values() if row is not None])
    found = []
    for row in rows:
        candidate = next(c for c in group if c.engine.name == row.engine)
        before = names[: names.index(row.engine)]
        slower = tuple(Fallback(name, _passed(name, row, rows, known)) for name in before)
        asked = row.variant if variant == FASTEST else candidate.variant
        found.append(Candidate(candidate.engine, asked, _why(row, eligible), slower))
    measured = {row.engine for row in rows}
    return found + [candidate for candidate in group if candidate.engine.name not in measured]


def _eligible(bundle: Bundle, group: Sequence[Candidate], known: Measurements, variant: str) -> list[Measured]:
    """The rows that a choice is made among: of each engine that of the variant it would run, or of all."""
    found: list[Measured] = []
    for engine in (candidate.engine for candidate in group):
        wanted = engine.pick(bundle, variant) if engine.target and variant != FASTEST else None
        own = [row for row in known.rows if row.engine == engine.name]
        found += own if variant == FASTEST else [row for row in own if row.variant == wanted]
    return found


def fastest_first(rows: Sequence[Measured]) -> list[Measured]:
    """The rows by their cost; one that comes earlier stays before a later one that is hardly faster."""
    rest, found = list(rows), []
    while rest:
        best = rest[0]
        for row in rest[1:]:
            if row.cost < best.cost * (1 - MARGIN):
                best = row
        rest.remove(best)
        found.append(best)
    return found


def _cost(row: Measured) -> float:
    return row.cost


def _why(row: Measured, eligible: Sequence[Measured]) -> str:
    others = [other for other in eligible if other is not row]
    if not others:
        return f"measured: {_shown(row.cost)}; no other engine was"
    other = min(others, key=_cost)
    name = other.engine if other.variant == row.variant else f"{other.engine} in {other.variant}"
    return f"measured: {_shown(row.cost)} against {_shown(other.cost)} of {name}"


def _passed(name: str, chosen: Measured, rows: Sequence[Measured], known: Measurements) -> str:
    """Why an engine that comes first by the documented order does not run."""
    own = next((row for row in rows if row.engine == name), None)
    against = f"{_shown(chosen.cost)} of {chosen.engine}"
    if own is not None:
        return f"measured: {_shown(own.cost)} against {against}"
    if name in known.passed_over:
        return f"not measured: {known.passed_over[name]}"
    return f"not measured, and {chosen.engine} was: accel bench measures again"


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


__all__ = ["FASTEST", "Candidate", "fastest_first", "lost_choice", "order_engines"]
