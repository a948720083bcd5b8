"""One sequence in the slot loop: its tokens, how they are chosen, when it ends, and its call's clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import ChosenTokens
from accel.errors import AccelError
from accel.runtime.results import Timings, TokenLogprob
from accel.runtime.sampling import Sampler, check_best, log_softmax, top_logprobs

EndReason = Literal["eos", "stop", "length", "cancelled"]


class Clock:
    """What one call spent where; its sequences share it, so that a shared step counts once.

    Attributes:
        compute: Seconds inside the engine, in steps that any of the call's sequences took part in.
        prepost: Seconds spent building inputs, sampling and on text.
        steps: Those steps.
        tokens: Tokens generated.
    """

    def __init__(self) -> None:
        self.started = perf_counter()
        self.compute = self.prepost = 0.0
        self.steps = self.tokens = 0
        self.first_token_at: float | None = None

    def count(self, now: float) -> None:
        """Notes one token, made at ``now``."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.tokens += 1

    def timings(self) -> Timings:
        """The call's record, from its start until now."""
        first = None if self.first_token_at is None else self.first_token_at - self.started
        total = perf_counter() - self.started
        return Timings.measured(total, self.compute, self.prepost, first, self.steps, self.tokens)


class Detokenizer(Protocol):
    """What ``TextWatch`` needs of an incremental decoder."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StopMatcher(Protocol):
    """What ``TextWatch`` needs of a stop string matcher."""

    def push(self, text: str) -> tuple[str, bool]: ...

    def flush(self) -> str: ...


class TextWatch:
    """Follows a sequence's text as it grows: pieces for a stream, and stop strings."""

    def __init__(self, decoder: Detokenizer, stops: StopMatcher | None) -> None:
        self._decoder, self._stops = decoder, stops
        self.pieces: deque[str] = deque()  # text that is final; a stream takes it from the left
        self.text: list[str] = []
        self.stopped = False

    def push(self, token: int) -> bool:
        """Adds a token; whether a stop string is complete."""
        self._emit(self._decoder.push(token))
        return self.stopped

    def flush(self) -> None:
        """Emits what was held back. After a stop string nothing is."""
        if not self.stopped:
            self._emit(self._decoder.flush())
        if not self.stopped and self._stops is not None:
            self._keep(self._stops.flush())

    def _emit(self, text: str) -> None:
        if self._stops is not None and text:
            text, self.stopped = self._stops.push(text)
        self._keep(text)

    def _keep(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.text.append(text)


@dataclass(eq=False)
class Sequence:
    """One sequence.

    Attributes:
        prompt: int64 [P], P >= 1.
        sampler: Chooses its tokens; None: the prompt is scored and nothing generated.
        max_new_tokens: Tokens after which it ends with ``length``.
        min_new_tokens: End-of-sequence tokens are banned until there are as many.
        eos_token_ids: Tokens that end it.
        watch: Follows its text, for streams and stop strings.
        logprobs: How many alternatives to record with each token's log probability; None: no record.
        group: Sequences of the same prompt that may share its prefill carry the same object.
        clock: Its call's.
        tokens: int64, prompt and generated tokens; the first ``length`` are filled.
        computed: Tokens whose keys and values stand in the cache.
        row: Its cache row while it is active.
    """

    prompt: NDArray[np.int64]
    sampler: Sampler | None
    max_new_tokens: int = 0
    min_new_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    watch: TextWatch | None = None
    logprobs: int | None = None
    group: object | None = None
    owner: object | None = None  # the client that waits for it
    clock: Clock = field(default_factory=Clock)
    # Filled in by the loop:
    computed: int = 0
    row: int | None = None
    cancelled: bool = False
    finished: bool = False
    finish_reason: EndReason | None = None
    error: AccelError | None = None
    scores: list[float] = field(default_factory=list)
    best: list[int] = field(default_factory=list)  # the most probable token at each place that was scored
    records: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.length = len(self.prompt)
        self.tokens = np.empty(self.length + self.max_new_tokens, np.int64)
        self.tokens[: self.length] = self.prompt
        self._banned = sorted(self.eos_token_ids)

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache yet."""
        return self.length - self.computed

    @property
    def new_ids(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[len(self.prompt) : self.length].tolist()

    @property
    def positions(self) -> int:
        """Cache positions it may come to need: the last generated token is never put into the cache."""
        return len(self.prompt) + max(0, self.max_new_tokens - 1)

    def restart(self) -> None:
        """Takes it out of the cache. Its tokens, and what chose and recorded them, stay as they are."""
        self.row, self.computed = None, 0
        self.scores.clear()  # nothing of a scored prompt was handed out yet: all of it runs again
        self.best.clear()

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits [V]. Changes no state but the random one and the log probabilities."""
        assert self.sampler is not None
        banned = self._banned if self.length - len(self.prompt) < self.min_new_tokens else ()
        # An array costs less than a list; a view that nobody reads still costs microseconds on a cold cache.
        history: Any = self.tokens[: self.length] if self.sampler.reads_history else ()
        token = self.sampler.pick(logits, history, banned)
        if self.logprobs is not None:
            top = tuple(top_logprobs(logits, self.logprobs))
            self.records.append(TokenLogprob(token, float(log_softmax(logits)[token]), top))
        return token

    @property
    def takes_best(self) -> bool:
        """Whether its next token is the best one whatever the other logits are."""
        return self.sampler is not None and self.sampler.is_plain and self._leaves_logits

    @property
    def is_drawn(self) -> bool:
        """Whether the engine can draw its next token: nobody else reads or changes the logits."""
        return self.sampler is not None and self.sampler.is_drawn and self._leaves_logits

    @property
    def _leaves_logits(self) -> bool:
        if self.logprobs is not None:
            return False
        return not self._banned or self.length - len(self.prompt) >= self.min_new_tokens

    def take(self, chosen: ChosenTokens, at: int) -> int:
        """The next token as the engine found it.

        Raises:
            EngineError: Its logit is NaN or infinite.
        """
        assert self.sampler is not None
        token = check_best(chosen.tokens.item(at), chosen.logits.item(at))
        if not self.sampler.is_plain:
            self.sampler.advance()  # it was drawn with the number that was looked at
        return token

    def append(self, token: int) -> None:
        """Adds a generated token and decides whether it is the last."""
        self.tokens[self.length] = token
        self.length += 1
        stopped = self.watch is not None and self.watch.push(token)
        if stopped:
            self.finish_reason = "stop"
        elif token in self.eos_token_ids:
            self.finish_reason = "eos"
        elif self.length - len(self.prompt) >= self.max_new_tokens:
            self.finish_reason = "length"

    def end(self) -> None:
        """Marks it finished; the text that was held back comes out."""
        if self.watch is not None and self.error is None and self.finish_reason in ("eos", "length"):
            self.watch.flush()
            if self.watch.stopped:
                self.finish_reason = "stop"
        self.finished = True


class Event(NamedTuple):
    """What a step did to a sequence: the token it got, if any, and whether it ended."""

    sequence: Sequence
    token: int | None
    finished: bool


__all__ = ["Clock", "EndReason", "Event", "Sequence", "TextWatch"]
