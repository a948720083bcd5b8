"""The file of figures that ``scripts/benchmark_cuda.py`` writes, and its plot: every row beside its peers."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from accel.bench.plot import Panel, draw_panels
from accel.errors import InputError

PAUSED = "first_token_after_pause_ms"  # where nothing was measured in quick succession
DRAWN = ("decoder", "genai", "transformers", "encoder")  # of the file's parts
_AGAIN = "Files that this version of scripts/benchmark_cuda.py wrote are drawn: measure again"
Row = dict[str, Any]


def read_figures(path: Path | None) -> Row:
    """What a file of figures holds; nothing where there is none yet.

    Raises:
        InputError: It is something else.
    """
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"this is no file of figures: {error}", where=str(path), remedy="Give another path") from error
    if not isinstance(found, dict):
        raise InputError("this is no file of figures", where=str(path), remedy="Give another path")
    return found


def draw_figures(figures: Path, picture: Path) -> None:
    """Draws what was measured, medians.

    Raises:
        InputError: There is nothing of it, or another version wrote the file; says what the file lacks.
        DependencyError: matplotlib is not installed.
    """
    if not figures.exists():
        raise InputError("there is no such file", where=str(figures), remedy="Measure first, without --plot")
    found = read_figures(figures)
    parts = {part: _rows_of(found, part, figures) for part in DRAWN if part in found}
    if not parts:
        what = f"there is nothing to draw: the file has none of the keys {', '.join(DRAWN)}"
        raise InputError(what, where=str(figures), remedy=_AGAIN)
    try:
        panels = [panel for panel in (*_token_panels(parts), *_encoder_panels(parts)) if panel.bars]
        title = f"{found['gpu']}, {found['date']}; Llama-3.2-1B's shape; medians, lower is better"
    except KeyError as error:
        raise InputError(f"the key {error} is missing", where=str(figures), remedy=_AGAIN) from error
    except (TypeError, ValueError) as error:  # a number where several are expected, or none
        raise InputError(f"a row has other times: {error}", where=str(figures), remedy=_AGAIN) from error
    if not panels:
        what = f"there is nothing to draw: the rows of {', '.join(parts)} have no times"
        raise InputError(what, where=str(figures), remedy=_AGAIN)
    draw_panels(panels, title, picture)


def _rows_of(found: Row, part: str, path: Path) -> list[Row]:
    rows = found[part]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"the key {part!r} holds no list of rows", where=str(path), remedy=_AGAIN)
    return rows


def _token_panels(parts: dict[str, list[Row]]) -> list[Panel]:
    """Of decoders; a row that failed has no times."""
    rows = [row for part in ("decoder", "genai", "transformers") for row in parts.get(part, [])]
    panels = []
    for batch in dict.fromkeys(row["batch"] for row in rows if "per_token_ms" in row):
        own = [row for row in rows if row["batch"] == batch]
        tokens = [_bar(row, row["per_token_ms"]) for row in own if "per_token_ms" in row]
        panels.append(Panel(f"token, batch {batch}, ms", tokens))
        panels.append(Panel(f"first token, batch {batch}, ms", [bar for row in own for bar in _first_token(row)]))
    return panels


def _first_token(row: Row) -> list[tuple[str, float, bool]]:
    """In quick succession, as peers' are; else after a pause, and the label says so."""
    if "first_token_ms" in row:
        return [_bar(row, row["first_token_ms"])]
    if PAUSED not in row:
        return []
    label, value, ours = _bar(row, row[PAUSED])
    return [(f"{label}, after a pause", value, ours)]


def _encoder_panels(parts: dict[str, list[Row]]) -> list[Panel]:
    """Of BERT-base: transformers' rows of it say how many tokens."""
    ours, theirs = parts.get("encoder", []), [row for row in parts.get("transformers", []) if "tokens" in row]
    panels = []
    for batch, width in dict.fromkeys((row["batch"], row["tokens"]) for row in (*ours, *theirs)):
        own, peers = (
            [row for row in rows if (row["batch"], row["tokens"]) == (batch, width)] for rows in (ours, theirs)
        )
        bars = [("accel cuda, on the GPU", row["graph_ms"], True) for row in own]
        bars += [("accel cuda, NumPy to NumPy", median(row["call_ms"]), True) for row in own]
        bars += [_bar(row, row["ms"]) for row in peers]
        panels.append(Panel(f"BERT-base fp16 {batch}x{width}, ms", bars))
    return panels


def _bar(row: Row, values: list[float]) -> tuple[str, float, bool]:
    ours = "peer" not in row
    label = f"accel {row['engine']} {row['variant']}" if ours else row["peer"].removeprefix("BERT, ")
    return label, median(values), ours
