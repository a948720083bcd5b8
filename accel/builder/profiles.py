"""Optimisation profiles: named ranges of batch and sequence, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accel.errors import InputError
from accel.schema import from_dict
from accel.spec import ArchSpec, TensorSpec

Span = tuple[int, int, int]  # min, opt, max
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input -> min, opt, max shape
PREFILL, DECODE, ENCODE = "prefill", "decode", "encode"
DEFAULT_CHUNK = 256  # tokens of one prefill run; longer prompts take several
DEFAULT_LOGITS = 32  # rows of logits of one prefill run: scoring wants many


@dataclass(frozen=True)
class Profile:
    """Ranges that an engine is built for.

    Attributes:
        batch: Rows: least, the one to be fastest at, most.
        sequence: Tokens per row, likewise.
    """

    batch: Span
    sequence: Span

    def covers(self, batch: int, sequence: int) -> bool:
        """Whether a run of this size can use the profile."""
        return self.batch[0] <= batch <= self.batch[2] and self.sequence[0] <= sequence <= self.sequence[2]

    def __str__(self) -> str:
        batch, sequence = ("-".join(map(str, sorted({span[0], span[2]}))) for span in (self.batch, self.sequence))
        return f"batch {batch}, sequence {sequence}"


Profiles = dict[str, Profile]


def read_profiles(data: Mapping[str, Any], where: str = "profiles") -> Profiles:
    """Profiles from a mapping ``name: {batch: [min, opt, max], sequence: [min, opt, max]}``.

    Raises:
        InputError: Another form.
    """
    read: Profiles = {}
    for name, value in data.items():
        if isinstance(value, Profile):
            read[name] = value
        else:
            read[str(name)] = from_dict(Profile, value, f"{where}.{name}", error=InputError)
    return read


def default_profiles(arch: ArchSpec, capacity: int | None, max_batch: int) -> Profiles:
    """What a model is built for when nothing is said.

    Decoders: one prompt chunk of up to 256 tokens at a time, and one token of each of up to ``max_batch`` rows.
    Encoders: up to ``max_batch`` rows of up to 512 tokens.
    """
    if arch.kind == "encoder":
        longest = min(arch.max_positions, 512)
        return {ENCODE: Profile((1, max(1, max_batch // 4), max_batch), (1, min(128, longest), longest))}
    assert capacity is not None
    chunk = min(DEFAULT_CHUNK, capacity)
    return {
        PREFILL: Profile((1, 1, 1), (1, max(1, chunk // 2), chunk)),
        DECODE: Profile((1, max(1, max_batch // 2), max_batch), (1, 1, 1)),
    }


def check_profiles(profiles: Profiles, arch: ArchSpec, capacity: int | None, max_batch: int) -> None:
    """Checks profiles before building.

    Raises:
        InputError: None at all; min > opt > max; less than one; beyond the capacity or the model's positions; or
            ranges that leave out what a runtime must be able to ask. Names profile and range.
    """
    if not profiles:
        raise InputError("There is no profile", where="profiles", remedy="Give at least one, or leave them out")
    limit = min(arch.max_positions, capacity or arch.max_positions)
    for name, profile in profiles.items():
        for part, span in (("batch", profile.batch), ("sequence", profile.sequence)):
            where = f"profiles.{name}.{part}"
            if not 1 <= span[0] <= span[1] <= span[2]:
                what = f"the range {list(span)} is not 1 <= min <= opt <= max"
                raise InputError(what, where=where, remedy="Write [min, opt, max]")
            most, of = (limit, "the capacity or the model's positions") if part == "sequence" else (max_batch, "rows")
            if span[2] > most:
                what = f"the range {list(span)} goes beyond {most} ({of})"
                raise InputError(what, where=where, remedy=f"Stay within {most}, or build for more")
    _check_coverage(profiles, arch, max_batch)


def _check_coverage(profiles: Profiles, arch: ArchSpec, max_batch: int) -> None:
    wanted = [(1, 1, "one row of one token")]
    if arch.kind == "decoder":
        wanted.append((max_batch, 1, f"one token of each of {max_batch} rows"))
        wanted.append((1, 2, "a prompt"))
    for batch, sequence, what in wanted:
        if not any(profile.covers(batch, sequence) for profile in profiles.values()):
            have = "; ".join(f"{name}: {profile}" for name, profile in profiles.items())
            raise InputError(
                f"no profile covers {what} (batch {batch}, sequence {sequence}); there is {have}",
                where="profiles",
                remedy="Widen one of them, or leave them out for the default",
            )


def expand(profile: Profile, inputs: tuple[TensorSpec, ...], capacity: int | None) -> Shapes:
    """Every input's least, optimal and largest shape in a profile.

    Args:
        profile: Its ranges stand for ``B`` and ``S``; ``R`` is one per row, up to 32 where rows have several tokens.
        inputs: The graph's.
        capacity: Stands for ``C``.

    Raises:
        InputError: An input has a dimension of another name.
    """
    spans: dict[str, Span] = {"B": profile.batch, "S": profile.sequence, "R": _logits(profile)}
    if capacity is not None:
        spans["C"] = (capacity,) * 3
    shapes: Shapes = {}
    for spec in inputs:
        unknown = [size for size in spec.shape if isinstance(size, str) and size not in spans]
        if unknown:
            what = f"input {spec.name!r} has a dimension {unknown[0]!r} that no profile gives"
            raise InputError(what, where="profiles", remedy="Export the model again")
        low, opt, high = (
            tuple(spans[size][place] if isinstance(size, str) else size for size in spec.shape) for place in range(3)
        )
        shapes[spec.name] = (low, opt, high)
    return shapes


def _logits(profile: Profile) -> Span:
    batch, sequence = profile.batch, profile.sequence
    most = batch[2] if sequence[2] == 1 else max(batch[2], min(DEFAULT_LOGITS, sequence[2]))
    return (1, batch[1], most)


__all__ = ["DECODE", "ENCODE", "PREFILL", "Profile", "Profiles", "Shapes", "check_profiles", "default_profiles"]
__all__ += ["expand", "read_profiles"]
