"""The frame of the pages: one HTML document without any outside resource or script, and the blocks it is made of.

All text is escaped here or in ``svg``; what is called content is markup already.
"""

from __future__ import annotations

from collections.abc import Sequence

from accel.inspection.style import STYLE
from accel.inspection.svg import escape

# Names in a page come from files that may be hostile; should one ever slip through unescaped, this stops it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, content: Sequence[str], footer: str) -> str:
    """A whole page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(content)}"
        f"<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def header(title: str, source: str, path: str, tags: Sequence[str]) -> str:
    """The model, where it comes from and where it lies."""
    shown = "".join(f"<span>{escape(tag)}</span>" for tag in tags)
    return (
        f"<header><h1>{escape(title)}</h1><p>from <code>{escape(source)}</code>, "
        f'in <code>{escape(path)}</code></p><div class="tags">{shown}</div></header>'
    )


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Large figures, each with what it is."""
    shown = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in items)
    return f'<div class="cards">{shown}</div>'


def messages(kind: str, title: str, items: Sequence[str]) -> str:
    """A list that stands out; ``kind`` is ``alert`` or ``hint``. Nothing where it is empty."""
    if not items:
        return ""
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<section class="{kind}"><h2>{escape(title)}</h2><ul>{listed}</ul></section>'


def section(title: str, note: str, content: str) -> str:
    """A framed part of the page; its pictures scroll where the window is narrow."""
    pictures = content.replace("<svg ", '<div class="scroll"><svg ').replace("</svg>", "</svg></div>")
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{pictures}</section>'


def columns(blocks: Sequence[str]) -> str:
    """Blocks beside each other, where there is room."""
    return f'<div class="columns">{"".join(blocks)}</div>'


def details(summary: str, content: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """(kind, label) each; a kind's colour is its ``swatch-`` class in the style sheet."""
    shown = "".join(f'<span><i class="swatch-{escape(kind)}"></i>{escape(label)}</span>' for kind, label in keys)
    return f'<div class="legend">{shown}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: tuple[int, ...] = ()) -> str:
    """A table; columns that are empty throughout are dropped. All cells are escaped here."""
    shown = [index for index in range(len(head)) if any(row[index] for row in rows)]

    def cell(tag: str, index: int, content: str) -> str:
        kind = ' class="right"' if index in right else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{kind}>{escape(content)}</{tag}>"

    top = "".join(cell("th", index, head[index]) for index in shown)
    body = "".join("<tr>" + "".join(cell("td", index, row[index]) for index in shown) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


__all__ = ["cards", "columns", "details", "document", "header", "legend", "messages", "section", "table"]
