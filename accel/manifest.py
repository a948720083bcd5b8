"""The bundle's manifest as frozen dataclasses; ``accel.schema`` reads and writes them as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from accel.spec import ArchSpec, ProfileRanges, TensorSpec

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file, keyed in the manifest by its path inside the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class PassReport:
    """What one graph pass did: node totals around it and what it fused, by name."""

    name: str
    nodes_before: int
    nodes_after: int
    fused: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphEntry:
    """One graph file of a variant.

    ``lowering`` is the version of the target's lowering that wrote it; None where the target has none, or the bundle
    was written before versions were recorded. Such a TensorRT graph counts as outdated. ``weights`` are the files that
    the graph reads; None where that was not recorded: see ``Bundle.weights``.
    """

    file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attention_nodes: tuple[str, ...]  # node names, one per layer, in layer order
    passes: tuple[PassReport, ...] = ()
    lowering: int | None = None
    weights: tuple[str, ...] | None = None


@dataclass(frozen=True)
class QuantizedLayer:
    """One weight that was rounded to integers.

    Attributes:
        name: The parameter, or the layer it belongs to.
        bits: Of each value.
        group: Input channels that share a scale; 0: one scale per output row.
        error: Relative to what was rounded, ``|| x - q(x) || / || x ||`` (Frobenius); ``Quantization.error_of`` says x.
    """

    name: str
    bits: int
    group: int
    error: float


@dataclass(frozen=True)
class Quantization:
    """How a variant's integers came about.

    Attributes:
        scheme: The variant's name in canonical form, see ``accel.scheme``.
        algorithm: ``rtn``, ``gptq``, ``awq``, ``smoothquant`` and the like.
        calibration_sha256: Of the calibration text; None: none was needed.
        calibration_tokens: Its length.
        layers: In the graph's order.
        bytes_before, bytes_after: Of these layers' weights, scales included.
        scales: Numbers that were added to describe the integers.
        error_of: What ``QuantizedLayer.error`` compares: the layers' weights, or their outputs on the calibration text.
        kept: Matrices that stayed float -> why; empty too where an older accel did not record them.
    """

    scheme: str
    algorithm: str
    calibration_sha256: str | None
    calibration_tokens: int
    layers: tuple[QuantizedLayer, ...]
    bytes_before: int
    bytes_after: int
    scales: int = 0
    error_of: Literal["weights", "outputs"] = "weights"
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PhaseTimings:
    """Where the time of one kind of call goes, in seconds: ``T_r = T_c + T_p + T_s``, medians over ``rounds``.

    Attributes:
        name: What was run, such as ``prefill of 128 tokens``.
        compute: T_c, inside the engine.
        prepost: T_p, tokenizing, building inputs, choosing tokens.
        system: T_s, everything else.
    """

    name: str
    compute: float
    prepost: float
    system: float
    rounds: int

    @property
    def total(self) -> float:
        """The three together."""
        return self.compute + self.prepost + self.system


@dataclass(frozen=True)
class Likelihood:
    """``Q = mean log p(y|x)``, natural logarithm, per token, of a variant and of the fp32 reference on one text.

    Attributes:
        q, reference_q: The two means.
        difference: ``q - reference_q``; negative where the variant is worse.
        interval: 95 % confidence interval of ``difference``; None with too few blocks. See
            ``accel.quality.statistics.paired_difference``.
        tokens: Tokens that were scored: all but each block's first.
        blocks: Passages, or windows of long ones; the tokens of one are correlated, blocks are taken to be independent.
    """

    q: float
    reference_q: float
    difference: float
    interval: tuple[float, float] | None
    tokens: int
    blocks: int

    @property
    def perplexity(self) -> float:
        """``exp(-Q)``; infinity beyond what a float holds."""
        return math.exp(-self.q) if self.q > -700 else math.inf

    @property
    def reference_perplexity(self) -> float:
        return math.exp(-self.reference_q) if self.reference_q > -700 else math.inf


@dataclass(frozen=True)
class GreedyAgreement:
    """How often a variant takes the token that fp32 takes.

    Attributes:
        top1: Share of the text's tokens before which both find the same next token most probable (teacher forcing:
            both read the text itself).
        prefix: Share of the tokens generated greedily, each model after its own, that come before the first one
            that differs, mean over the prompts.
        prompts: Prompts continued.
        new_tokens: Tokens generated after each.
    """

    top1: float
    prefix: float
    prompts: int
    new_tokens: int


@dataclass(frozen=True)
class EncoderFidelity:
    """How near a variant's outputs are to fp32's.

    Attributes:
        output: ``embeddings``, or ``logits`` of a task head.
        texts: Texts (or pairs of texts) that were compared.
        tokens: In all of them, special ones included.
        cosine_mean, cosine_min: Cosine of each text's output to the reference's.
        rank_correlation: Spearman's, of the similarities (or single scores) of ``pairs`` pairs; None: there are none.
        pairs: Pairs of texts.
        logit_error: ``max |a - b| / max |b|`` over all logits; None for embeddings.
        label_agreement: Share of ``labels`` decisions that are the same; None where nothing is decided.
        labels: Decisions: texts, tokens, masked places, or both ends of answers.
    """

    output: Literal["embeddings", "logits"]
    texts: int
    tokens: int
    cosine_mean: float
    cosine_min: float
    rank_correlation: float | None = None
    pairs: int = 0
    logit_error: float | None = None
    label_agreement: float | None = None
    labels: int = 0


@dataclass(frozen=True)
class StoredSize:
    """What an engine reads of a variant.

    Attributes:
        bytes: Weights, each byte once.
        numbers: Parameters and the scales that describe integers.
        exact: Whether ``bytes`` were counted in the graph; else they are the sizes of its weight files.
    """

    bytes: int
    numbers: int
    exact: bool = True


@dataclass(frozen=True)
class Quality:
    """What a variant costs and gains against the bundle's fp32, measured through the engines that run them.

    Attributes:
        engine, reference_engine: Name, version, device and threads of what ran.
        machine: The processor.
        text: ``built-in``, or the text's name; ``text_sha256`` of its passages.
        likelihood, greedy: Decoders.
        encoder: Encoders.
        size, reference_size: For the compression ratio ``CR = N_original / N_compressed``.
        timings, reference_timings: By phase; both measured on this machine, one after the other.
    """

    engine: str
    reference_engine: str
    machine: str
    text: str
    text_sha256: str
    size: StoredSize
    reference_size: StoredSize
    likelihood: Likelihood | None = None
    greedy: GreedyAgreement | None = None
    encoder: EncoderFidelity | None = None
    timings: tuple[PhaseTimings, ...] = ()
    reference_timings: tuple[PhaseTimings, ...] = ()

    @property
    def byte_ratio(self) -> float:
        """CR in bytes."""
        return self.reference_size.bytes / max(1, self.size.bytes)

    @property
    def number_ratio(self) -> float:
        """CR in parameters: at most 1 for what is only rounded, since scales are added."""
        return self.reference_size.numbers / max(1, self.size.numbers)


@dataclass(frozen=True)
class Variant:
    """One precision of the model: its weight files and one graph per target.

    ``graphs`` maps a target (``canonical``, ``ort-cpu``) to its graph. The graphs of a variant share its weight files:
    what the graph of one target has stored, that of the next one reads there. Files of other variants that a graph
    reads are listed with the graph alone. ``quality`` is None where it was not measured, ``quantization`` where nothing
    was rounded to integers.
    """

    dtype: str
    weights: tuple[str, ...]
    graphs: dict[str, GraphEntry]
    quality: Quality | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True)
class ParameterEntry:
    """Where one parameter of the PyTorch model lies, in PyTorch's own layout."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ParityResult:
    """One comparison made at export, on random ids.

    Errors are relative to the largest reference magnitude: ``max|a - b| / max|b|``.

    ``longest`` is the longest row in tokens: a window that is longer was not seen to act.
    """

    reference: str  # e.g. "torch eager fp32"
    cases: int
    max_abs_error: float
    max_rel_error: float
    limit: float
    greedy_tokens_equal: int | None = None
    greedy_tokens_total: int | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know before it opens a graph."""

    schema_version: int
    accel_version: str
    source: str
    arch: ArchSpec
    variants: dict[str, Variant]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    parity: dict[str, ParityResult] = field(default_factory=dict)  # "variant/target" -> result
    parameters: dict[str, ParameterEntry] = field(default_factory=dict)  # for the PyTorch reference engine
    tied: dict[str, str] = field(default_factory=dict)  # parameter -> the parameter it shares storage with
    notes: tuple[str, ...] = ()  # what the export left behind, or did without
    profiles: dict[str, ProfileRanges] = field(default_factory=dict)  # of engines, by name, from the recipe
    freed: int = 0  # the highest number of a file that went (1: a plain name): readers may still look for it


__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "EncoderFidelity",
    "FileEntry",
    "GraphEntry",
    "GreedyAgreement",
    "Likelihood",
    "Manifest",
    "ParameterEntry",
    "ParityResult",
    "PassReport",
    "PhaseTimings",
    "Quality",
    "Quantization",
    "QuantizedLayer",
    "StoredSize",
    "TensorSpec",
    "Variant",
]
