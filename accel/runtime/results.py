"""What the runtime hands back: results, and where each call's time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Where one call's wall time went, in seconds: ``T_r = T_c + T_p + T_s``.

    Attributes:
        total: T_r, the whole call as its caller sees it.
        compute: T_c, inside the engine's own run calls.
        prepost: T_p, tokenizing, building inputs, sampling, detokenizing.
        system: T_s, everything else: waiting for a slot or a lock, scheduling, dispatch.
        first_token: From the call's start to its first token; None where there are no tokens.
        steps: Engine run calls that this request took part in, prefill chunks included.
        tokens: Tokens generated (all returned sequences together); 0 for encoders.
    """

    total: float
    compute: float
    prepost: float
    system: float
    first_token: float | None = None
    steps: int = 0
    tokens: int = 0

    @classmethod
    def measured(
        cls,
        total: float,
        compute: float,
        prepost: float,
        first_token: float | None = None,
        steps: int = 0,
        tokens: int = 0,
    ) -> Timings:
        """Builds the record from what was measured; ``system`` is the rest, so the parts add up to ``total``.

        ``system`` turns negative only if ``compute`` and ``prepost`` were counted twice: callers
        must measure them as disjoint intervals inside ``total``.
        """
        return cls(total, compute, prepost, total - compute - prepost, first_token, steps, tokens)

    @property
    def per_token(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        if self.first_token is None or self.tokens < 2:
            return None
        return (self.total - self.first_token) / (self.tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens over the whole call, prefill included; None without tokens."""
        return self.tokens / self.total if self.tokens and self.total > 0 else None

    @property
    def overhead_per_step(self) -> float | None:
        """Mean seconds per engine call spent outside the engine; None without steps."""
        return (self.prepost + self.system) / self.steps if self.steps else None

    def __add__(self, other: Timings) -> Timings:
        """The record of two calls made one after another; ``first_token`` is the first call's."""
        return Timings(
            self.total + other.total,
            self.compute + other.compute,
            self.prepost + other.prepost,
            self.system + other.system,
            self.first_token if self.first_token is not None else other.first_token,
            self.steps + other.steps,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of one generated token, under the model's own distribution (before any processing).

    Attributes:
        id: The token.
        logprob: Natural logarithm of its probability.
        top: The most probable tokens and their log probabilities, best first; empty unless asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TeacherForced(NamedTuple):
    """What a model says of a text that is given to it token by token (teacher forcing). Entry t is for token t + 1.

    Attributes:
        logprobs: float64 [S - 1], natural logarithm of the probability of each token given those before it.
        best: int64 [S - 1], the token that the model finds most probable in its place.
    """

    logprobs: NDArray[np.float64]
    best: NDArray[np.int64]


@dataclass(frozen=True)
class GenerateResult:
    """One generated sequence.

    Attributes:
        ids: Generated tokens, without the prompt; the end-of-sequence token is included when it ended the text.
        text: Their text without special tokens, cut before a stop string; None when the bundle has no tokenizer.
        finish_reason: ``eos`` (end-of-sequence token), ``stop`` (a stop string) or ``length`` (``max_new_tokens``).
        logprobs: One entry per id, or None unless asked for.
        timings: Where the call's time went.
    """

    ids: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    timings: Timings


@dataclass(frozen=True)
class Classification:
    """A label of the model's config and its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class TruncationReport:
    """Which texts were cut to fit the model.

    Attributes:
        max_length: Tokens kept per text, special tokens included.
        indices: Positions of the cut texts in the caller's list, ascending.
        texts: How many texts there were.
    """

    max_length: int
    indices: tuple[int, ...]
    texts: int

    @classmethod
    def of(cls, truncated: Sequence[bool], max_length: int) -> TruncationReport:
        """From one flag per text."""
        return cls(max_length, tuple(i for i, cut in enumerate(truncated) if cut), len(truncated))

    def __bool__(self) -> bool:
        return bool(self.indices)

    def __str__(self) -> str:
        return f"{len(self.indices)} of {self.texts} texts were cut to {self.max_length} tokens"
