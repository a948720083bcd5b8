"""The report's pictures: loss against size, agreement, times, errors per layer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accel.inspection.svg import element, escape, line, nice_step, picture, rectangle, shorten, text
from accel.inspection.wording import size
from accel.manifest import GreedyAgreement, PhaseTimings, Quantization, QuantizedLayer
from accel.quality import wording

WIDTH = 980
FLOOR = 1e-4  # losses up to it are drawn as none
MAX_KINDS = 24  # rows of the picture of layers
_NUMBER = re.compile(r"(?<=\.)(\d{1,6})(?=\.)")


@dataclass(frozen=True)
class Loss:
    """One variant in the picture of loss against size; ``low`` and ``high`` are the ends of its whisker."""

    name: str
    bytes: int
    loss: float
    low: float
    high: float
    reference: bool = False


def draw_tradeoff(losses: Sequence[Loss], unit: str) -> str:
    """Loss on a logarithmic axis that grows downward, over bytes: what is high and to the left is best."""
    left, top, right, height = 96, 16, WIDTH - 120, 280
    step = nice_step(max(item.bytes for item in losses) / 5)
    ceiling = step * math.ceil(max(item.bytes for item in losses) * 1.02 / step)
    lowest = math.floor(math.log10(FLOOR))
    highest = max(lowest + 2, math.ceil(math.log10(max([FLOOR, *(max(item.loss, item.high) for item in losses)]))))

    def across(count: float) -> float:
        return left + count / ceiling * (right - left)

    def down(loss: float) -> float:
        power = math.log10(min(max(loss, FLOOR), 10.0**highest))
        return top + 34 + (power - lowest) / (highest - lowest) * (height - 56)

    parts = [line(left, top + 8, right, top + 8, "grid"), text(left - 10, top + 12, "none", "number end")]
    for power in range(lowest, highest + 1):
        y = down(10.0**power)
        label = f"{10.0**power:g}" if power >= -4 else f"1e{power}"
        parts += [line(left, y, right, y, "grid"), text(left - 10, y + 4, label, "number end")]
    for index in range(round(ceiling / step) + 1):
        x = across(index * step)
        parts.append(line(x, top, x, top + height, "grid"))
        parts.append(text(x, top + height + 18, size(index * step), "number middle"))
    parts.append(text((left + right) / 2, top + height + 40, "weights that the engine reads", "faint middle"))
    parts.append(text(14, top + height / 2, unit, "faint middle", transform=f"rotate(-90 14 {top + height / 2:g})"))
    places = [(item, across(item.bytes), top + 8 if item.loss < FLOOR else down(item.loss)) for item in losses]
    parts += [_draw_loss(item, x, y, down) for item, x, y in places]
    parts += _labels(places)
    about = "; ".join(f"{item.name}: {size(item.bytes)}, loss {item.loss:.4f}" for item in losses)
    return picture(WIDTH, top + height + 48, "Loss against size", about, parts)


def _draw_loss(item: Loss, x: float, y: float, down: Callable[[float], float]) -> str:
    title = f"{item.name}: {size(item.bytes)}, loss {item.loss:.4f}, {item.low:.4f} to {item.high:.4f}"
    parts = [element("title", escape(title))]
    if item.high > FLOOR:
        start = y if item.low < FLOOR else down(item.low)
        stop = down(item.high)
        parts.append(line(x, start, x, stop, "whisker"))
        parts += [line(x - 5, end, x + 5, end, "whisker") for end in ((stop,) if item.low < FLOOR else (start, stop))]
    kind = "point base" if item.reference else "point"
    parts.append(element("circle", cx=float(x), cy=float(y), r=6, class_=kind))
    return element("g", *parts)


def _labels(places: Sequence[tuple[Loss, float, float]]) -> list[str]:
    """Names beside the points; of those that would lie over each other, the later ones move down."""
    parts, taken = [], list[tuple[float, float]]()
    for item, x, y in sorted(places, key=lambda place: (place[2], place[1])):
        at = y + 4
        while any(abs(at - other_y) < 15 and abs(x - other_x) < 110 for other_x, other_y in taken):
            at += 15
        taken.append((x, at))
        parts.append(text(x + 12, at, shorten(item.name, 16), "label"))
    return parts


def draw_agreement(items: Sequence[tuple[str, GreedyAgreement]]) -> str:
    """Two bars for each variant: the next token with the text before it, and the common beginning."""
    left, right, height = 160, WIDTH - 230, 50
    parts = [line(right, 0, right, len(items) * height, "limit")]
    for index, (name, item) in enumerate(items):
        y = index * height + 6
        parts.append(text(left - 12, y + 22, shorten(name, 20), "label end"))
        rows = ((item.top1, "bar after", "same next token"), (item.prefix, "bar good", "same beginning"))
        for order, (share, kind, label) in enumerate(rows):
            at = y + order * 18
            parts.append(rectangle(left, at, right - left, 14, "cell"))
            parts.append(rectangle(left, at, share * (right - left), 14, kind, f"{name}: {label} {100 * share:.2f} %"))
            parts.append(text(right + 12, at + 12, f"{100 * share:.1f} % {label}", "number"))
    about = "; ".join(f"{name}: {100 * item.top1:.1f} %, {100 * item.prefix:.1f} %" for name, item in items)
    return picture(WIDTH, len(items) * height + 4, "Greedy agreement with fp32", about, parts)


def draw_times(phase: str, items: Sequence[tuple[str, PhaseTimings]]) -> str:
    """A bar for each variant, in three parts."""
    left, right, height = 160, WIDTH - 260, 26
    most = max(item.total for _, item in items) or 1.0
    parts = []
    for index, (name, item) in enumerate(items):
        x, y = float(left), index * height
        parts.append(text(left - 12, y + 17, shorten(name, 20), "label end"))
        for share in ("compute", "prepost", "system"):
            seconds = getattr(item, share)
            width = seconds / most * (right - left)
            title = f"{name}, {phase}: {share} {wording.milliseconds(seconds)} ms"
            parts.append(rectangle(x, y + 4, width, 16, f"bar {share}", title, radius=0))
            x += width
        shares = (item.compute, item.prepost, item.system)
        label = f"{wording.milliseconds(item.total)} ms"
        detail = " + ".join(map(wording.milliseconds, shares))
        parts += [text(x + 8, y + 17, label, "number"), text(WIDTH, y + 17, detail, "number faint end")]
    about = "; ".join(f"{name}: {wording.milliseconds(item.total)} ms" for name, item in items)
    return picture(WIDTH, len(items) * height + 4, f"Time of a {phase}", about, parts)


def draw_layers(name: str, record: Quantization) -> str:
    """One cell for each rounded weight: rows are kinds of weights, columns are the model's layers."""
    table = _by_kind(record.layers)
    kinds = list(table)[:MAX_KINDS]
    columns = max((number for kind in kinds for number in table[kind]), default=0) + 1
    left, right, height = 190, WIDTH - 96, 22
    width = (right - left) / columns
    largest = max((layer.error for layer in record.layers), default=0.0) or 1.0
    usual = min((layer.bits for layer in record.layers), default=0)
    parts = [text(WIDTH, 12, "mean", "faint end")]
    for row, kind in enumerate(kinds):
        y = row * height + 20
        cells = table[kind]
        parts.append(text(left - 12, y + 15, shorten(kind, 24), "label end"))
        for number, layer in cells.items():
            parts.append(_draw_cell(layer, left + number * width, y, width, height, largest, usual))
        mean = sum(layer.error for layer in cells.values()) / len(cells)
        parts.append(text(WIDTH, y + 15, f"{mean:.4f}", "number end"))
    bottom = len(kinds) * height + 20
    every = max(1, round(columns / 16))
    for number in range(0, columns if columns > 1 else 0, every):
        parts.append(text(left + (number + 0.5) * width, bottom + 15, number, "number middle faint"))
    about = f"Relative errors of {len(record.layers)} weights, the largest {largest:.4f}"
    return picture(WIDTH, bottom + 22, f"Errors per layer of {name}", about, parts)


