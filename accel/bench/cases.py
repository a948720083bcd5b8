"""What is measured: cases, the suites made of them, and the limits a result is held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
        batch, seq: Shape of a forward's input.
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
        reference: A peer's name, ``fastest`` for the fastest of all others, or ``absolute``.
    """

    metric: str
    limit: float
    reference: str


@dataclass(frozen=True)
class Suite:
    """A set of cases on one model, the peers that can do them, and the targets."""

    name: str
    model: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    targets: tuple[Target, ...]
    isolated: bool = False  # each measurement in a fresh process, one after another
    unit: str = "ms"


TOLERANCE = 0.05  # a ratio is reached when its 95 % upper bound is at most limit + TOLERANCE

_ENCODER = tuple(Case(f"MiniLM {b}x{s}", "encoder", batch=b, seq=s) for b, s in ((1, 8), (1, 128), (8, 128), (1, 512)))
_EMBED = Case(f"MiniLM embed {SENTENCES} sentences", "embedder", sentences=SENTENCES)
_QWEN = Case("Qwen2.5-0.5B", "decoder", prompt=PROMPT_TOKENS, new=NEW_TOKENS)
_GPT2 = Case("GPT-2 124M", "decoder", prompt=PROMPT_TOKENS, new=NEW_TOKENS)

WEIGHT_BYTES_QWEN = 1_976_131_072  # fp32, tied embeddings once
PEAK_RSS = "Qwen2.5-0.5B fp32: peak RSS"
PEAK_ANONYMOUS = "Qwen2.5-0.5B fp32: peak RSS without file pages"
EXPORT_SECONDS = "Qwen2.5-0.5B export: wall time"
EXPORT_RSS = "Qwen2.5-0.5B export: peak RSS"
EXPORT_ANONYMOUS = "Qwen2.5-0.5B export: peak RSS without file pages"
EXPORT_SIZE = "Qwen2.5-0.5B export: size on disk"

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
            (_QWEN,),
            ("accel", "torch", "ort-dynamo", "optimum", "transformers-onnx", "genai", "openvino", "ctranslate2"),
            (Target(PEAK_RSS, 2.3e3, "absolute"),),
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
    )
}
