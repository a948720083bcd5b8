"""From logits to a token: the processors of transformers' ``generate``, in its order, on NumPy."""

from __future__ import annotations

import math
import numbers
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import EngineError, InputError
from accel.runtime.candidates import draw, nucleus, relative_logs, top_k_ids, usable_temperature

# Parameters that act only when do_sample is on, and the values with which they do nothing.
_SAMPLING_ONLY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_CACHED_VALUES = 1 << 18  # float32 values that a core's cache holds together


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Names, ranges and effects are those of transformers' ``generate``.

    Attributes:
        do_sample: Draw from the distribution; otherwise take the most probable token.
        temperature: > 0; divides the logits.
        top_k: Keep the k most probable tokens (ties with the k-th too); 0: all.
        top_p: In [0, 1]; keep the most probable tokens that together reach this mass, at least one. 1: all.
        min_p: In [0, 1]; drop tokens less probable than this share of the best one's probability. 0: none.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen so far. 1: off.
        seed: >= 0, makes draws repeatable; None: fresh entropy.

    Raises:
        InputError: A wrong type, NaN, infinity, a value out of range, or a sampling-only parameter that would be
            without effect because ``do_sample`` is off.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def resolve(cls, defaults: Mapping[str, Any], **given: Any) -> SamplingParams:
        """The caller's arguments over a model's generation config.

        Args:
            defaults: ``generation_config.json``; keys that are not sampling parameters are skipped, null means unset.
            given: Arguments of this call; None means not given.

        When the call ends up greedy, sampling-only defaults of the model do not apply; sampling-only
        arguments of the caller are refused.

        Raises:
            InputError: See the class.
        """
        names = {f.name for f in fields(cls)} - {"seed"}
        chosen = {name: value for name, value in defaults.items() if name in names and value is not None}
        asked = {name: value for name, value in given.items() if value is not None}
        if not asked.get("do_sample", chosen.get("do_sample", False)):
            chosen = {name: value for name, value in chosen.items() if name not in _SAMPLING_ONLY}
        return cls(**{**chosen, **asked})

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool | np.bool_):
            raise _refuse("do_sample", self.do_sample, "True or False")
        _require_real(
            "temperature", self.temperature, low=0, open_low=True, remedy="For greedy decoding set do_sample=False"
        )
        _require_integer("top_k", self.top_k)
        _require_real("top_p", self.top_p, low=0, high=1)
        _require_real("min_p", self.min_p, low=0, high=1)
        _require_real("repetition_penalty", self.repetition_penalty, low=0, open_low=True)
        if self.seed is not None:
            _require_integer("seed", self.seed)
        if not self.do_sample:
            self._refuse_ineffective()

    def _refuse_ineffective(self) -> None:
        idle = [name for name, off in _SAMPLING_ONLY.items() if getattr(self, name) != off]
        if idle:
            raise InputError(
                f"{' and '.join(idle)} would be without effect because do_sample is False",
                where=idle[0],
                remedy="Pass do_sample=True to sample, or leave them out",
            )


def _refuse(name: str, value: object, expected: str, remedy: str | None = None) -> InputError:
    return InputError(f"{name} must be {expected}, not {value!r}", where=name, remedy=remedy)


def _require_real(
    name: str, value: object, *, low: float, high: float = math.inf, open_low: bool = False, remedy: str | None = None
) -> None:
    real = type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_))
    try:
        number = float(value) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:  # an integer that no float holds
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        upper = f"at most {high:g}" if math.isfinite(high) else "finite"
        expected = f"a number {'above' if open_low else 'of at least'} {low:g} and {upper}"
        raise _refuse(name, value, expected, remedy)


def _require_integer(name: str, value: object) -> None:
    if type(value) is int and value >= 0:
        return
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral) or int(value) < 0:
        raise _refuse(name, value, "an integer of at least 0")


