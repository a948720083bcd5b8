"""Results as one PNG: a panel per metric, a bar per peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accel.bench.report import Result, format_figure, medians, metrics_of, subject_of
from accel.errors import DependencyError, InputError

OURS, THEIRS = "#c2410c", "#94a3b8"
COLUMNS = 4


@dataclass(frozen=True)
class Panel:
    """One metric.

    Attributes:
        title: The metric and its unit.
        bars: Label, value and whether it is accel's; in any order.
    """

    title: str
    bars: Sequence[tuple[str, float, bool]]


def plot_results(results: Sequence[Result], path: Path) -> None:
    """Draws all metrics of all results, fastest peer first.

    Raises:
        InputError: See ``draw_panels``.
        DependencyError: matplotlib is not installed.
    """
    panels = [_panel(result, metric) for result in results for metric in metrics_of(result)]
    machine = results[0]["machine"]
    run = f"{results[0]['settings']['threads']} threads, {results[0]['date']}"
    draw_panels(panels, f"{machine['cpu']}, {run}; medians, lower is better", path)


def draw_panels(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draws panels beside one another, in each the shortest bar first.

    Raises:
        InputError: The path's name says no kind of picture.
        DependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise DependencyError("plotting needs matplotlib", remedy="pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = pyplot.Figure().canvas.get_supported_filetypes()
    if path.is_dir() or path.suffix[1:].lower() not in kinds:
        raise InputError("this is no name of a picture", where=str(path), remedy=f"End it in .{', .'.join(kinds)}")
    rows = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(4.6 * COLUMNS, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(result: Result, metric: str) -> Panel:
    values = medians(result, metric).items()
    bars = [(result["peers"][peer]["label"], value, is_ours(result, peer)) for peer, value in values]
    return Panel(f"{metric}, {unit_of(metric, result)}", bars)


def _draw_panel(axis, panel: Panel) -> None:  # type: ignore[no-untyped-def]
    ordered = sorted(panel.bars, key=lambda bar: bar[1], reverse=True)
    colours = [OURS if ours else THEIRS for _, _, ours in ordered]
    bars = axis.barh([label for label, _, _ in ordered], [value for _, value, _ in ordered], color=colours)
    axis.bar_label(bars, [format_figure(value) for _, value, _ in ordered], fontsize=7, padding=2)
    axis.set_title(panel.title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.margins(x=0.18)
    axis.spines[["top", "right"]].set_visible(False)


def is_ours(result: Result, peer: str) -> bool:
    """Whether a bar is accel's, in whatever variant."""
    return peer == subject_of(result) or result["peers"][peer].get("ours", False)


def unit_of(metric: str, result: Result) -> str:
    """The unit of one metric; the export suite measures seconds and megabytes."""
    if result["suite"] == "export":
        return "s" if metric.endswith("wall time") else "MB"
    return result["unit"]
