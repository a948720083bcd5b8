"""An inspection as one HTML page: pictures with tables beside them, no script, nothing loaded from outside."""

from __future__ import annotations

from pathlib import PurePath

from accel.inspection import charts, html, wording
from accel.inspection.report import GraphReport, Inspection, WeightReport
from accel.inspection.svg import escape


def render_page(found: Inspection) -> str:
    """One page without any outside resource or script; every name in it is escaped."""
    body = [_header(found), _cards(found), _messages(found), *_passes(found), _attention(found)]
    body += [_operators(found), *map(_weights, found.weights), _cache(found), _parity(found)]
    body += [*map(_io, found.graphs), _files(found)]
    footer = f"Bundle written by accel {found.accel_version}, schema {found.schema_version}. Sizes in decimal units."
    return html.document(f"{PurePath(found.path).name}: bundle", body, footer)


def _header(found: Inspection) -> str:
    arch = found.arch
    tags = [arch.family, arch.kind, arch.task, *wording.variants(found, "{}: {}")]
    tags += [f"{shared} is {owner}" for shared, owner in found.tied.items()]
    return html.header(arch.architecture, found.source, found.path, tags)


def _cards(found: Inspection) -> str:
    arch = found.arch
    cards = [(wording.count(arch.parameters), f"parameters ({arch.parameters:,})")]
    cards += [(wording.size(item.file_bytes), f"of weights, {item.variant}") for item in found.weights]
    cards.append((str(len(arch.layers)), f"layers of width {arch.hidden_size:,}"))
    chains = [graph for graph in _ends(found) if graph.passes]
    for graph in chains[:2]:
        nodes = f"{graph.passes[0].nodes_before:,} → {graph.passes[-1].nodes_after:,}"
        cards.append((nodes, f"nodes, traced to {graph.target}"))
    if found.cache is not None:
        cards.append((wording.size(found.cache.bytes_per_token), "of cache per token"))
    for name, result in list(found.parity.items())[:1]:
        cards.append((f"{result.max_rel_error:.1e}", f"relative error of {name}"))
    cards += [(f"{arch.max_positions:,}", "positions"), (f"{arch.vocab_size:,}", "tokens in the vocabulary")]
    return html.cards(cards)


def _messages(found: Inspection) -> str:
    blocks = (
        ("alert", "Lost files", wording.lost(found)),
        ("alert", "Warnings", found.warnings),
        ("hint", "Notes of the export", found.notes),
        ("hint", "Not shown", found.left_out),
    )
    return "".join(html.messages(kind, title, items) for kind, title, items in blocks)


def _ends(found: Inspection) -> list[GraphReport]:
    """Graphs that no other graph's passes build upon."""
    bases = [wording.base_of(graph, found.graphs) for graph in found.graphs]
    return [graph for graph in found.graphs if not any(graph is base for base in bases)]


def _passes(found: Inspection) -> list[str]:
    sections = []
    for graph in _ends(found):
        if not graph.passes:
            continue
        rows = [
            (item.name, f"{item.nodes_before:,}", f"{item.nodes_after:,}", wording.fused(item), "; ".join(item.notes))
            for item in graph.passes
        ]
        table = html.table(("pass", "nodes before", "nodes after", "fused", "notes"), rows, right=(1, 2))
        keys = [("after", "nodes after the pass"), ("ghost", "removed"), ("grown", "after a pass that adds nodes")]
        drawn = charts.draw_passes(graph, wording.base_of(graph, found.graphs))
        content = drawn + html.legend([*keys, ("same", "no change")]) + html.details("Passes as a table", table)
        note = f"Graph nodes of {graph.variant}/{graph.target}, from the trace through each pass; what it fused, right."
        sections.append(html.section("Nodes per pass", note, content))
    return sections


def _attention(found: Inspection) -> str:
    shown = [graph for graph in found.graphs if graph.attention]
    if not shown:
        return ""
    rows = []
    for graph in shown:
        for numbers, layer in wording.kinds(graph):
            softcap = "none" if layer.softcap is None else f"{layer.softcap:g}"
            heads = f"{layer.heads} / {layer.kv_heads} x {layer.head_dim}"
            kernel = (wording.kernel(layer), heads, wording.mask(layer), softcap, f"{layer.scale:.6g}")
            state = (layer.rotary or "not read", wording.yes_no(layer.packed_qkv))
            rows.append((f"{graph.variant}/{graph.target}", wording.span(numbers), *kernel, *state))
    head = ("graph", "layers", "node", "heads / kv x size", "sees", "softcap", "scale", "rotary", "packed QKV")
    layers = shown[0].attention
    keys = [("full", "every key" + (" up to the query" if layers[0].causal else ""))]
    keys += [("window", "sliding window")] if any(layer.window is not None for layer in layers) else []
    keys += [("softcap", "softcap")] if any(layer.softcap is not None for layer in layers) else []
    note = "One tile per layer: rows are queries, columns are keys, filled where a query sees a key."
    return html.section("Attention", note, charts.draw_layers(shown[0]) + html.legend(keys) + html.table(head, rows))


