"""Which width and group each layer gets, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from accel.compress.layers import Layer
from accel.compress.tensors import fitting_group
from accel.errors import InputError
from accel.schema import suggest
from accel.scheme import QUANTIZED, Scheme

FLOAT_BITS = 32
_WIDTHS = (4, 8, FLOAT_BITS)


@dataclass
class Choice:
    """What becomes of one layer.

    Attributes:
        bits: 4, 8, or 32 for float.
        group: Inputs that share a scale; 0: the whole row.
        note: What differs from the scheme, and why.
    """

    bits: int
    group: int
    note: str = ""


def plan(
    layers: Sequence[Layer],
    scheme: Scheme,
    keep: Mapping[str, int] | None = None,
    head_bits: int | None = None,
    table_bits: int | None = None,
) -> dict[str, Choice]:
    """Choices by the layers' names.

    Args:
        layers: Of the graph.
        scheme: With integer weights.
        keep: Names or patterns (``*.down_proj.weight``) of layers -> bits: 4, 8, or 32 for float. The last that
            matches counts, and comes before everything else.
        head_bits: Of the head and of a table tied to it; None: the scheme's.
        table_bits: Of a table on its own; None: 8, as a row of 4 bits saves nothing per token and costs quality.

    Raises:
        InputError: The scheme has no integer weights, a width is none, a pattern matches nothing, or a layer's inputs
            cannot be divided into groups.
    """
    if scheme.weight_bits is None:
        remedy = f"Schemes with integer weights: {', '.join(QUANTIZED)}"
        raise InputError(f"{scheme.name} leaves weights as they are", where="scheme", remedy=remedy)
    _check_widths(layers, keep or {}, {"head_bits": head_bits, "table_bits": table_bits})
    choices = {}
    for layer in layers:
        bits, note = scheme.weight_bits, ""
        if layer.role in ("head", "tied") and head_bits is not None:
            bits = head_bits
        elif layer.role == "table":
            bits = table_bits or 8
        for pattern, width in (keep or {}).items():
            if fnmatchcase(layer.name, pattern):
                bits, note = width, "asked for"
        group = 0 if bits == FLOAT_BITS else fitting_group(layer.shape[1], scheme.group, layer.name)
        if bits != FLOAT_BITS and group != scheme.group:
            note = f"groups of {group}: {layer.shape[1]} inputs are no multiple of {scheme.group}"
        choices[layer.name] = Choice(bits, group, note)
    return choices


def _check_widths(layers: Sequence[Layer], keep: Mapping[str, int], options: Mapping[str, int | None]) -> None:
    names = [layer.name for layer in layers]
    for where, width in [*((f"keep[{pattern!r}]", width) for pattern, width in keep.items()), *options.items()]:
        if width is not None and width not in _WIDTHS:
            raise InputError(f"{width!r} is no width of a weight", where=where, remedy="4, 8, or 32 for float")
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"no layer is called {pattern!r}", where="keep", remedy=suggest(pattern, names))


__all__ = ["FLOAT_BITS", "Choice", "plan"]
