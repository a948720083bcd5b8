"""What a manifest records of a variant's integers: options that choose the same again, and how two records differ."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from accel.errors import InputError
from accel.manifest import Manifest, Quantization
from accel.scheme import Scheme, parse_scheme

FLOAT_BITS = 32
MOST_KEPT = 6  # as options of one command; more are too many to be read
_CHOSEN = ("asked for", "raised: ")  # why a matrix stayed float that could have been rounded


def options_of(manifest: Manifest, variant: str) -> tuple[str, str]:
    """The options of ``accel quantize`` that choose a variant's integers as they are recorded.

    What a default would choose by measuring is named as it was chosen. The calibration text is not recorded, its
    sha256 is: another one is told where it was taken.

    Returns:
        The options, and what they leave out; empty: nothing.
    """
    record = manifest.variants[variant].quantization
    try:
        scheme = parse_scheme(variant)
    except InputError:
        return "", ""
    if record is None or not scheme.quantized:
        return "", ""
    options = [] if record.algorithm == scheme.usual_algorithm else [f"--algorithm {record.algorithm}"]
    widths = _widths(record)
    wide = [name for name in widths if _rows(manifest, name) == manifest.arch.vocab_size]
    head, kept = _choices(manifest, scheme, widths, wide)
    options += [] if head is None else [f"--head-bits {head}"]
    patterns = _patterns(kept, widths)
    if len(patterns) > MOST_KEPT:
        return " ".join(options), f"without the --keep of {len(kept)} layers that it had"
    options += [f"--keep {shlex.quote(f'{pattern}={bits}')}" for pattern, bits in patterns.items()]
    return " ".join(options), ""


def _choices(
    manifest: Manifest, scheme: Scheme, widths: Mapping[str, int], wide: list[str]
) -> tuple[int | None, dict[str, int]]:
    """Bits of the head, and layers -> bits, where the scheme alone would choose, or might choose, others.

    A table gets 8 bits, a decoder's head 8, or with 4-bit weights what costs little: that is measured.
    """
    decoder, bits = manifest.arch.kind == "decoder", {widths[name] for name in wide}
    measured = decoder and scheme.weight_bits == 4
    kept = {name: width for name, width in widths.items() if name not in wide and width != scheme.weight_bits}
    if decoder and (len(wide) == 1 or bits == {8}):
        (head,) = bits
        return head if measured or head != 8 else None, kept
    return None, kept | {name: widths[name] for name in wide if measured or widths[name] != 8}


def _widths(record: Quantization) -> dict[str, int]:
    """Layers -> bits; of those that stayed float only what was chosen so."""
    chosen = [name for name, why in record.kept.items() if not why or why.startswith(_CHOSEN)]
    return {layer.name: layer.bits for layer in record.layers} | dict.fromkeys(chosen, FLOAT_BITS)


def _rows(manifest: Manifest, name: str) -> int | None:
    entry = manifest.parameters.get(name)
    return entry.shape[0] if entry is not None and entry.shape else None


def _patterns(kept: Mapping[str, int], widths: Mapping[str, int]) -> dict[str, int]:
    """One pattern for layers of all blocks that have one width, else names; bits by either."""
    found: dict[str, int] = {}
    for name, bits in kept.items():
        ending = "." + ".".join(name.split(".")[-2:])
        alike = [other for other in widths if other.endswith(ending)]
        together = len(alike) > 1 and all(kept.get(other) == bits for other in alike)
        found[f"*{ending}" if together else name] = bits
    return found


def same_choice(known: Quantization, new: Quantization) -> bool:
    """Whether two records are of the same integers, but for errors of the arithmetic."""
    return _choice(known) == _choice(new)


def _choice(record: Quantization) -> tuple[object, ...]:
    """What decides the integers."""
    layers = [(layer.name, layer.bits, layer.group) for layer in record.layers]
    return record.algorithm, record.calibration_sha256, layers


def difference(known: Quantization, new: Quantization) -> str:
    """What decided differently, in words."""
    told = []
    if new.algorithm != known.algorithm:
        told.append(f"{new.algorithm} in place of {known.algorithm}")
    if new.calibration_sha256 != known.calibration_sha256:
        told.append("other calibration text")
    widths = [{layer.name: (layer.bits, layer.group) for layer in record.layers} for record in (known, new)]
    changed = sum(widths[0].get(name) != widths[1].get(name) for name in widths[0].keys() | widths[1].keys())
    if changed:
        told.append(f"{changed} layers in another precision (--keep, --max-bytes, --head-bits)")
    return ", ".join(told)


__all__ = ["difference", "options_of", "same_choice"]
