"""An inspection as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accel.inspection import wording
from accel.inspection.report import CacheReport, GraphReport, Inspection, WeightReport, WeightShare
from accel.manifest import ParityResult

MAX_OPERATORS = 12  # operators listed on their own; the rest is summed up


def render_text(found: Inspection) -> str:
    """Every section, with a blank line between; characters that could steer a terminal are spelled out."""
    lost = [["Lost files", *_bullets(wording.lost(found))]] if found.lost else []
    sections = [_head(found), *lost, *(_graph(graph, found.graphs) for graph in found.graphs)]
    sections += [_weights(report) for report in found.weights]
    if found.cache is not None:
        sections.append(_cache(found.cache))
    sections += [_parity(found.parity), _files(found)]
    versions = [(wording.printable(name), wording.printable(version)) for name, version in found.versions.items()]
    sections.append(["Versions at export", *_table([("accel", wording.printable(found.accel_version)), *versions])])
    sections += [["Notes of the export", *_bullets(found.notes)]] if found.notes else []
    sections += [["Warnings", *_bullets(found.warnings)]] if found.warnings else []
    sections += [["Not shown", *_bullets(found.left_out)]] if found.left_out else []
    return "\n\n".join("\n".join(section) for section in sections)


def _head(found: Inspection) -> list[str]:
    arch = found.arch
    variants = ", ".join(map(wording.printable, wording.variants(found, "{} ({})")))
    tied = "; ".join(f"{wording.printable(a)} is {wording.printable(b)}" for a, b in found.tied.items())
    rows = [
        ("source", wording.printable(found.source)),
        ("architecture", f"{wording.printable(arch.architecture)} ({wording.printable(arch.family)}, {arch.kind})"),
        ("task", arch.task),
        ("parameters", f"{arch.parameters:,}"),
        ("layers", f"{len(arch.layers)} of width {arch.hidden_size:,}"),
        ("vocabulary", f"{arch.vocab_size:,}"),
        ("positions", f"{arch.max_positions:,}"),
        ("variants", variants),
        ("tied", tied or "nothing"),
        ("schema", str(found.schema_version)),
    ]
    return [wording.printable(found.path), *_table(rows)]


def _graph(graph: GraphReport, graphs: Sequence[GraphReport]) -> list[str]:
    title = f"Graph {graph.variant}/{graph.target}: {graph.file}, {wording.size(graph.size)}, opset {graph.opset}"
    lines = [wording.printable(title)]
    if graph.passes:
        rows = []
        base = wording.base_of(graph, graphs)
        if base is not None and base.passes:
            name = f"as {wording.printable(base.target)}"
            rows.append((name, f"{base.passes[0].nodes_before:,}", f"{base.passes[-1].nodes_after:,}", "", ""))
        for item in graph.passes[0 if base is None else len(base.passes) :]:
            notes = "; ".join(wording.printable(note) for note in item.notes)
            nodes = (f"{item.nodes_before:,}", f"{item.nodes_after:,}")
            rows.append((wording.printable(item.name), *nodes, wording.fused(item), notes))
        lines += _table(rows, ("pass", "nodes before", "after", "fused", "notes"), right=(1, 2))
    lines += ["", *_attention(graph), ""]
    if graph.nodes is not None:
        lines += [*_operators(graph), ""]
    for title, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        lines += _table(wording.merge_layers(specs), (title, "dtype", "shape"))
    return lines


def _attention(graph: GraphReport) -> list[str]:
    rows = []
    for numbers, layer in wording.kinds(graph):
        heads = f"{layer.heads}/{layer.kv_heads} x {layer.head_dim}"
        softcap = "none" if layer.softcap is None else f"{layer.softcap:g}"
        rotary, packed = layer.rotary or "not read", wording.yes_no(layer.packed_qkv)
        rows.append(
            (wording.span(numbers), wording.kernel(layer), heads, wording.mask(layer), softcap, f"{layer.scale:.6g}",
             rotary, packed)
        )  # fmt: skip
    return _table(rows, ("layers", "attention node", "heads/kv x size", "sees", "softcap", "scale", "rotary", "packed"))


def _operators(graph: GraphReport) -> list[str]:
    nodes = graph.nodes
    assert nodes is not None
    items = list(nodes.operators.items())
    rows = [(wording.printable(name), f"{number:,}") for name, number in items[:MAX_OPERATORS]]
    if len(items) > MAX_OPERATORS:
        rest = items[MAX_OPERATORS:]
        rows.append((f"{len(rest)} other operators", f"{sum(number for _, number in rest):,}"))
    inner = f", {nodes.inner:,} in branches" if nodes.inner else ""
    functions = f", {nodes.functions} function bodies" if nodes.functions else ""
    head = f"{nodes.top:,} nodes{inner}{functions}, {wording.size(nodes.inline_bytes)} of constants inside"
    return [f"  {head}", *_table(rows, right=(1,))]


def _weights(report: WeightReport) -> list[str]:
    whole = report.referenced_bytes
    padding = report.file_bytes - whole
    title = f"Weights {report.variant}: {', '.join(report.files)}, {report.file_bytes:,} bytes ({padding:,} unused)"

    def row(name: str, share: WeightShare) -> tuple[str, ...]:
        percent = wording.percent(share.bytes, whole)
        return (wording.printable(name), f"{share.tensors:,}", f"{share.elements:,}", f"{share.bytes:,}", percent)

    lines = [wording.printable(title)]
    for head, shares in (("format", report.formats), ("part", report.parts)):
        rows = [row(name, share) for name, share in shares.items()]
        lines += _table(rows, (head, "tensors", "elements", "bytes", "share"), right=(1, 2, 3, 4))
    return lines


def _cache(cache: CacheReport) -> list[str]:
    kinds: dict[tuple[int | str, ...], list[int]] = {}
    for index, dimensions in enumerate(cache.shapes):
        kinds.setdefault(dimensions, []).append(index)
    rows = [(wording.span(numbers), wording.shape(dimensions)) for dimensions, numbers in kinds.items()]
    lines = [f"Cache: {wording.printable(cache.dtype)}, {cache.bytes_per_token:,} bytes per token of a row"]
    lines += [f"  {note}" for note in wording.cache_kinds(cache)]
    lines += _table(rows, ("layers", "keys and values, each"))
    sizes = [(f"{row.capacity:,}", f"{row.bytes:,}", wording.size(row.bytes)) for row in cache.rows]
    return [*lines, *_table(sizes, ("capacity", "bytes per row", ""), right=(0, 1))]


def _parity(parity: dict[str, ParityResult]) -> list[str]:
    rows = []
    for name, result in parity.items():
        greedy = "-"
        if result.greedy_tokens_total is not None:
            greedy = f"{result.greedy_tokens_equal or 0:,} of {result.greedy_tokens_total:,}"
        rows.append(
            (wording.printable(name), wording.printable(result.reference), str(result.cases),
             f"{result.max_rel_error:.2e}", f"{result.limit:.0e}", f"{result.max_abs_error:.2e}", greedy)
        )  # fmt: skip
    if not rows:
        return ["Parity: not checked at export"]
    head = ("graph", "reference", "cases", "relative error", "limit", "absolute error", "greedy tokens equal")
    return ["Parity at export", *_table(rows, head, right=(2, 3, 4, 5, 6))]


def _files(found: Inspection) -> list[str]:
    missing = found.missing
    rows = [
        (wording.printable(file.name), f"{file.size:,}", file.sha256[:12], "missing" if file.name in missing else "")
        for file in found.files
    ]
    total = sum(file.size for file in found.files if file.name not in missing)
    return [f"Files: {total:,} bytes", *_table(rows, ("file", "bytes", "sha256", ""), right=(1,))]


def _bullets(items: Sequence[str]) -> Iterator[str]:
    return (f"  - {wording.printable(item)}" for item in items)


def _table(
    rows: Sequence[tuple[str, ...]], head: tuple[str, ...] | None = None, right: tuple[int, ...] = ()
) -> list[str]:
    """Aligned columns, indented; columns that are empty throughout are dropped."""
    if not rows:
        return []
    columns = [index for index in range(len(rows[0])) if any(row[index] for row in rows)]
    lines = [head, *rows] if head else list(rows)
    widths = {index: max(len(line[index]) for line in lines) for index in columns}
    return [
        "  "
        + "  ".join(
            line[index].rjust(widths[index]) if index in right else line[index].ljust(widths[index])
            for index in columns
        ).rstrip()
        for line in lines
    ]


__all__ = ["render_text"]
