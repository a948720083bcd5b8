"""What is measured: cases, the suites made of them, and the limits a result is held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

PROMPT_TOKENS = 128
NEW_TOKENS = 32
SENTENCES = 256
Role = Literal["encoder", "embedder", "decoder"]


@dataclass(frozen=True)
class Case:
    """One piece of work that every peer of a suite does.

    Attributes:
        name: The row's name; metrics are ``name`` or, for ``decoder``, ``name: first token`` and ``name: per token``.
        role: What the peer must offer: ``encoder`` (a raw forward), ``embedder`` (texts to vectors), ``decoder``.
        batch, seq: Shape of a forward's input; of a decoder ``batch`` is what its roofline covers beside one sequence.
        prompt, new: Prompt length and the number N of tokens decoded after the first one.
        sentences: How many sentences are embedded in one call.
    """

    name: str
    role: Role
    batch: int = 0
    seq: int = 0
    prompt: int = 0
    new: int = 0
    sentences: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics it yields, each in milliseconds."""
        if self.role == "decoder":
            return (f"{self.name}: first token", f"{self.name}: per token")
        return (self.name,)


@dataclass(frozen=True)
class Target:
    """A limit on accel's ratio to a reference, or on an absolute figure.

    Attributes:
        metric: A case's metric.
        limit: The ratio that must be reached (or the absolute figure, in the metric's unit).
        reference: A peer's name, ``fastest`` for the fastest of all that are not accel, or ``absolute``.
        at_least: The figure must reach the limit from above (absolute figures only).
    """

    metric: str
    limit: float
    reference: str
    at_least: bool = False


@dataclass(frozen=True)
class Suite:
    """A set of cases on one model, the peers that can do them, and the targets.

    Attributes:
        peers: The subject first.
        subject: The peer that the targets are about.
        reference: A peer that answers the cases once, untimed, for the others to be compared with; empty: one of
            ``peers`` that runs the model as it is.
        pooled: Of how many real sentences encoders give the pooled vectors, to be compared with the reference's.
        isolated: Each measurement in a fresh process, one after another.
    """

    name: str
    model: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    targets: tuple[Target, ...]
    isolated: bool = False
    unit: str = "ms"
    subject: str = "accel"
    reference: str = ""
    pooled: int = 0


TOLERANCE = 0.05  # a ratio is reached when its 95 % upper bound is at most limit + TOLERANCE

_ENCODER = tuple(Case(f"MiniLM {b}x{s}", "encoder", batch=b, seq=s) for b, s in ((1, 8), (1, 128), (8, 128), (1, 512)))
_EMBED = Case(f"MiniLM embed {SENTENCES} sentences", "embedder", sentences=SENTENCES)
_QWEN = Case("Qwen2.5-0.5B", "decoder", prompt=PROMPT_TOKENS, new=NEW_TOKENS)
_QWEN_FP32 = replace(_QWEN, name="Qwen2.5-0.5B fp32")
_QWEN_INT8 = replace(_QWEN, name="Qwen2.5-0.5B int8")
_QWEN_INT4 = replace(_QWEN, name="Qwen2.5-0.5B int4")
_GPT2 = Case("GPT-2 124M", "decoder", prompt=PROMPT_TOKENS, new=NEW_TOKENS)
_GPT2_INT8 = replace(_GPT2, name="GPT-2 124M int8")
_ENCODER_INT8 = tuple(replace(case, name=case.name.replace("MiniLM", "MiniLM int8")) for case in _ENCODER[1:])