def _draw_cell(
    layer: QuantizedLayer, x: float, y: float, width: float, height: float, largest: float, usual: int
) -> str:
    gap = min(2.0, width * 0.15)
    group = f"groups of {layer.group}" if layer.group else "per row"
    title = f"{layer.name}: error {layer.error:.4f}, {layer.bits} bits, {group}"
    box = {"x": x, "y": float(y + 1), "width": width - gap, "height": float(height - 3), "rx": 2}
    parts = [element("title", escape(title)), element("rect", **box, class_="cell")]
    parts.append(element("rect", **box, class_="heat", fill_opacity=f"{max(0.04, layer.error / largest):.3f}"))
    if layer.bits > usual:
        middle = (x + (width - gap) / 2, y + height / 2)
        parts.append(element("circle", cx=middle[0], cy=middle[1], r=min(4.0, width / 3), class_="kept"))
    return element("g", *parts)


def _by_kind(layers: Sequence[QuantizedLayer]) -> dict[str, dict[int, QuantizedLayer]]:
    """Kind of weight -> number of the layer -> its record; what has no number stands in column 0."""
    table: dict[str, dict[int, QuantizedLayer]] = defaultdict(dict)
    numbers = {int(match[1]) for layer in layers if (match := _NUMBER.search(layer.name))}
    column = {number: index for index, number in enumerate(sorted(numbers))}
    for layer in layers:
        match = _NUMBER.search(layer.name)
        kind = layer.name[match.end() + 1 :] if match else ".".join(layer.name.removesuffix(".weight").split(".")[-2:])
        table[kind.removesuffix(".weight")][column[int(match[1])] if match else 0] = layer
    return table


__all__ = ["Loss", "draw_agreement", "draw_layers", "draw_times", "draw_tradeoff"]