def _operators(found: Inspection) -> str:
    shown = [graph for graph in found.graphs if graph.nodes is not None]
    if not shown:
        return ""
    blocks = []
    for graph in shown:
        nodes = graph.nodes
        assert nodes is not None
        inner = f", {nodes.inner:,} in branches" if nodes.inner else ""
        functions = f", {nodes.functions} function bodies" if nodes.functions else ""
        title = f"{escape(graph.variant)}/{escape(graph.target)}"
        note = f"{nodes.top:,} nodes{inner}{functions}; {wording.size(nodes.inline_bytes)} of constants in the file"
        rows = [(name, f"{number:,}") for name, number in nodes.operators.items()]
        table = html.details("All operators", html.table(("operator", "nodes"), rows, right=(1,)))
        blocks.append(f'<div><h3>{title}</h3><p class="note">{note}</p>{charts.draw_operators(graph)}{table}</div>')
    return html.section("Operators", "How often each operator occurs in the graph files.", html.columns(blocks))


def _weights(report: WeightReport) -> str:
    whole = report.referenced_bytes
    columns = []
    for kind, shares in (("part", report.parts), ("format", report.formats)):
        rows = [
            (name, f"{share.tensors:,}", f"{share.elements:,}", f"{share.bytes:,}", wording.percent(share.bytes, whole))
            for name, share in shares.items()
        ]
        head = (kind, "tensors", "elements", "bytes", "share")
        columns.append(f"<div>{html.table(head, rows, right=(1, 2, 3, 4))}</div>")
    tensors = [
        (item.name, item.part, item.dtype, f"{item.share.tensors:,}", f"{item.share.elements:,}",
         f"{item.share.bytes:,}", wording.percent(item.share.bytes, whole))
        for item in report.groups
    ]  # fmt: skip
    names = ("tensors (* is the layer)", "part", "format", "count", "elements", "bytes", "share")
    details = html.details("Every tensor", html.table(names, tensors, right=(3, 4, 5, 6)))
    unused = report.file_bytes - whole
    note = f"{', '.join(report.files)}: {report.file_bytes:,} bytes, {unused:,} of them unused. Areas are bytes."
    legend = html.legend([(part, part) for part in report.parts])
    content = charts.draw_weights(report) + legend + html.columns(columns) + details
    return html.section(f"Weights of {report.variant}", note, content)


def _cache(found: Inspection) -> str:
    cache = found.cache
    if cache is None:
        return ""
    kinds: dict[tuple[int | str, ...], list[int]] = {}
    for index, dimensions in enumerate(cache.shapes):
        kinds.setdefault(dimensions, []).append(index)
    shapes = [(wording.span(numbers), wording.shape(dimensions)) for dimensions, numbers in kinds.items()]
    sizes = [(f"{row.capacity:,}", f"{row.bytes:,}", wording.size(row.bytes)) for row in cache.rows]
    columns = [
        html.table(("capacity", "bytes per row", ""), sizes, right=(0, 1, 2)),
        html.table(("layers", "keys and values, each"), shapes),
    ]
    weights = found.weights[0].file_bytes if found.weights else 0
    note = f"{cache.dtype}, {cache.bytes_per_token:,} bytes per token of a row; the dashed line is the weights' size."
    note += "".join(f" {said}." for said in wording.cache_kinds(cache))
    return html.section("KV cache", note, charts.draw_cache(cache, weights) + html.columns(columns))


def _parity(found: Inspection) -> str:
    if not found.parity:
        return ""
    rows = []
    for name, item in found.parity.items():
        total = item.greedy_tokens_total
        greedy = "-" if total is None else f"{item.greedy_tokens_equal or 0:,} of {total:,}"
        errors = (f"{item.max_rel_error:.2e}", f"{item.limit:.0e}", f"{item.max_abs_error:.2e}")
        rows.append((name, item.reference, f"{item.cases:,}", *errors, greedy))
    head = ("graph", "reference", "cases", "relative error", "limit", "absolute error", "greedy tokens equal")
    note = "Measured at export on random ids, relative to the largest reference value; the dashed line is the limit."
    table = html.table(head, rows, right=(2, 3, 4, 5, 6))
    return html.section("Parity", note, charts.draw_parity(found.parity) + table)


def _io(graph: GraphReport) -> str:
    columns = [
        f"<div>{html.table((kind, 'dtype', 'shape'), wording.merge_layers(specs))}</div>"
        for kind, specs in (("input", graph.inputs), ("output", graph.outputs))
    ]
    note = f"{graph.file}, {graph.size:,} bytes, opset {graph.opset}. Letters are sizes that vary."
    return html.section(f"Inputs and outputs of {graph.variant}/{graph.target}", note, html.columns(columns))


def _files(found: Inspection) -> str:
    missing = found.missing
    files = [
        (file.name, f"{file.size:,}", "missing" if file.name in missing else file.sha256[:16]) for file in found.files
    ]
    versions = list(found.versions.items())
    columns = [
        f"<div>{html.table(('file', 'bytes', 'sha256'), files, right=(1,))}</div>",
        f"<div>{html.table(('package', 'version at export'), versions)}</div>",
    ]
    total = sum(file.size for file in found.files if file.name not in missing)
    return html.section("Files and versions", f"{len(files)} files, {total:,} bytes.", html.columns(columns))


__all__ = ["render_page"]