WEIGHT_BYTES_QWEN = 1_976_131_072  # fp32, tied embeddings once
PEAK_RSS, PEAK_ANONYMOUS = "peak RSS", "peak RSS without file pages"
EXPORT_SECONDS = "Qwen2.5-0.5B export: wall time"
EXPORT_RSS = "Qwen2.5-0.5B export: peak RSS"
EXPORT_ANONYMOUS = "Qwen2.5-0.5B export: peak RSS without file pages"
EXPORT_SIZE = "Qwen2.5-0.5B export: size on disk"
POOLED_SENTENCES = 64
COSINE = "MiniLM pooled cosine, mean"
COSINE_LEAST = "MiniLM pooled cosine, least"


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "encoder",
            "minilm",
            _ENCODER,
            ("accel", "torch", "ort-dynamo", "ort-o2", "transformers-onnx", "openvino", "ctranslate2"),
            tuple(Target(case.name, 1.0, "fastest") for case in _ENCODER),
        ),
        Suite(
            "embed",
            "minilm",
            (_EMBED,),
            ("accel", "sentence-transformers", "sentence-transformers-onnx", "sentence-transformers-onnx-o2"),
            (Target(_EMBED.name, 0.9, "fastest"),),
        ),
        Suite(
            "decoder",
            "qwen05",
            (_QWEN,),
            (
                *("accel", "genai", "openvino", "ctranslate2", "torch"),
                *("ort-dynamo", "ort-dynamo-values", "optimum", "transformers-onnx"),
            ),
            (Target(_QWEN.metrics[0], 0.80, "genai"), Target(_QWEN.metrics[1], 1.03, "genai")),
        ),
        Suite(
            "gpt2",
            "gpt2",
            (_GPT2,),
            (
                *("accel", "torch", "ort-dynamo", "ort-dynamo-values", "optimum", "transformers-onnx"),
                *("genai", "openvino", "ctranslate2"),
            ),
            (Target(_GPT2.metrics[1], 0.90, "fastest"),),
        ),
        Suite(
            "memory",
            "qwen05",
            (_QWEN_FP32,),
            ("accel", "torch", "ort-dynamo", "optimum", "transformers-onnx", "genai", "openvino", "ctranslate2"),
            (Target(f"{_QWEN_FP32.name}: {PEAK_RSS}", 2.3e3, "absolute"),),
            isolated=True,
            unit="MB",
        ),
        Suite(
            "export",
            "qwen05",
            (),
            ("accel", "ort-dynamo", "optimum", "transformers-onnx", "genai", "openvino", "ctranslate2"),
            (
                Target(EXPORT_SECONDS, 60.0, "absolute"),
                Target(EXPORT_RSS, 1.3 * WEIGHT_BYTES_QWEN / 1e6 + 400.0, "absolute"),
            ),
            isolated=True,
            unit="s, MB",
        ),
        Suite(
            "int8-encoder",
            "minilm",
            _ENCODER_INT8,
            (
                *("accel-w8a8-dyn", "accel-w8g128", "accel-openvino-bf16", "openvino-int8", "openvino-int8-bf16"),
                *("openvino-static-int8", "openvino-static-int8-bf16", "openvino-bf16"),
                *("ort-int8", "ctranslate2-int8"),
            ),
            (
                *(Target(case.name, 0.90, "fastest") for case in _ENCODER_INT8),
                Target(COSINE, 0.997, "absolute", at_least=True),
            ),
            subject="accel-w8a8-dyn",
            reference="torch",
            pooled=POOLED_SENTENCES,
        ),
        Suite(
            "int8-decoder",
            "qwen05",
            (_QWEN_INT8,),
            ("accel-w8a8-dyn", "genai-int8", "ctranslate2-int8", "openvino-int8", "openvino-int8-bf16"),
            (
                Target(_QWEN_INT8.metrics[1], 0.85, "genai-int8"),
                Target(_QWEN_INT8.metrics[0], 1.1, "ctranslate2-int8"),
            ),
            subject="accel-w8a8-dyn",
            reference="torch",
        ),
        Suite(
            "int4-decoder",
            "qwen05",
            (_QWEN_INT4,),
            ("accel-w4g32", "genai-int4", "openvino-int4", "openvino-int4-bf16"),
            (Target(_QWEN_INT4.metrics[1], 0.85, "genai-int4"), Target(_QWEN_INT4.metrics[0], 1.0, "openvino-int4")),
            subject="accel-w4g32",
            reference="torch",
        ),
        Suite(
            "int8-gpt2",
            "gpt2",
            (_GPT2_INT8,),
            ("accel-w8a8-dyn", "openvino-int8", "openvino-int8-bf16", "ctranslate2-int8"),
            (Target(_GPT2_INT8.metrics[1], 0.70, "fastest"), Target(_GPT2_INT8.metrics[0], 1.1, "fastest")),
            subject="accel-w8a8-dyn",
            reference="torch",
        ),
        Suite(
            "int4-memory",
            "qwen05",
            (_QWEN_INT4,),
            ("accel-w4g32", "genai-int4", "openvino-int4"),
            (Target(f"{_QWEN_INT4.name}: {PEAK_RSS}", 550.0, "absolute"),),
            isolated=True,
            unit="MB",
            subject="accel-w4g32",
        ),
    )
}
