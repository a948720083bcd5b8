"""Small pieces of SVG. Text and attribute values are escaped here and nowhere else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from accel.inspection.wording import printable

Number = float | int


def escape(text: object) -> str:
    """Text for HTML or an attribute: control characters spelled out, markup escaped."""
    return html.escape(printable(text), quote=True)


def element(tag: str, *children: str, **attributes: object) -> str:
    """An element; ``children`` are markup already. An underscore in an attribute's name stands for ``-``."""
    given = "".join(
        f' {name.strip("_").replace("_", "-")}="{escape(_short(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{given}>{''.join(children)}</{tag}>"


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def text(x: Number, y: Number, content: object, kind: str = "", **attributes: object) -> str:
    """A line of text."""
    return element("text", escape(content), x=x, y=y, class_=kind or None, **attributes)


def rectangle(
    x: Number, y: Number, width: Number, height: Number, kind: str, title: str = "", radius: Number = 2
) -> str:
    """A rectangle with a tooltip."""
    children = [element("title", escape(title))] if title else []
    size = {"width": max(0.0, float(width)), "height": max(0.0, float(height))}
    return element("rect", *children, x=x, y=y, **size, rx=radius, class_=kind)


def line(x1: Number, y1: Number, x2: Number, y2: Number, kind: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def picture(width: Number, height: Number, title: str, description: str, parts: Iterable[str]) -> str:
    """A whole picture that scales with the page; ``title`` and ``description`` are for screen readers."""
    body = element("title", escape(title)) + element("desc", escape(description)) + "".join(parts)
    label = f"{title}. {description}"
    return element(
        "svg", body, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_="picture",
        style=f"max-width:{width:g}px;min-width:{min(width, 560):g}px",
    )  # fmt: skip


def nice_step(value: float) -> float:
    """The round number (1, 2, 2.5 or 5 times a power of ten) at or above a positive value: a step of an axis."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value))


def shorten(name: str, room: int) -> str:
    """A name in at most ``room`` characters."""
    plain = printable(name)
    return plain if len(plain) <= room else plain[: max(1, room - 1)] + "…"


__all__ = ["element", "escape", "line", "nice_step", "picture", "rectangle", "shorten", "text"]
