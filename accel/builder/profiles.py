"""Optimization profiles: named ranges of batch and sequence, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel.builder.source import CAPACITY, GraphSource
from accel.errors import InputError, RecipeError
from accel.schema import from_dict
from accel.spec import ArchSpec, ProfileRanges, Range, TensorSpec

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # min, opt, max
_PROMPT = 128  # positions that a prompt is tuned for
_CHUNK = 256  # tokens of a decoder's run; the slot loop's own default
_LONGEST = 512  # tokens of an encoder's row
_LOGITS = 32  # rows of logits of one run over a prompt: scoring wants many


@dataclass(frozen=True)
class Profile:
    """One profile of an engine.

    Attributes:
        name: E.g. ``prefill`` or ``decode``.
        batch: Rows of a call.
        sequence: Tokens of each row in a call.
    """

    name: str
    batch: Range
    sequence: Range


def read_profiles(data: Mapping[str, Any], where: str = "profiles") -> tuple[Profile, ...]:
    """Reads what a recipe says: ``{prefill: {batch: {min, opt, max}, sequence: {min, opt, max}}, decode: ...}``.

    Raises:
        RecipeError: A missing or unknown key, or a value that is no whole number.
    """
    profiles = []
    for name, ranges in data.items():
        read = from_dict(ProfileRanges, ranges, f"{where}.{name}", error=RecipeError)
        profiles.append(Profile(str(name), read.batch, read.sequence))
    return tuple(profiles)


def recorded_profiles(recorded: Mapping[str, ProfileRanges]) -> tuple[Profile, ...]:
    """The profiles that a recipe asked for when the bundle was exported."""
    return tuple(Profile(name, ranges.batch, ranges.sequence) for name, ranges in recorded.items())


def default_profiles(arch: ArchSpec, max_batch: int, capacity: int | None = None) -> tuple[Profile, ...]:
    """What an engine is built for unless the caller knows better.

    Decoders: ``prefill``, one row of up to 256 tokens (longer prompts take several runs, and the runtime runs each
    prompt alone), and ``decode``, one token of each of up to ``max_batch`` rows. Encoders: ``encode``, up to
    ``max_batch`` rows of up to 512 tokens.

    Raises:
        InputError: ``max_batch`` or ``capacity`` is below 1.
    """
    for name, value in (("max_batch", max_batch), ("capacity", capacity)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}", where=name, remedy="Give a larger number")
    longest = arch.max_positions if capacity is None else min(capacity, arch.max_positions)
    longest = min(longest, _CHUNK if arch.kind == "decoder" else _LONGEST)
    tokens = Range(1, min(_PROMPT, longest), longest)
    if arch.kind == "encoder":
        return (Profile("encode", Range(1, max_batch, max_batch), tokens),)
    prefill = Profile("prefill", Range(1, 1, 1), tokens)
    return (prefill, Profile("decode", Range(1, max_batch, max_batch), Range(1, 1, 1)))


def input_shapes(profile: Profile, inputs: Sequence[TensorSpec]) -> dict[str, Shapes]:
    """The smallest, best and largest shape of every input.

    B is the batch, S the sequence, R (rows of logits) goes from 1 to the batch, or to 32 where rows have several
    tokens; numbers stay.

    Raises:
        InputError: A dimension has another symbol; names profile, input and dimension.
    """
    batch, tokens = profile.batch, profile.sequence
    logits = max(batch.max, min(_LOGITS, batch.max * tokens.max))
    symbols = {"B": batch, "S": tokens, "R": Range(1, batch.opt, logits)}
    shapes: dict[str, Shapes] = {}
    for spec in inputs:
        for place, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim not in symbols:
                what = f"No range is known for the dimension {dim or '(unnamed)'!r}"
                where = _where(profile, spec.name, place)
                raise InputError(what, where=where, remedy=f"Name it one of {', '.join(symbols)} or {CAPACITY}")
        ranges = [Range(dim, dim, dim) if isinstance(dim, int) else symbols[dim] for dim in spec.shape]
        least, best, most = (tuple(getattr(item, name) for item in ranges) for name in ("min", "opt", "max"))
        shapes[spec.name] = (least, best, most)
    return shapes


def check_profiles(
    profiles: Sequence[Profile],
    source: GraphSource,
    arch: ArchSpec,
    cover: Sequence[tuple[int, int]] = (),
) -> None:
    """Checks all that can be wrong with profiles.

    Args:
        profiles: Of one engine.
        source: Its graph, with the capacity.
        arch: Its model.
        cover: Calls (rows, tokens of each row) that some profile must take. Decoders: a step of one row and one
            token is among them always.

    Raises:
        InputError: min > opt > max, outside the graph's dimensions, the capacity or the model's positions, or a call
            that no profile takes; names profile, input and dimension.
    """
    check_ranges(profiles, arch, source.capacity, cover)
    for profile in profiles:
        _check_static(profile, source.inputs)
        input_shapes(profile, source.inputs)


def check_ranges(
    profiles: Sequence[Profile], arch: ArchSpec, capacity: int | None, cover: Sequence[tuple[int, int]] = ()
) -> None:
    """Checks what can be wrong with profiles and a capacity (None: no caches), whatever the graph.

    Raises:
        InputError: As ``check_profiles``.
    """
    if not profiles:
        raise InputError("An engine needs a profile", where="profiles", remedy="Leave them out to get the usual ones")
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise InputError(f"A name stands twice in {', '.join(names)}", where="profiles", remedy="Name each once")
    for profile in profiles:
        _check_ranges(profile)
        _check_limits(profile, arch, capacity)
    step = [(1, 1)] if arch.kind == "decoder" else []
    for rows, tokens in (*step, *cover):
        if not any(takes(profile, rows, tokens) for profile in profiles):
            what = f"No profile takes {rows} rows of {tokens} tokens"
            raise InputError(what, where=f"profiles {', '.join(names)}", remedy="Widen one, or add another")


def takes(profile: Profile, rows: int, tokens: int) -> bool:
    """Whether a call of ``rows`` x ``tokens`` lies inside a profile."""
    return profile.batch.min <= rows <= profile.batch.max and profile.sequence.min <= tokens <= profile.sequence.max


def _check_ranges(profile: Profile) -> None:
    for name, place in (("batch", 0), ("sequence", 1)):
        values: Range = getattr(profile, name)
        if not 1 <= values.min <= values.opt <= values.max:
            what = f"The {name} must be 1 <= min <= opt <= max, not {values.min}, {values.opt}, {values.max}"
            raise InputError(what, where=_where(profile, "input_ids", place), remedy="Put the numbers in order")


def _check_limits(profile: Profile, arch: ArchSpec, capacity: int | None) -> None:
    limits = [("the model's positions", arch.max_positions, "Lower the maximum")]
    if capacity is not None:
        limits.append(("the capacity", capacity, "Lower the maximum, or build with a larger capacity"))
        if capacity > arch.max_positions:
            what = f"The capacity {capacity} is more than the model's {arch.max_positions} positions"
            raise InputError(what, where="capacity", remedy="Give a smaller one")
    for name, limit, remedy in limits:
        if profile.sequence.max > limit:
            what = f"The sequence goes up to {profile.sequence.max}, {name} to {limit}"
            raise InputError(what, where=_where(profile, "input_ids", 1), remedy=remedy)


def _check_static(profile: Profile, inputs: Sequence[TensorSpec]) -> None:
    """Dimensions that the graph fixes: ranges must be that number alone."""
    for spec in inputs:
        if spec.name.startswith("past."):
            axes: tuple[tuple[int, str], ...] = ((0, "batch"),)
        else:
            axes = ((0, "batch"), (1, "sequence")) if len(spec.shape) == 2 else ()
        for place, name in axes:
            dim, values = spec.shape[place], getattr(profile, name)
            if isinstance(dim, int) and (values.min, values.max) != (dim, dim):
                what = f"The graph has {dim} for the {name}, the profile {values.min} to {values.max}"
                raise InputError(what, where=_where(profile, spec.name, place), remedy=f"Give {dim} alone")


def _where(profile: Profile, name: str, place: int) -> str:
    return f"profile {profile.name}, input {name}, dimension {place}"


__all__ = [
    "Profile",
    "Range",
    "check_profiles",
    "check_ranges",
    "default_profiles",
    "input_shapes",
    "read_profiles",
    "recorded_profiles",
    "takes",
]
