"""Squarified treemaps (Bruls, Huizing and van Wijk): areas in proportion, tiles near squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


def squarify(sizes: Sequence[float], box: Box) -> list[Box]:
    """Divides a box.

    Args:
        sizes: At least 0; best in descending order.
        box: What is divided.

    Returns:
        One box per size, of area in proportion to it; together they fill ``box``.
    """
    total = sum(sizes)
    if total <= 0:
        return [Box(box.x, box.y, 0, 0) for _ in sizes]
    areas = [size * box.width * box.height / total for size in sizes]
    made: list[Box] = []
    start, rest = 0, box
    while start < len(areas):
        side = min(rest.width, rest.height)
        stop = start + 1
        while stop < len(areas) and _worst(areas[start : stop + 1], side) <= _worst(areas[start:stop], side):
            stop += 1
        row, rest = _lay(areas[start:stop], rest)
        made += row
        start = stop
    return made


def _worst(areas: Sequence[float], side: float) -> float:
    """The largest aspect ratio when ``areas`` stand in a row along ``side``."""
    total, smallest, largest = sum(areas), min(areas), max(areas)
    if smallest <= 0 or side <= 0:
        return float("inf")
    return max(side * side * largest / (total * total), total * total / (side * side * smallest))


def _lay(areas: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    """Boxes along the shorter side, and what is left of ``box``."""
    total, made = sum(areas), []
    if box.width >= box.height:
        width = total / box.height if box.height > 0 else 0.0
        y = box.y
        for area in areas:
            height = area / width if width > 0 else 0.0
            made.append(Box(box.x, y, width, height))
            y += height
        return made, Box(box.x + width, box.y, max(0.0, box.width - width), box.height)
    height = total / box.width if box.width > 0 else 0.0
    x = box.x
    for area in areas:
        width = area / height if height > 0 else 0.0
        made.append(Box(x, box.y, width, height))
        x += width
    return made, Box(box.x, box.y + height, box.width, max(0.0, box.height - height))


__all__ = ["Box", "squarify"]
