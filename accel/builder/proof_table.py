"""The result of a proof as data: one row for each thing compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProofRow:
    """One comparison.

    Attributes:
        layer: Index of the model's layer; None: the whole network.
        node: The graph's node, input or output; empty where it is about all.
        check: What was compared.
        expected: What the graph or the architecture says.
        found: What the network has.
    """

    layer: int | None
    node: str
    check: str
    expected: str
    found: str
    ok: bool


@dataclass(frozen=True)
class ProofTable:
    """All rows, and the repairs that were made before, in words. ``schema.to_dict`` makes JSON of it."""

    rows: tuple[ProofRow, ...]
    repairs: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[ProofRow, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def ok(self) -> bool:
        return not self.failures

    def text(self) -> str:
        """A table for people: rows that say the same of several layers are one line, with ``*`` for the layer."""
        lines = [("layer", "check", "expected", "found", "")]
        groups: dict[tuple[str, str, str, bool], list[ProofRow]] = {}
        for item in self.rows:
            key = (item.check, _any_layer(item.expected), _any_layer(item.found), item.ok)
            groups.setdefault(key if item.ok else (item.check, item.expected, item.found, False), []).append(item)
        for (check, expected, found, ok), items in groups.items():
            layers = sorted({item.layer for item in items if item.layer is not None})
            lines.append((_ranges(layers), check, expected, found, "ok" if ok else f"FAILED {items[0].node}"))
        widths = [min(60, max(len(line[column]) for line in lines)) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell[:60].ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip()
            for line in lines
        )


def row(layer: int | None, node: str, check: str, expected: Any, found: Any) -> ProofRow:
    """A row that is right when both sides read the same."""
    return ProofRow(layer, node, check, str(expected), str(found), str(expected) == str(found))


def _any_layer(text: str) -> str:
    return re.sub(r"\b(layers|past|present)\.\d+\.", r"\1.*.", text)


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5``; ``all`` for none."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "all"


__all__ = ["ProofRow", "ProofTable", "row"]
