"""A report's numbers as words, shared by the text and the page."""

from __future__ import annotations

from collections.abc import Iterable

from accel.inspection.wording import printable
from accel.manifest import Likelihood, PhaseTimings, Quality, Quantization
from accel.quality.measure import REFERENCE
from accel.quality.records import Report


def notes(found: Report) -> list[str]:
    """On what it was measured, with what, and what was not."""
    lines, alone = [], len(found.variants) == 1
    known = [(item.name, item.quality) for item in found.variants if item.quality is not None]
    mixed = len({(quality.text_sha256, quality.machine) for _, quality in known}) > 1
    for item in found.variants:
        quality = item.quality
        if item.missing is not None:
            lines.append(f"{printable(item.name)} was not measured: {printable(item.missing)}")
        if quality is None:
            continue
        if item.name != REFERENCE or alone:
            machine, engine = printable(quality.machine), printable(quality.reference_engine)
            whose = f"{printable(item.name)}: " if mixed else ""
            lines.append(f"{whose}{scope(quality)}; {machine}; fp32 on {engine}")
        if item.name != REFERENCE:
            lines.append(f"{printable(item.name)} on {printable(quality.engine)}")
        if not quality.size.exact:
            lines.append("sizes are those of the weight files: counting what a graph reads of them needs onnx")
    return list(dict.fromkeys(lines))


def scope(quality: Quality) -> str:
    """The text, and how much of it was measured."""
    name = f"text {printable(quality.text)} (sha256 {quality.text_sha256[:12]})"
    if quality.likelihood is not None:
        return f"{name}: {quality.likelihood.tokens:,} tokens in {quality.likelihood.blocks:,} blocks"
    encoder = quality.encoder
    if encoder is not None:
        pairs = f", {encoder.pairs:,} pairs" if encoder.pairs else ""
        return f"{name}: {encoder.texts:,} texts of {encoder.tokens:,} tokens{pairs}"
    return name


def texts(known: Iterable[tuple[str, Quality]]) -> dict[str, str]:
    """The text of each variant's measurement, where not all were measured on the same; else empty strings.

    Figures of different texts stand beside each other in one table then, and are not to be compared.
    """
    found = {name: (quality.text, quality.text_sha256) for name, quality in known}
    if len({sha256 for _, sha256 in found.values()}) < 2:
        return dict.fromkeys(found, "")
    return {name: f"{printable(text)} {sha256[:6]}" for name, (text, sha256) in found.items()}


def number(value: float | None, digits: int = 4) -> str:
    """Fixed digits, a true minus sign."""
    return "" if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """As ``number``, with a plus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def span(interval: tuple[float, float] | None, digits: int = 4) -> str:
    """An interval's ends."""
    return "" if interval is None else f"{signed(interval[0], digits)} to {signed(interval[1], digits)}"


def difference(likelihood: Likelihood) -> str:
    """What Q gained, with half the width of its 95 % interval."""
    gained, interval = signed(likelihood.difference), likelihood.interval
    return gained if interval is None else f"{gained} ± {(interval[1] - interval[0]) / 2:.4f}"


def perplexity(value: float) -> str:
    """Three digits after the point of small ones, none of large ones."""
    return f"{value:,.3f}" if value < 1e4 else f"{value:.2e}"


def milliseconds(seconds: float) -> str:
    """Enough digits to see microseconds where there are no more."""
    value = 1e3 * seconds
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def bits_per_parameter(quality: Quality) -> str:
    """Bits of weights that the engine reads, for each parameter of the model."""
    return f"{8 * quality.size.bytes / max(1, quality.reference_size.numbers):.2f}"


def time_share(quality: Quality, phase: str) -> str:
    """A call's time as a share of fp32's, where that is another measurement; else nothing."""
    ours, base = find_phase(quality.timings, phase), find_phase(quality.reference_timings, phase)
    if ours is None or base is None or ours == base or base.total <= 0:
        return ""
    return f"{ours.total / base.total:.2f}"


def algorithm(record: Quantization) -> str:
    """``gptq, 8,192 tokens``."""
    tokens = record.calibration_tokens
    return f"{record.algorithm}, {tokens:,} tokens" if tokens else record.algorithm


def layer_groups(record: Quantization) -> str:
    """``168 x 4 bits, groups of 32; 42 x 8 bits, per row; 2 in float``."""
    kinds: dict[tuple[int, int], int] = {}
    for layer in record.layers:
        kinds[layer.bits, layer.group] = kinds.get((layer.bits, layer.group), 0) + 1
    ordered = sorted(kinds.items())
    parts = [
        f"{number:,} x {bits} bits, {f'groups of {group}' if group else 'per row'}" for (bits, group), number in ordered
    ]
    return "; ".join([*parts, f"{len(record.kept):,} in float"] if record.kept else parts)


def kept_layers(record: Quantization) -> dict[str, list[str]]:
    """Why layers stay float -> their names."""
    found: dict[str, list[str]] = {}
    for name, reason in record.kept.items():
        found.setdefault(printable(reason), []).append(printable(name))
    return found


def phase_names(known: Iterable[tuple[str, Quality]]) -> list[str]:
    """Kinds of calls that were timed, in order."""
    return list(dict.fromkeys(timings.name for _, quality in known for timings in quality.timings))


def find_phase(timings: Iterable[PhaseTimings], name: str) -> PhaseTimings | None:
    """The record of one kind of call."""
    return next((item for item in timings if item.name == name), None)


def definitions(found: Report) -> list[str]:
    """What the figures mean."""
    lines = []
    if found.arch.kind == "decoder":
        lines += [
            "Q = mean log p(y|x): the natural logarithm of each token's probability given those before it, averaged "
            "over all tokens but each block's first. A block is a passage, or 512 tokens of a long one.",
            "The difference is paired per token. Its 95 % interval takes the tokens of a block as correlated: "
            "SE = sqrt(G/(G-1) sum_i (d_i - n_i D)^2) / N, with d_i the sum of differences over the n_i tokens of "
            "block i of G, N tokens in all, D the mean difference, and a t quantile with G-1 degrees of freedom.",
            "Same next token: share of the text's tokens before which both find the same token most probable.",
            "Same beginning: of the tokens that each model generates greedily after the same prompts, the share before "
            "the first that differs, mean over the prompts.",
        ]
    else:
        lines += [
            "Cosine: of each text's embedding (or all its logits) to fp32's. Rank correlation: Spearman's, between the "
            "similarities of text pairs under the variant and under fp32; equal values share their mean rank.",
            "Logit error: largest difference by the largest magnitude of fp32's logits. Labels: the best label of each "
            "text, token or masked place, or both ends of an answer.",
        ]
    lines += [
        "CR = N_original / N_compressed, of the bytes of weights that the engine reads (each once), and of parameters "
        "with the scales that were added.",
        "T_c is inside the engine; T_p tokenizes, builds inputs and chooses tokens; T_s is the rest of the call. "
        "Shares are of fp32's time as it was measured with the variant, one after the other.",
    ]
    return lines


__all__ = [
    "algorithm",
    "bits_per_parameter",
    "definitions",
    "difference",
    "find_phase",
    "kept_layers",
    "layer_groups",
    "milliseconds",
    "notes",
    "number",
    "perplexity",
    "phase_names",
    "scope",
    "signed",
    "span",
    "texts",
    "time_share",
]
