"""The quality report as tables on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

from accel.inspection.wording import count, printable, size
from accel.manifest import Quality
from accel.quality import wording
from accel.quality.records import Report, VariantReport

if TYPE_CHECKING:
    from rich.table import Table

WORST = 3  # layers of the largest error that are listed
WIDTH = 200  # of a report that is turned into a string


def print_report(found: Report, file: IO[str] | None = None, width: int | None = None) -> None:
    """Prints sizes, quality, times and rounded layers; what could not be measured, last."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, width=width, soft_wrap=width is None)
    arch = found.arch
    console.print(Text(printable(found.path), style="bold"))
    console.print(Text(f"{printable(arch.architecture)}, {arch.task}, {count(arch.parameters)} parameters"))
    known = [(item.name, item.quality) for item in found.variants if item.quality is not None]
    tables = [_sizes(found.variants), _likelihood(known), _encoders(known), _times(known), _layers(found.variants)]
    for table in tables:
        if table is not None and table.row_count:
            console.print()
            console.print(table)
    for line in wording.notes(found):
        console.print(Text(f"note: {line}", style="dim"))
    if found.saved:
        console.print(Text("What was measured is in the manifest now.", style="dim"))


def render_text(found: Report) -> str:
    """The same as a string without colours."""
    stream = io.StringIO()
    print_report(found, stream, WIDTH)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table; the first ``left`` columns hold words, the others numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(printable(cell)) for cell in cells))


def _sizes(variants: Iterable[VariantReport]) -> Table:
    table = _table("Variants", "variant", "runs on", "weights", "CR bytes", "CR parameters", "bits/parameter", left=2)
    for item in variants:
        quality = item.quality
        if quality is None:
            _row(table, item.name, "not measured", "-", "-", "-", "-")
            continue
        ratios = (f"{quality.byte_ratio:.2f}", f"{quality.number_ratio:.3f}", wording.bits_per_parameter(quality))
        _row(table, item.name, quality.engine, size(quality.size.bytes), *ratios)
    return table


def _likelihood(known: list[tuple[str, Quality]]) -> Table | None:
    shown = [(name, quality) for name, quality in known if quality.likelihood is not None]
    if not shown:
        return None
    columns = ("variant", "Q", "perplexity", "against fp32", "95 % interval", "tokens", "top-1", "greedy prefix")
    table = _table("Quality: Q = mean log p(y|x), per token", *columns)
    for name, quality in shown:
        likelihood, greedy = quality.likelihood, quality.greedy
        assert likelihood is not None
        difference = "reference" if greedy is None else wording.signed(likelihood.difference)
        agreement = ("-", "-")
        if greedy is not None:
            agreement = (f"{100 * greedy.top1:.2f} %", f"{100 * greedy.prefix:.1f} % of {greedy.new_tokens}")
        q = (wording.number(likelihood.q), wording.perplexity(likelihood.perplexity))
        _row(table, name, *q, difference, wording.span(likelihood.interval), f"{likelihood.tokens:,}", *agreement)
    return table


def _encoders(known: list[tuple[str, Quality]]) -> Table | None:
    shown = [(name, quality.encoder) for name, quality in known if quality.encoder is not None]
    if not shown:
        return None
    columns = ("variant", "cosine, mean", "least", "rank correlation", "logit error", "labels equal", "texts", "tokens")
    table = _table(f"Quality: {shown[0][1].output} against fp32", *columns)
    for name, item in shown:
        error = "-" if item.logit_error is None else f"{item.logit_error:.1e}"
        labels = "-" if item.label_agreement is None else f"{100 * item.label_agreement:.2f} % of {item.labels:,}"
        rank = "-" if item.rank_correlation is None else f"{item.rank_correlation:.5f} of {item.pairs:,}"
        cosines = (f"{item.cosine_mean:.5f}", f"{item.cosine_min:.5f}")
        _row(table, name, *cosines, rank, error, labels, f"{item.texts:,}", f"{item.tokens:,}")
    return table


def _times(known: list[tuple[str, Quality]]) -> Table:
    columns = ("call", "variant", "T_c", "T_p", "T_s", "T_r", "of fp32's")
    table = _table("Time in ms: T_r = T_c (compute) + T_p (pre- and post-processing) + T_s (system)", *columns, left=2)
    for phase in wording.phase_names(known):
        for name, quality in known:
            timings = wording.find_phase(quality.timings, phase)
            if timings is None:
                continue
            parts = (timings.compute, timings.prepost, timings.system, timings.total)
            _row(table, phase, name, *map(wording.milliseconds, parts), wording.time_share(quality, phase))
    return table


def _layers(variants: Iterable[VariantReport]) -> Table:
    columns = ("variant", "algorithm", "layers", "largest errors", "mean error", "bytes before", "after")
    table = _table("Rounded layers", *columns, left=4)
    for item in variants:
        record = item.quantization
        if record is None or not record.layers:
            continue
        worst = sorted(record.layers, key=lambda layer: -layer.error)[:WORST]
        listed = "; ".join(f"{layer.name} {layer.error:.4f}" for layer in worst)
        mean = f"{sum(layer.error for layer in record.layers) / len(record.layers):.4f} of {record.error_of}"
        sizes = (size(record.bytes_before), size(record.bytes_after))
        _row(table, item.name, wording.algorithm(record), wording.layer_groups(record), listed, mean, *sizes)
    return table


__all__ = ["print_report", "render_text"]
