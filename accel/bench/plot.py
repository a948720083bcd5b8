"""Results as one PNG: a panel per metric, a bar per peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accel.bench.report import Result, format_figure, medians, metrics_of, subject_of
from accel.errors import DependencyError

OURS, THEIRS = "#c2410c", "#94a3b8"
COLUMNS = 4


def plot_results(results: Sequence[Result], path: Path) -> None:
    """Draws all metrics of all results, fastest peer first.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise DependencyError("plotting needs matplotlib", remedy="pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(result, metric) for result in results for metric in metrics_of(result)]
    rows = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(4.6 * COLUMNS, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (result, metric) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, result, metric)
    machine = results[0]["machine"]
    run = f"{results[0]['settings']['threads']} threads, {results[0]['date']}"
    figure.suptitle(f"{machine['cpu']}, {run}; medians, lower is better", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_panel(axis, result: Result, metric: str) -> None:  # type: ignore[no-untyped-def]
    values = sorted(medians(result, metric).items(), key=lambda item: item[1], reverse=True)
    labels = [result["peers"][peer]["label"] for peer, _ in values]
    bars = axis.barh(
        labels, [value for _, value in values], color=[OURS if is_ours(result, peer) else THEIRS for peer, _ in values]
    )
    axis.bar_label(bars, [format_figure(value) for _, value in values], fontsize=7, padding=2)
    axis.set_title(f"{metric}, {unit_of(metric, result)}", fontsize=9)
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
