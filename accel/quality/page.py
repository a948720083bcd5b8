"""A quality report as one HTML page: pictures with tables beside them, no script, nothing loaded from outside."""

from __future__ import annotations

from pathlib import PurePath

from accel.inspection import html
from accel.inspection.svg import escape
from accel.inspection.wording import count, percent, size
from accel.manifest import EncoderFidelity, Quality, Quantization
from accel.quality import charts, wording
from accel.quality.records import Report, VariantReport

Known = list[tuple[str, Quality]]


def render_page(found: Report) -> str:
    """One page without any outside resource or script; every name in it is escaped."""
    known = [(item.name, item.quality) for item in found.variants if item.quality is not None]
    arch = found.arch
    tags = [arch.family, arch.kind, arch.task, *(f"{item.name}: {item.dtype}" for item in found.variants)]
    body = [html.header(f"{arch.architecture}: quality", found.source, found.path, tags), _cards(found, known)]
    body += [html.messages("alert", "Not measured", _missing(found)), _sizes(known), _likelihood(known)]
    body += [_encoders(known), _times(known), *map(_layers, found.variants), _method(found)]
    footer = f"Bundle written by accel {found.accel_version}. Sizes in decimal units."
    return html.document(f"{PurePath(found.path).name}: quality", body, footer)


def _missing(found: Report) -> list[str]:
    return [f"{item.name}: {item.missing}" for item in found.variants if item.missing is not None]


def _cards(found: Report, known: Known) -> str:
    cards = [(count(found.arch.parameters), f"parameters ({found.arch.parameters:,})")]
    others = [(name, quality) for name, quality in known if quality.greedy is not None or quality.encoder is not None]
    if known:
        cards.append((size(known[0][1].reference_size.bytes), "of weights that fp32 reads"))
    if others:
        name, quality = max(others, key=lambda item: item[1].byte_ratio)
        cards.append((f"{quality.byte_ratio:.2f} x", f"smaller: {name}, {size(quality.size.bytes)}"))
        phase = quality.timings[-1].name if quality.encoder is None else quality.timings[0].name
        times = [(item, wording.find_phase(other.timings, phase)) for item, other in known]
        best, timings = min(((item, t) for item, t in times if t is not None), key=lambda pair: pair[1].total)
        cards.append((f"{wording.milliseconds(timings.total)} ms", f"{phase}, {best}"))
    for _, quality in known[:1]:
        if quality.likelihood is not None:
            q = quality.likelihood
            cards += [(wording.number(q.reference_q, 3), "Q of fp32, per token"), (f"{q.tokens:,}", "tokens scored")]
    if others and others[0][1].encoder is not None:
        item = min((quality.encoder for _, quality in others if quality.encoder is not None), key=_cosine)
        cards.append((f"{item.cosine_mean:.4f}", "least mean cosine to fp32"))
        cards.append((f"{item.texts:,}", f"texts of {item.tokens:,} tokens"))
    return html.cards(cards)


def _cosine(item: EncoderFidelity) -> float:
    return item.cosine_mean


def _sizes(known: Known) -> str:
    losses = [item for name, quality in known if (item := _loss(name, quality)) is not None]
    rows = [
        (name, quality.engine, f"{quality.size.bytes:,}", f"{quality.byte_ratio:.2f}", f"{quality.number_ratio:.3f}",
         wording.bits_per_parameter(quality), percent(quality.size.bytes, quality.reference_size.bytes))
        for name, quality in known
    ]  # fmt: skip
    head = ("variant", "runs on", "bytes of weights", "CR bytes", "CR parameters", "bits per parameter", "of fp32's")
    table = html.table(head, rows, right=(2, 3, 4, 5, 6))
    decoder = any(quality.likelihood is not None for _, quality in known)
    what = "Loss is Q of fp32 less Q of the variant; whiskers are 95 % intervals."
    if not decoder:
        what = "Loss is 1 − cosine to fp32's outputs, its mean; whiskers reach to the worst text."
    note = f"{what} High and to the left is best; the ring is fp32. CR is bytes (or numbers) of fp32 by the variant's."
    drawn = charts.draw_tradeoff(losses, "loss, log scale") if losses else ""
    return html.section("Quality against size", note, drawn + table)


def _loss(name: str, quality: Quality) -> charts.Loss | None:
    likelihood, encoder, total = quality.likelihood, quality.encoder, quality.size.bytes
    if likelihood is not None:
        low, high = likelihood.interval or (likelihood.difference, likelihood.difference)
        return charts.Loss(name, total, -likelihood.difference, -high, -low, reference=quality.greedy is None)
    if encoder is not None:
        mean = 1 - encoder.cosine_mean
        return charts.Loss(name, total, mean, mean, 1 - encoder.cosine_min)
    return charts.Loss(name, total, 0.0, 0.0, 0.0, reference=True)


