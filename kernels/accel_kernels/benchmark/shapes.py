"""The sizes that rows are made of: Llama-3.2-1B and BERT-base, and tiny models that Triton's interpreter can run."""

from __future__ import annotations

from dataclasses import dataclass

from accel_kernels.tiles import GELU_ERF, NO_ACTIVATION, SILU

STRIPE = 128  # rows of a gate that alternate with as many of its partner, as the engine lays them out


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Attributes:
        name: Its place in the model.
        inputs, outputs: K and N.
        gated: Whether there is a second matrix, whose product the activated first one is multiplied with.
        activation: SILU, GELU_ERF or NO_ACTIVATION.
        bias: Whether it has one.
    """

    name: str
    inputs: int
    outputs: int
    gated: bool = False
    activation: int = NO_ACTIVATION
    bias: bool = False

    @property
    def stripe(self) -> int | None:
        """Rows of the gate in a stripe; None: not gated."""
        return (STRIPE if self.outputs % STRIPE == 0 else self.outputs) if self.gated else None

    def __str__(self) -> str:
        return f"{self.name} {self.inputs} to {self.outputs}" + ", bias" * self.bias


@dataclass(frozen=True)
class Decoder:
    """Sizes of a llama."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    intermediate: int
    vocabulary: int

    @property
    def qkv(self) -> Layer:
        """Queries, keys and values in one product."""
        return Layer("qkv", self.hidden, (self.heads + 2 * self.kv_heads) * self.dim)

    @property
    def attention_output(self) -> Layer:
        """What follows attention."""
        return Layer("attention output", self.heads * self.dim, self.hidden)

    @property
    def gate_up(self) -> Layer:
        """The feed-forward layer's first half."""
        return Layer("gate and up", self.hidden, self.intermediate, gated=True, activation=SILU)

    @property
    def down(self) -> Layer:
        """Its second half."""
        return Layer("down", self.intermediate, self.hidden)

    @property
    def head(self) -> Layer:
        """Logits."""
        return Layer("head", self.hidden, self.vocabulary)


@dataclass(frozen=True)
class Encoder:
    """Sizes of a BERT; as many key heads as query heads."""

    hidden: int
    heads: int
    intermediate: int
    positions: int
    vocabulary: int

    @property
    def dim(self) -> int:
        """Of a head."""
        return self.hidden // self.heads

    @property
    def qkv(self) -> Layer:
        """Queries, keys and values in one product."""
        return Layer("qkv", self.hidden, 3 * self.hidden, bias=True)

    @property
    def attention_output(self) -> Layer:
        """What follows attention."""
        return Layer("attention output", self.hidden, self.hidden, bias=True)

    @property
    def up(self) -> Layer:
        """The feed-forward layer's first half."""
        return Layer("up", self.hidden, self.intermediate, activation=GELU_ERF, bias=True)

    @property
    def down(self) -> Layer:
        """Its second half."""
        return Layer("down", self.intermediate, self.hidden, bias=True)


@dataclass(frozen=True)
class Shapes:
    """What rows are made of.

    Attributes:
        few: Numbers of sequences that decode side by side.
        prompt, prompts: Tokens of one prompt, and how many such prompts run together.
        long_prompt: Tokens of one long prompt.
        pasts: (sequences, tokens in the cache of each) of decode steps.
        batches: (sequences, tokens of each) that the encoder sees: a smaller and a larger batch.
        group: Integer weights that share a scale.
    """

    decoder: Decoder
    encoder: Encoder
    few: tuple[int, ...]
    prompt: int
    prompts: int
    long_prompt: int
    pasts: tuple[tuple[int, int], ...]
    batches: tuple[tuple[int, int], tuple[int, int]]
    group: int = 128


FULL = Shapes(
    decoder=Decoder(hidden=2048, heads=32, kv_heads=8, dim=64, intermediate=8192, vocabulary=128256),
    encoder=Encoder(hidden=768, heads=12, intermediate=3072, positions=512, vocabulary=30522),
    few=(8, 32), prompt=128, prompts=32, long_prompt=4096,
    pasts=((1, 128), (1, 4096), (8, 1024), (32, 128), (32, 4096)),
    batches=((8, 128), (64, 384)),
)  # fmt: skip
TINY = Shapes(
    decoder=Decoder(hidden=128, heads=4, kv_heads=2, dim=32, intermediate=512, vocabulary=500),
    encoder=Encoder(hidden=64, heads=4, intermediate=192, positions=32, vocabulary=300),
    few=(2, 3), prompt=18, prompts=2, long_prompt=70,
    pasts=((1, 5), (1, 600), (3, 20)),
    batches=((2, 9), (3, 20)),
)  # fmt: skip

__all__ = ["FULL", "STRIPE", "TINY", "Decoder", "Encoder", "Layer", "Shapes"]