class Sampler:
    """Picks one sequence's tokens. Holds the random state, so each sequence needs its own; not thread-safe."""

    def __init__(self, params: SamplingParams, vocab_size: int, stream: int = 0) -> None:
        """Prepares a sequence's random state.

        Args:
            params: How tokens are chosen.
            vocab_size: Length of the logits that ``pick`` will get.
            stream: Which of several independent random streams of the same seed to draw from
                (the i-th of ``num_return_sequences``); 0 alone is what a single sequence draws.
        """
        self.params, self.vocab_size = params, vocab_size
        if params.do_sample:  # else it costs a first token 30 us for nothing
            self._all = _all_ids(vocab_size)
            self._rng = np.random.default_rng(np.random.SeedSequence(params.seed, spawn_key=(stream,)))
            self._uniforms: deque[float] = deque()  # numbers that were looked at, and not drawn with yet
        self._reads_history = params.repetition_penalty != 1.0
        self._plain = not params.do_sample and not self._reads_history
        self._drawn = params.do_sample and not self._reads_history
        self._filters = 0.0, 0.0, 1.0, 0.0
        if params.do_sample:
            top_k = float(params.top_k) if params.top_k < vocab_size else 0.0
            temperature = usable_temperature(float(params.temperature))
            self._filters = temperature, top_k, float(params.top_p), float(params.min_p)

    @property
    def reads_history(self) -> bool:
        """Whether ``pick`` looks at the tokens so far."""
        return self._reads_history

    @property
    def is_plain(self) -> bool:
        """Whether ``pick`` takes the largest logit as it is."""
        return self._plain

    @property
    def is_drawn(self) -> bool:
        """Whether ``pick`` draws from the logits as they are, by temperature, top_k, top_p and min_p."""
        return self._drawn

    def peek(self) -> tuple[float, float, float, float, float, float]:
        """What draws the next token: temperature, top_k (0: all), top_p, min_p; and the numbers of [0, 1) with which
        the next two are drawn. The random state stays: whoever draws with the first says ``advance``.

        Temperature 0 of a sampler that does not draw.
        """
        if not self.params.do_sample:
            return (*self._filters, 0.0, 0.0)
        uniforms = self._uniforms
        while len(uniforms) < 2:
            uniforms.append(self._rng.random())
        return (*self._filters, uniforms[0], uniforms[1])

    def advance(self) -> float:
        """The number of [0, 1) for the next draw, which is drawn with now."""
        return self._uniforms.popleft() if self._uniforms else self._rng.random()

    def pick(self, logits: NDArray[np.float32], history: Sequence[int], banned: Sequence[int] = ()) -> int:
        """Chooses the next token.

        Args:
            logits: float32 [V]; not changed.
            history: Prompt and generated tokens so far (an integer array costs less than a list);
                read only when there is a repetition penalty.
            banned: Tokens that must not come now (the end-of-sequence tokens before ``min_new_tokens``).

        Raises:
            InputError: logits of another shape.
            EngineError: logits with NaN or +inf, or without any finite value.
        """
        if logits.shape != (self.vocab_size,):
            raise InputError(f"logits must have shape ({self.vocab_size},), not {logits.shape}", where="logits")
        if self._plain and not len(banned):
            return _best(logits)
        scores = self._process(logits, history, banned)
        if not self.params.do_sample:
            return _best(scores)
        ids, weights = self._candidates(scores)
        return int(ids[draw(weights, self.advance())])

    def probabilities(
        self, logits: NDArray[np.float32], history: Sequence[int], banned: Sequence[int] = ()
    ) -> NDArray[np.float64]:
        """The distribution that ``pick`` draws from, float64 [V]; one-hot when greedy. Same arguments and errors."""
        result = np.zeros(self.vocab_size)
        if not self.params.do_sample:
            result[self.pick(logits, history, banned)] = 1.0
            return result
        ids, weights = self._candidates(self._process(logits, history, banned))
        result[ids] = weights / weights.sum(dtype=np.float64)
        return result

    def _process(
        self, logits: NDArray[np.float32], history: Sequence[int], banned: Sequence[int]
    ) -> NDArray[np.float32]:
        """Repetition penalty, then bans: what acts on greedy decoding too. The logits stay as they are."""
        penalty = np.float32(self.params.repetition_penalty)
        if penalty == 1.0 and not len(banned):
            return logits
        scores = np.array(logits, dtype=np.float32)
        if penalty != 1.0 and len(history):
            seen = np.asarray(history, dtype=np.int64)
            old = scores[seen]
            scores[seen] = np.where(old < 0, old * penalty, old / penalty)  # duplicates write the same value
        if len(banned):
            scores[np.asarray(banned, dtype=np.int64)] = -np.inf
        return scores

    def _candidates(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens left after temperature, top_k, top_p and min_p, ascending, with weights relative to the best one's."""
        params = self.params
        best = float(scores[_best(scores)])
        ids = top_k_ids(scores, int(params.top_k)) if 0 < params.top_k < self.vocab_size else self._all
        if ids is not self._all:
            scores = scores[ids]
        logs = relative_logs(scores, best, float(params.temperature))
        weights = np.exp(logs)
        if params.top_p < 1.0:
            kept = nucleus(logs, weights, float(params.top_p))
            ids, weights = ids[kept], weights[kept]
        if params.min_p > 0.0:
            heavy = weights >= np.float32(params.min_p)
            ids, weights = ids[heavy], weights[heavy]
        return ids, weights


@lru_cache(maxsize=4)
def _all_ids(vocab_size: int) -> NDArray[np.int64]:
    """Every token; sequences share it."""
    ids = np.arange(vocab_size)
    ids.flags.writeable = False
    return ids


def _best(scores: NDArray[np.float32]) -> int:
    """Index of the largest score; lowest index among equals. NaN wins every argmax, so one look finds it."""
    index = int(scores.argmax())
    return check_best(index, scores.item(index))


def check_best(index: int, logit: float) -> int:
    """A best token.

    Raises:
        EngineError: Its logit is NaN or infinite.
    """
    if not math.isfinite(logit):
        raise EngineError(
            f"the largest logit is {logit}, so no token can be chosen",
            where=f"token {index}",
            remedy="The model's numbers overflowed or every token is banned; check the weights and the precision",
        )
    return index


def log_softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Log probabilities over the last axis, float64, same shape.

    Raises:
        EngineError: a row with NaN or +inf, or without any finite value.
    """
    wide = np.asarray(logits, dtype=np.float64)
    top = wide.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise EngineError("the logits hold NaN or infinity, so they have no probabilities", where="logits")
    shifted = wide - top
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def score_targets(
    logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log probability of one token per row, and each row's most probable token (the lowest index among equals).

    Exponentials are taken in float32 and summed in float64: the log probabilities differ from ``log_softmax``'s by
    some 1e-8 times their size, and nothing larger than a cache holds is written.

    Args:
        logits: [R, V].
        targets: int64 [R], below V.

    Returns:
        float64 [R] and int64 [R].

    Raises:
        EngineError: see ``log_softmax``.
    """
    rows, width = logits.shape
    assert targets.shape == (rows,), (targets.shape, rows)
    together = max(1, _CACHED_VALUES // width)
    scratch = np.empty((min(rows, together), width), np.float32)
    scores, best = np.empty(rows, np.float64), np.empty(rows, np.int64)
    for start in range(0, rows, together):
        block = logits[start : start + together]
        index, chosen = np.arange(len(block)), targets[start : start + together]
        top = block.argmax(axis=-1)  # a NaN wins
        highest = block[index, top]
        if not np.isfinite(highest).all():
            raise EngineError("the logits hold NaN or infinity, so they have no probabilities", where="logits")
        shifted = np.subtract(block, highest[:, None], out=scratch[: len(block)])
        np.exp(shifted, out=shifted)
        total = shifted.sum(axis=-1, dtype=np.float64)
        best[start : start + together] = top
        scores[start : start + together] = block[index, chosen].astype(np.float64) - highest - np.log(total)
    return scores, best


def top_logprobs(logits: NDArray[np.floating[Any]], n: int) -> list[tuple[int, float]]:
    """The n most probable tokens of logits [V] with their log probabilities, best first, lower id first among equals.

    Raises:
        InputError: n is negative or above V.
        EngineError: see ``log_softmax``.
    """
    if not 0 <= n <= logits.shape[-1]:
        raise InputError(f"logprobs must lie in 0..{logits.shape[-1]}, not {n}", where="logprobs")
    if n == 0:
        return []
    logprobs = log_softmax(logits)
    threshold = np.partition(logprobs, -n)[-n]
    ids = np.flatnonzero(logprobs >= threshold)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:n]
    return [(int(i), float(logprobs[i])) for i in ids]