def _likelihood(known: Known) -> str:
    shown = [(name, quality) for name, quality in known if quality.likelihood is not None]
    if not shown:
        return ""
    rows, agreements, texts = [], [], wording.texts(shown)
    for name, quality in shown:
        likelihood, greedy = quality.likelihood, quality.greedy
        assert likelihood is not None
        cells = ["reference", "", "", ""]
        if greedy is not None:
            agreements.append((name, greedy))
            cells = [wording.signed(likelihood.difference), wording.span(likelihood.interval)]
            cells += [f"{100 * greedy.top1:.2f} %", f"{100 * greedy.prefix:.1f} % of {greedy.new_tokens}"]
        tokens = (f"{likelihood.tokens:,}", f"{likelihood.blocks:,}")
        on = (wording.number(likelihood.reference_q) if texts[name] else "", texts[name])
        figures = (wording.number(likelihood.q), wording.perplexity(likelihood.perplexity))
        rows.append((name, *figures, *cells, *tokens, *on))
    head = ("variant", "Q", "perplexity", "against fp32", "95 % interval", "same next token", "same beginning",
            "tokens", "blocks", "Q of fp32", "text measured")  # fmt: skip
    content = html.table(head, rows, right=tuple(range(1, len(head))))
    if agreements:
        keys = [("after", "same next token, the text before it given"), ("mlp", "same beginning of own greedy text")]
        content += "<h3>Greedy agreement with fp32</h3>" + charts.draw_agreement(agreements) + html.legend(keys)
    note = "Q = mean log p(y|x), natural logarithm per token; perplexity = exp(−Q)."
    return html.section("Likelihood and greedy tokens", note, content)


def _encoders(known: Known) -> str:
    shown = [(name, quality.encoder) for name, quality in known if quality.encoder is not None]
    if not shown:
        return ""
    rows, texts = [], wording.texts(known)
    for name, item in shown:
        rank = "" if item.rank_correlation is None else f"{item.rank_correlation:.5f} of {item.pairs:,} pairs"
        error = "" if item.logit_error is None else f"{item.logit_error:.2e}"
        labels = "" if item.label_agreement is None else f"{100 * item.label_agreement:.2f} % of {item.labels:,}"
        cosines = (f"{item.cosine_mean:.6f}", f"{item.cosine_min:.6f}")
        rows.append((name, *cosines, rank, error, labels, f"{item.texts:,}", f"{item.tokens:,}", texts[name]))
    head = ("variant", "cosine, mean", "least", "rank correlation", "logit error", "labels equal", "texts", "tokens",
            "text measured")  # fmt: skip
    note = f"Of {shown[0][1].output}, each text's against fp32's."
    return html.section("Fidelity", note, html.table(head, rows, right=tuple(range(1, len(head)))))


def _times(known: Known) -> str:
    content, rows = "", []
    for phase in wording.phase_names(known):
        found = [(name, quality, wording.find_phase(quality.timings, phase)) for name, quality in known]
        timed = [(name, quality, timings) for name, quality, timings in found if timings is not None]
        content += f"<h3>{escape(phase)}</h3>" + charts.draw_times(phase, [(name, item) for name, _, item in timed])
        for name, quality, item in timed:
            parts = (item.compute, item.prepost, item.system, item.total)
            rows.append((phase, name, *map(wording.milliseconds, parts), wording.time_share(quality, phase)))
    if not rows:
        return ""
    keys = [("compute", "T_c, compute"), ("prepost", "T_p, pre- and post-processing"), ("system", "T_s, system")]
    head = ("call", "variant", "T_c ms", "T_p ms", "T_s ms", "T_r ms", "of fp32's")
    table = html.details("Times as a table", html.table(head, rows, right=(2, 3, 4, 5, 6)))
    rounds = max(timings.rounds for _, quality in known for timings in quality.timings)
    machines = " and ".join(dict.fromkeys(quality.machine for _, quality in known))
    note = f"T_r = T_c + T_p + T_s, medians of {rounds} calls, on {machines}. Right: the three parts in ms."
    note += " Shares are of fp32's time in the variant's own run."
    return html.section("Time", note, content + html.legend(keys) + table)


def _layers(item: VariantReport) -> str:
    record = item.quantization
    if record is None or not record.layers:
        return ""
    facts = [wording.algorithm(record), wording.layer_groups(record)]
    facts.append(f"{size(record.bytes_before)} became {size(record.bytes_after)}")
    if record.calibration_sha256 is not None:
        facts.append(f"calibration text {record.calibration_sha256[:12]}")
    rows = [
        (layer.name, f"{layer.error:.5f}", str(layer.bits), str(layer.group) if layer.group else "row")
        for layer in sorted(record.layers, key=lambda layer: -layer.error)
    ]
    every = html.table(("layer", "error", "bits", "group"), rows, right=(1, 2, 3))
    table = html.details("Every layer, largest error first", every)
    keys = [("heat", f"relative error of the layer's {record.error_of}; full colour is the largest")]
    if len({layer.bits for layer in record.layers}) > 1:
        keys.append(("kept", "kept in more bits"))
    drawn = charts.draw_layers(item.name, record)
    content = drawn + html.legend(keys) + table + _kept(record)
    return html.section(f"Layers of {item.name}", "; ".join(facts) + ".", content)


def _kept(record: Quantization) -> str:
    """The layers that stayed float, and why."""
    if not record.kept:
        return ""
    rows = [(name, reason) for reason, names in wording.kept_layers(record).items() for name in names]
    return html.details("Layers in float", html.table(("layer", "why"), rows))


def _method(found: Report) -> str:
    lines = (*wording.notes(found), *wording.definitions(found))
    listed = "".join(f"<li>{escape(text)}</li>" for text in lines)
    return html.section("How it was measured", "", f'<ul class="formula">{listed}</ul>')


__all__ = ["render_page"]
