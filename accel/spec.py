"""What a model is, as data: read from its config and from the traced shapes, stored in the bundle's manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["encoder", "decoder"]
Task = Literal[
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
]

# Metadata of an exported graph and of its values.
PARTS = "accel.parts"  # of a merged initializer: the parameters that lie in it one under the other, in order
ROWS = "accel.rows"  # of an initializer that is a range of a parameter's rows: name, start, stop
EMBEDDING = "accel.embedding"  # of a graph: the parameter whose rows it takes as this input
EMBEDDING_INPUT = "token_embeddings"
BEST_TOKENS, BEST_LOGITS = "best_tokens", "best_logits"  # outputs of a lowered decoder, where its engine looks for them

# What a model of each task puts out, by transformers' names.
OUTPUT_NAMES: dict[Task, tuple[str, ...]] = {
    "feature-extraction": ("last_hidden_state",),
    "text-classification": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "fill-mask": ("logits",),
    "text-generation": ("logits",),
}


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer, as its traced node says it is (never re-derived from the config).

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads (equal to ``heads`` unless grouped).
        head_dim: Size of one head.
        scale: Factor on the scores before softmax.
        window: Sliding window. Decoders: how many keys a query sees, itself included.
            Encoders: a key is seen when ``|query - key| <= window``. None: unlimited.
        softcap: Scores become ``softcap * tanh(scores / softcap)``. None: off.
        causal: Whether a query sees only keys at or before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = False


@dataclass(frozen=True)
class ArchSpec:
    """The architecture of one exported model."""

    family: str  # config.model_type, e.g. "qwen3"
    architecture: str  # class name, e.g. "Qwen3ForCausalLM"
    kind: Kind
    task: Task
    hidden_size: int
    vocab_size: int
    max_positions: int  # longest sequence the position scheme covers
    parameters: int  # parameter count, tied weights once
    tied_embeddings: bool
    layers: tuple[AttentionSpec, ...]


@dataclass(frozen=True)
class Range:
    """What a dimension of an engine's input may be; kernels are chosen for ``opt``."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class ProfileRanges:
    """What the calls of one engine profile may be: ``batch`` rows of ``sequence`` tokens each."""

    batch: Range
    sequence: Range


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. A dimension is an int or a symbol's name."""

    name: str
    dtype: str  # numpy name, e.g. "int64"
    shape: tuple[int | str, ...]
