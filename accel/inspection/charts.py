"""The page's pictures: nodes per pass, layer strip, operators, weights, cache growth, parity."""

from __future__ import annotations

import math

from accel.inspection import wording
from accel.inspection.report import PARTS, AttentionLayer, CacheReport, GraphReport, WeightReport
from accel.inspection.svg import element, escape, line, nice_step, picture, rectangle, shorten, text
from accel.inspection.treemap import Box, squarify
from accel.manifest import ParityResult, PassReport

WIDTH = 980
CACHE_ROWS = (1, 4, 8)  # rows whose growth is drawn


def draw_passes(graph: GraphReport, base: GraphReport | None) -> str:
    """Bars of the nodes after each pass over those before it; a rule where the base graph's passes end."""
    passes, left, height = graph.passes, 150, 24
    most = max(1, *(max(item.nodes_before, item.nodes_after) for item in passes))
    scale = (WIDTH - left - 260) / most
    parts = [text(left - 12, 17, "traced", "label end")]
    parts += [rectangle(left, 4, passes[0].nodes_before * scale, 16, "bar start", f"{passes[0].nodes_before:,} nodes")]
    parts.append(text(left + passes[0].nodes_before * scale + 8, 17, f"{passes[0].nodes_before:,}", "number"))
    parts.append(text(WIDTH, 17, "times applied, or what was fused", "faint end"))
    y = height
    for index, item in enumerate(passes):
        if base is not None and index == len(base.passes):
            parts += [line(0, y + 11, WIDTH, y + 11, "rule")]
            parts.append(text(0, y + 27, f"on from {shorten(base.target, 40)}:", "faint"))
            y += 32
        parts.append(_draw_pass(item, y, left, scale))
        y += height
    first, last = passes[0].nodes_before, passes[-1].nodes_after
    about = f"From {first:,} traced nodes to {last:,} in {len(passes)} passes"
    return picture(WIDTH, y + 4, f"Nodes per pass, {graph.variant}/{graph.target}", about, parts)


def _draw_pass(item: PassReport, y: float, left: float, scale: float) -> str:
    before, after = item.nodes_before * scale, item.nodes_after * scale
    title = f"{item.name}: {item.nodes_before:,} nodes before, {item.nodes_after:,} after"
    change = item.nodes_after - item.nodes_before
    kind = "bar after" if change <= 0 else "bar grown"
    parts = [text(left - 12, y + 17, shorten(item.name, 20), "label end" if change else "label end faint")]
    if change < 0:
        parts.append(rectangle(left, y + 4, before, 16, "bar ghost", title))
    parts.append(rectangle(left, y + 4, after, 16, kind if change else "bar same", title))
    number = f"{item.nodes_after:,}" + (f"  {change:+,}".replace("-", "−") if change else "")
    fused = wording.fused(item)
    parts.append(text(left + max(before, after) + 8, y + 17, number, "number" if change else "number faint"))
    if fused:
        room = (WIDTH - left - max(before, after) - 110) / 6.6
        parts.append(text(WIDTH, y + 17, shorten(fused, int(room)), "faint end"))
    return element("g", *parts)


