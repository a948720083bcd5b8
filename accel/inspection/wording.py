"""Numbers and names as words, shared by the text and the page."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

from accel.inspection.report import AttentionLayer, CacheReport, GraphReport, Inspection
from accel.manifest import PassReport
from accel.spec import TensorSpec

_LAYER_IO = re.compile(r"(past|present)\.(\d+)\.(key|value)")


def printable(text: object) -> str:
    """``text`` with every character spelled out that a terminal or page would act on or cannot encode."""
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in plain)


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    return f"{count:.0f} B" if count < 1000 else _three_digits(count, ("kB", "MB", "GB", "TB"))


def count(number: int) -> str:
    """A large count such as 135 M; small ones exact."""
    return f"{number:,}" if number < 10_000 else _three_digits(number, ("k", "M", "G", "T"))


def _three_digits(value: float, units: tuple[str, ...]) -> str:
    power = min(len(units), max(1, int(math.log10(value * 1.0005) / 3)))
    scaled = value / 1000**power
    return f"{scaled:,.0f} {units[power - 1]}" if scaled >= 999.5 else f"{scaled:.3g} {units[power - 1]}"


def percent(share: float, whole: float) -> str:
    """A share of a whole."""
    if not whole or not share:
        return "0 %"
    return f"{100 * share / whole:.1f} %" if share / whole >= 0.001 else "< 0.1 %"


def shape(dimensions: Iterable[int | str]) -> str:
    """``[B, 2, C, 64]``; a scalar is ``[]``."""
    return "[" + ", ".join(printable(item) for item in dimensions) + "]"


def span(numbers: Sequence[int]) -> str:
    """Layer numbers as ranges, ``0-3, 5``."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        items = [number for _, number in run]
        runs.append(str(items[0]) if len(items) == 1 else f"{items[0]}-{items[-1]}")
    return ", ".join(runs)


def mask(layer: AttentionLayer) -> str:
    """What a query sees: ``causal, 512 back`` counts the query itself; ``512 each side`` does not."""
    if layer.causal:
        return "causal" if layer.window is None else f"causal, last {layer.window:,}"
    return "all" if layer.window is None else f"{layer.window:,} each side"


def kernel(layer: AttentionLayer) -> str:
    """The kernel's operator, with the operator around it that chooses it."""
    if layer.op is None:
        return "not read"
    return printable(f"{layer.branch} of {layer.op}" if layer.branch else layer.op)


def kinds(graph: GraphReport) -> list[tuple[list[int], AttentionLayer]]:
    """Layers that are alike in all but number and name, together, in the order of their first."""
    found: dict[tuple[object, ...], tuple[list[int], AttentionLayer]] = {}
    for layer in graph.attention:
        key = tuple(value for name, value in vars(layer).items() if name not in ("layer", "name"))
        found.setdefault(key, ([], layer))[0].append(layer.layer)
    return list(found.values())


def yes_no(value: bool | None) -> str:
    """Three states in a word."""
    return "not read" if value is None else "yes" if value else "no"


def fused(report: PassReport) -> str:
    """What a pass fused: a count alone when it is the pass's own name that it stands under."""
    items = [
        f"{number:,}" if name == report.name else f"{printable(name)} {number:,}"
        for name, number in report.fused.items()
        if number
    ]
    return ", ".join(items)


def merge_layers(specs: Iterable[TensorSpec]) -> list[tuple[str, str, str]]:
    """(name, dtype, shape) of inputs or outputs; cache tensors of alike layers take one line."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for spec in specs:
        match = _LAYER_IO.fullmatch(spec.name)
        name = f"{match[1]}.{{}}.{match[3]}" if match else printable(spec.name).replace("{}", "{ }")
        numbers = rows.setdefault((name, printable(spec.dtype), shape(spec.shape)), [])
        if match:
            numbers.append(int(match[2]))
    return [
        (name.replace("{}", f"{{{span(sorted(numbers))}}}") if numbers else name, dtype, dimensions)
        for (name, dtype, dimensions), numbers in rows.items()
    ]


def cache_kinds(cache: CacheReport) -> list[str]:
    """One phrase per type that a variant's caches have; none where all have the same."""
    told = cache.kinds if len(cache.kinds) > 1 else ()
    return [f"{kind}, {token:,} bytes per token: {printable(', '.join(names))}" for kind, token, names in told]


def variants(found: Inspection, form: str) -> list[str]:
    """The variants with their types, in a form for both; one that files are lost of says so."""
    told = []
    for name, dtype in found.variants.items():
        lost = [graph.target for graph in found.lost if graph.variant == name]
        whole = any(graph.variant == name for graph in found.graphs)
        which = f" for {' and '.join(lost)}" if whole else ""
        told.append(form.format(name, dtype) + (f" [damaged{which}]" if lost else ""))
    return told


def lost(found: Inspection) -> tuple[str, ...]:
    """A line for each graph that cannot run."""
    return tuple(f"{graph.variant}/{graph.target}: {graph.reason}" for graph in found.lost)


def base_of(graph: GraphReport, graphs: Iterable[GraphReport]) -> GraphReport | None:
    """The graph of the same variant whose passes this one's begin with; of several, the furthest."""
    bases = [
        other
        for other in graphs
        if other.variant == graph.variant
        and len(other.passes) < len(graph.passes)
        and other.passes == graph.passes[: len(other.passes)]
    ]
    return max(bases, key=lambda other: len(other.passes), default=None)


__all__ = [
    "base_of",
    "cache_kinds",
    "count",
    "fused",
    "kernel",
    "kinds",
    "lost",
    "mask",
    "merge_layers",
    "percent",
    "printable",
    "shape",
    "size",
    "span",
    "variants",
    "yes_no",
]
