"""The quality report as tables on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

from accel.inspection.wording import count, printable, size
from accel.manifest import Quality
from accel.quality import wording
from accel.quality.records import Report, VariantReport

if TYPE_CHECKING:
    from rich.table import Table

Known = list[tuple[str, Quality]]
WORST = 3  # layers of the largest error that are listed
KEPT = 6  # layers in float that are listed for each reason
WIDTH = 120  # of a report that is turned into a string


def print_report(found: Report, file: IO[str] | None = None, width: int | None = None) -> None:
    """Prints sizes, quality, times and rounded layers; what could not be measured, last."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, width=width)
    arch = found.arch
    console.print(Text(printable(found.path), style="bold"))
    console.print(Text(f"{printable(arch.architecture)}, {arch.task}, {count(arch.parameters)} parameters"))
    known = [(item.name, item.quality) for item in found.variants if item.quality is not None]
    for table in (_sizes(found.variants), _likelihood(known), _encoders(known), _times(known)):
        if table is not None and table.row_count:
            console.print()
            console.print(table)
    layers = [line for item in found.variants for line in _layers(item)]
    if layers:
        console.print(Text("\nRounded layers", style="bold"))
    for line in layers:
        console.print(Text(line))
    lines = [f"note: {line}" for line in wording.notes(found)]
    lines += ["What was measured is in the manifest now."] if found.saved else []
    console.print(Text("\n".join(["", *lines]), style="dim"))


def render_text(found: Report) -> str:
    """The same as a string without colours."""
    stream = io.StringIO()
    print_report(found, stream, WIDTH)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table without the columns that are empty throughout; the first ``left`` ones hold words, the others numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    shown = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    for index in shown:
        table.add_column(columns[index], justify="left" if index < left else "right", no_wrap=index < left)
    for row in rows:
        table.add_row(*(Text(printable(row[index])) for index in shown))
    return table


def _sizes(variants: Iterable[VariantReport]) -> Table:
    rows = []
    for item in variants:
        quality = item.quality
        if quality is None:
            rows.append((item.name, "not measured", "", "", "", ""))
            continue
        ratios = (f"{quality.byte_ratio:.2f}", f"{quality.number_ratio:.3f}", wording.bits_per_parameter(quality))
        rows.append((item.name, quality.engine.partition(" ")[0], size(quality.size.bytes), *ratios))
    columns = ("variant", "runs on", "weights", "CR bytes", "CR parameters", "bits each")
    return _table("Variants", columns, rows, left=2)


def _likelihood(known: Known) -> Table | None:
    rows, texts = [], wording.texts(known)
    for name, quality in known:
        likelihood, greedy = quality.likelihood, quality.greedy
        if likelihood is None:
            continue
        cells = ["reference", "", ""]
        if greedy is not None:
            cells = [wording.difference(likelihood), f"{100 * greedy.top1:.2f} %", f"{100 * greedy.prefix:.1f} %"]
        on = (wording.number(likelihood.reference_q) if texts[name] else "", texts[name])
        rows.append((name, wording.number(likelihood.q), wording.perplexity(likelihood.perplexity), *cells, *on))
    columns = ("variant", "Q", "perplexity", "Q − fp32's (95 %)", "top-1", "prefix", "fp32's Q", "text measured")
    return _table("Q = mean log p(y|x) per token; top-1 and prefix: tokens chosen as by fp32", columns, rows)


def _encoders(known: Known) -> Table | None:
    rows, texts = [], wording.texts(known)
    for name, quality in known:
        item = quality.encoder
        if item is None:
            continue
        error = "" if item.logit_error is None else f"{item.logit_error:.1e}"
        labels = "" if item.label_agreement is None else f"{100 * item.label_agreement:.2f} %"
        rank = "" if item.rank_correlation is None else f"{item.rank_correlation:.5f}"
        rows.append((name, f"{item.cosine_mean:.5f}", f"{item.cosine_min:.5f}", rank, error, labels, texts[name]))
    columns = ("variant", "cosine, mean", "least", "rank correlation", "logit error", "same labels", "text measured")
    return _table("Quality: outputs against fp32's", columns, rows)


def _times(known: Known) -> Table:
    rows = []
    for phase in wording.phase_names(known):
        for name, quality in known:
            timings = wording.find_phase(quality.timings, phase)
            if timings is not None:
                parts = (timings.compute, timings.prepost, timings.system, timings.total)
                rows.append((phase, name, *map(wording.milliseconds, parts), wording.time_share(quality, phase)))
    columns = ("call", "variant", "T_c", "T_p", "T_s", "T_r", "of fp32*")
    title = "Time in ms: T_r = T_c (compute) + T_p (pre, post) + T_s (system); *: of fp32's time in the same run"
    return _table(title, columns, rows, left=2)


def _layers(item: VariantReport) -> list[str]:
    record = item.quantization
    if record is None or not record.layers:
        return []
    worst = sorted(record.layers, key=lambda layer: -layer.error)[:WORST]
    mean = sum(layer.error for layer in record.layers) / len(record.layers)
    sizes = f"{size(record.bytes_before)} became {size(record.bytes_after)}"
    head = f"{printable(item.name)}: {printable(wording.algorithm(record))}; {wording.layer_groups(record)}; {sizes}"
    lines = [head, f"  error of the {record.error_of}: mean {mean:.4f}; the largest:"]
    lines += [f"    {layer.error:.4f}  {printable(layer.name)}" for layer in worst]
    return lines + [f"  in float ({reason}): {_some(names)}" for reason, names in wording.kept_layers(record).items()]


def _some(names: Sequence[str]) -> str:
    more = len(names) - KEPT
    return ", ".join(names[:KEPT]) + (f" and {more} more" if more > 0 else "")


__all__ = ["print_report", "render_text"]