def draw_layers(graph: GraphReport) -> str:
    """A tile per layer with a picture of what its queries see."""
    size, gap, columns = 53, 8, 16
    rows = math.ceil(len(graph.attention) / columns)
    parts = []
    for index, layer in enumerate(graph.attention):
        x, y = (index % columns) * (size + gap) + 2, (index // columns) * (size + gap + 16) + 2
        parts.append(_draw_layer(layer, x, y, size))
    about = "; ".join(
        f"layers {wording.span(numbers)}: {layer.heads} heads over {layer.kv_heads}, sees {wording.mask(layer)}"
        for numbers, layer in wording.kinds(graph)
    )
    height = rows * (size + gap + 16)
    return picture(WIDTH, height, "Attention layers", about, parts)


def _draw_layer(layer: AttentionLayer, x: float, y: float, size: float) -> str:
    softcap = "" if layer.softcap is None else f", softcap {layer.softcap:g}"
    title = (
        f"Layer {layer.layer}: {wording.kernel(layer)}, {layer.heads} heads over {layer.kv_heads} of size "
        f"{layer.head_dim}, sees {wording.mask(layer)}{softcap}, rotary {layer.rotary or 'not read'}"
    )
    kind = "mask full" if layer.window is None else "mask window"
    parts = [element("title", escape(title)), rectangle(x, y, size, size, "tile", radius=6)]
    x, y, inner = x + 7, y + 7, size - 14
    band = inner if layer.window is None else inner * 0.34
    causal = layer.causal
    corners = [(0.0, 0.0), (0.0 if causal else band, 0.0), (inner, inner if causal else inner - band), (inner, inner)]
    corners += [(inner - band, inner), (0.0, band)]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    parts.append(element("polygon", points=points, class_=kind))
    if layer.softcap is not None:
        parts.append(element("circle", cx=x + inner - 3, cy=y + 3, r=4, class_="softcap"))
    parts.append(text(x + inner / 2, y + inner + 20, layer.layer, "number middle faint"))
    return element("g", *parts)


def draw_operators(graph: GraphReport, most_shown: int = 14) -> str:
    """Bars of how often each operator occurs."""
    assert graph.nodes is not None
    items = list(graph.nodes.operators.items())
    if len(items) > most_shown:
        rest = items[most_shown - 1 :]
        items = [*items[: most_shown - 1], (f"{len(rest)} others", sum(number for _, number in rest))]
    width, left, height = 470, 232, 22
    most = max([1, *(number for _, number in items)])
    parts = []
    for index, (name, number) in enumerate(items):
        y = index * height
        length = number / most * (width - left - 50)
        parts.append(text(left - 10, y + 15, shorten(name.removeprefix("com.microsoft::"), 31), "label end"))
        parts.append(rectangle(left, y + 3, length, 15, "bar after", f"{name}: {number:,}"))
        parts.append(text(left + length + 7, y + 15, f"{number:,}", "number"))
    about = ", ".join(f"{name} {number:,}" for name, number in items)
    return picture(width, len(items) * height + 4, f"Operators of {graph.variant}/{graph.target}", about, parts)


def draw_weights(report: WeightReport) -> str:
    """A treemap: areas are bytes, colours are parts, tiles are tensors alike in all layers."""
    height = 330
    parts_shown = [(part, report.parts[part].bytes) for part in PARTS if part in report.parts]
    parts_shown.sort(key=lambda item: -item[1])
    boxes = squarify([size for _, size in parts_shown], Box(0, 0, WIDTH, height))
    parts = []
    for (part, _), box in zip(parts_shown, boxes):
        groups = [group for group in report.groups if group.part == part]
        inner = squarify([group.share.bytes for group in groups], box)
        for group, tile in zip(groups, inner):
            share = wording.percent(group.share.bytes, report.referenced_bytes)
            title = f"{group.name}: {group.share.bytes:,} bytes ({share}), {group.share.tensors} tensors, {group.dtype}"
            parts.append(_draw_tile(tile, part, _module(group.name), wording.size(group.share.bytes), title))
    about = ", ".join(f"{part} {wording.percent(size, report.referenced_bytes)}" for part, size in parts_shown)
    return picture(WIDTH, height, f"Weights of {report.variant} by part", about, parts)


def _draw_tile(box: Box, part: str, name: str, size: str, title: str) -> str:
    if min(box.width, box.height) < 0.8:
        return ""
    parts = [rectangle(box.x + 0.75, box.y + 0.75, box.width - 1.5, box.height - 1.5, f"part {part}", title)]
    room = int((box.width - 14) / 6.9)
    if room >= 5 and box.height >= 22:
        parts.append(text(box.x + 8, box.y + 18, shorten(name, room), "on"))
        if box.height >= 40 and len(size) <= room:
            parts.append(text(box.x + 8, box.y + 34, size, "on dim"))
    return element("g", *parts)


def _module(name: str) -> str:
    """The last meaningful word of a tensor's name: ``model.layers.*.mlp.up_proj.weight`` -> ``up_proj``."""
    words = [word for word in name.split(".") if word not in ("weight", "*")] or [name]
    return ".".join(words[-2:]) if words[-1] in ("bias", "dense", "cos", "sin") else words[-1]


def draw_cache(cache: CacheReport, weights: int) -> str:
    """Bytes over positions for a few rows, with the weights' size as a measure."""
    left, top, height = 80, 14, 220
    capacity = max(1, cache.rows[-1].capacity)
    largest = capacity * cache.bytes_per_token * max(CACHE_ROWS)
    step = nice_step(max(largest / 4, 1))
    ceiling = step * max(1, math.ceil(largest / step))
    right = WIDTH - 130

    def at(position: float, size: float) -> tuple[float, float]:
        return left + position / capacity * (right - left), top + height * (1 - size / ceiling)

    parts = []
    for index in range(round(ceiling / step) + 1):
        _, y = at(0, index * step)
        parts += [line(left, y, right, y, "grid"), text(left - 10, y + 4, wording.size(index * step), "number end")]
    for row in cache.rows:
        x, bottom = at(row.capacity, 0)
        if row is cache.rows[-1] or left + 45 < x < right - 60:
            parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 18, f"{row.capacity:,}", "number middle")]
    parts.append(text(left, top + height + 18, "0", "number middle"))
    parts.append(text((left + right) / 2, top + height + 38, "positions of a row", "faint middle"))
    for order, rows in enumerate(CACHE_ROWS):
        x, y = at(capacity, capacity * cache.bytes_per_token * rows)
        parts.append(element("line", x1=left, y1=top + height, x2=x, y2=y, class_=f"curve c{order}"))
        parts.append(element("circle", cx=x, cy=y, r=4, class_=f"dot c{order}"))
        label = f"{rows} row{'s' if rows > 1 else ''}: {wording.size(capacity * cache.bytes_per_token * rows)}"
        parts.append(text(x + 10, y + 4, label, "label"))
    if 0 < weights <= ceiling:
        _, y = at(0, weights)
        parts += [line(left, y, right, y, "limit"), text(left + 8, y - 5, f"weights {wording.size(weights)}", "faint")]
    about = f"{cache.bytes_per_token:,} bytes per token of a row, up to {capacity:,} positions"
    return picture(WIDTH, top + height + 46, "Cache growth", about, parts)


def draw_parity(parity: dict[str, ParityResult]) -> str:
    """Relative errors on a logarithmic axis, each with its limit."""
    left, height = 160, 46
    values = [value for item in parity.values() for value in (item.max_rel_error, item.limit) if value > 0]
    low = math.floor(math.log10(min([1e-6, *values]) / 2))
    high = math.ceil(math.log10(max([1e-3, *values])))
    right = WIDTH - 150

    def at(value: float) -> float:
        power = min(max(math.log10(value), low), high) if value > 0 else low
        return left + (power - low) / (high - low) * (right - left)

    bottom = len(parity) * height + 6
    parts = []
    for power in range(low, high + 1):
        x = at(10.0**power)
        parts += [line(x, 0, x, bottom, "grid"), text(x, bottom + 18, f"1e{power}", "number middle")]
    for index, (name, item) in enumerate(parity.items()):
        y, kind = index * height + 10, "bar good" if item.max_rel_error <= item.limit else "bar bad"
        title = f"{name}: error {item.max_rel_error:.2e}, limit {item.limit:.0e}, against {item.reference}"
        parts.append(text(left - 12, y + 19, shorten(name, 21), "label end"))
        parts.append(rectangle(left, y + 4, at(item.max_rel_error) - left, 22, kind, title))
        parts.append(text(at(item.max_rel_error) + 8, y + 19, f"{item.max_rel_error:.1e}", "number"))
        parts += [line(at(item.limit), y - 4, at(item.limit), y + 32, "limit")]
        parts.append(text(right + 12, y + 19, _distance(item), "label"))
    about = "; ".join(f"{name}: {item.max_rel_error:.1e}, limit {item.limit:.0e}" for name, item in parity.items())
    return picture(WIDTH, bottom + 26, "Parity errors against their limits", about, parts)


def _distance(item: ParityResult) -> str:
    if item.max_rel_error <= 0 or item.limit <= 0:
        return f"limit {item.limit:.0e}"
    ratio = item.limit / item.max_rel_error
    return f"{ratio:,.0f}x below limit" if ratio >= 1 else f"{1 / ratio:,.1f}x over limit"


__all__ = [
    "draw_cache",
    "draw_layers",
    "draw_operators",
    "draw_parity",
    "draw_passes",
    "draw_weights",
]
