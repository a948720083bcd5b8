"""Checks of what a caller hands to a decoder: prompts, masks and generation options."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import CapacityError, InputError
from accel.runtime.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 128
_LARGER = "load with a larger capacity (for TensorRT an engine is built with it: accel build --capacity)"
_SHOWN = 5  # offenders listed in an error
# generation_config.json entries that change transformers' output and that this runtime does not apply,
# with the values that mean "off".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "diversity_penalty": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1, 1.0),
    "stop_strings": ([],),
    "watermarking_config": ({},),
}


@dataclass(frozen=True)
class GenerationOptions:
    """One call's settled options.

    Attributes:
        sampling: How tokens are chosen.
        max_new_tokens: Tokens to generate at most.
        max_new_tokens_given: Whether the caller said so; a default shrinks to what fits.
        min_new_tokens: End-of-sequence tokens are banned until there are as many.
        eos_token_ids: Tokens that end a sequence.
        stop: Strings that end a sequence.
        returned: Sequences per prompt.
        logprobs: Alternatives recorded per token; None: no record.
    """

    sampling: SamplingParams
    max_new_tokens: int
    max_new_tokens_given: bool
    min_new_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    returned: int = 1
    logprobs: int | None = None


class RequestReader:
    """Settles prompts and options for one model.

    Args:
        vocab_size: Ids are below it.
        defaults: ``generation_config.json``.
        eos_token_ids: Tokens that end a sequence unless the caller names others.
    """

    def __init__(self, vocab_size: int, defaults: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> None:
        self.vocab_size, self.defaults = vocab_size, defaults
        # Some configs name ids that the model does not have, and so never makes.
        self.eos_token_ids = frozenset(index for index in eos_token_ids if index < vocab_size)
        ignored = [
            name
            for name, off in _UNSUPPORTED.items()
            if defaults.get(name) is not None and defaults[name] not in off and defaults[name] is not False
        ]
        if ignored:
            warnings.warn(
                f"the model's generation_config.json sets {', '.join(ignored)}, which accel does not apply",
                stacklevel=4,
            )

    def options(
        self,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        stop: str | list[str] | None = None,
        num_return_sequences: int | None = None,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> GenerationOptions:
        """The caller's arguments over the model's defaults; None means not given.

        Raises:
            InputError: A wrong type or a value out of range.
        """
        new = _count("max_new_tokens", max_new_tokens, 1)
        default = _count("max_new_tokens", self.defaults.get("max_new_tokens"), 1) or DEFAULT_NEW_TOKENS
        least = _count("min_new_tokens", min_new_tokens, 0)
        if least is None:
            least = _count("min_new_tokens", self.defaults.get("min_new_tokens"), 0) or 0
        limit = new or default
        if least > limit:
            what = f"min_new_tokens {least} is above max_new_tokens {limit}"
            raise InputError(what, where="min_new_tokens", remedy="Raise max_new_tokens, or lower min_new_tokens")
        returned = _count("num_return_sequences", num_return_sequences, 1)
        if returned is None:
            returned = _count("num_return_sequences", self.defaults.get("num_return_sequences"), 1) or 1
        recorded = _count("logprobs", logprobs, 0)
        if recorded is not None and recorded > self.vocab_size:
            raise InputError(f"logprobs must be at most {self.vocab_size}, not {recorded}", where="logprobs")
        params = SamplingParams.resolve(self.defaults, **sampling)
        if returned > 1 and not params.do_sample:
            what = "num_return_sequences above 1 gives the same sequence again unless do_sample is on"
            raise InputError(what, where="num_return_sequences", remedy="Pass do_sample=True")
        return GenerationOptions(
            params, limit, new is not None, least, self._eos(eos_token_id), _stops(stop), returned, recorded
        )

    def fit(self, options: GenerationOptions, prompt_length: int, capacity: int) -> GenerationOptions:
        """The options for one prompt: a default number of new tokens shrinks to the cache's ``capacity`` positions.

        Raises:
            CapacityError: The prompt, or the prompt and the tokens asked for, need more positions than there are.
        """
        self.check_fits(prompt_length, capacity)
        room = capacity - prompt_length + 1  # the last token is never put into the cache
        if options.max_new_tokens <= room:
            return options
        if options.max_new_tokens_given or options.min_new_tokens > room:
            wanted = max(options.max_new_tokens, options.min_new_tokens)
            raise CapacityError(
                f"{prompt_length:,} prompt tokens and {wanted:,} new ones need more than the {capacity:,} "
                "positions that the cache holds",
                where="max_new_tokens",
                remedy=f"Ask for at most {room:,} new tokens, or {_LARGER}",
            )
        return replace(options, max_new_tokens=room)

    @staticmethod
    def check_fits(prompt_length: int, capacity: int) -> None:
        """Checks that a prompt fits into the cache's ``capacity`` positions.

        Raises:
            CapacityError: It does not.
        """
        if prompt_length > capacity:
            raise CapacityError(
                f"the prompt has {prompt_length:,} tokens, but the cache holds {capacity:,}",
                where="input_ids",
                remedy=f"Shorten the prompt, or {_LARGER}",
            )

    def prompts(self, input_ids: Any, attention_mask: Any = None) -> tuple[list[NDArray[np.int64]], bool]:
        """Token ids as one int64 array per sequence, padding removed; and whether it was a single sequence.

        Args:
            input_ids: A list of ints, a list of such lists, or an array or tensor [S] or [B, S].
            attention_mask: 1 for real tokens, 0 for padding on either side; same shape as ``input_ids``.

        Raises:
            InputError: Empty, wrong rank or dtype, ids outside the vocabulary, or a mask that does not fit.
        """
        rows, single = _as_rows(input_ids)
        if attention_mask is not None:
            rows = _apply_mask(rows, attention_mask, single)
        for index, row in enumerate(rows):
            where = "input_ids" if single else f"input_ids[{index}]"
            if len(row) == 0:
                raise InputError("a sequence without tokens", where=where, remedy="Give at least one token")
            bad = row[(row < 0) | (row >= self.vocab_size)]
            if len(bad):
                what = f"ids outside the vocabulary of {self.vocab_size:,}: {bad[:_SHOWN].tolist()}"
                raise InputError(what, where=where, remedy="Use this model's own tokenizer")
        return rows, single

    def _eos(self, value: int | list[int] | None) -> frozenset[int]:
        if value is None:
            return self.eos_token_ids
        ids = [value] if isinstance(value, int | np.integer) and not isinstance(value, bool) else value
        if not isinstance(ids, list | tuple | set | frozenset):
            raise InputError(f"eos_token_id must be an id or a list of ids, not {value!r}", where="eos_token_id")
        for entry in ids:
            plain = isinstance(entry, int | np.integer) and not isinstance(entry, bool)
            if not plain or not 0 <= entry < self.vocab_size:
                what = f"eos_token_id {entry!r} is no token of this model"
                raise InputError(what, where="eos_token_id", remedy="Pass [] to generate past the end of sequence")
        return frozenset(int(entry) for entry in ids)


def check_texts(texts: Any) -> tuple[list[str], bool] | None:
    """The texts of a text prompt and whether it was a single one; None when it holds no text.

    Raises:
        InputError: An empty text or a mixture.
    """
    if isinstance(texts, str):
        _check_text(texts, "text")
        return [texts], True
    if not isinstance(texts, list | tuple) or not any(isinstance(text, str) for text in texts):
        return None
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            what = f"a text is expected, not {type(text).__name__}"
            raise InputError(what, where=f"texts[{index}]", remedy="Give texts or token ids, not both")
        _check_text(text, f"texts[{index}]")
    return list(texts), False


def _check_text(text: str, where: str) -> None:
    if not text:
        raise InputError("the text is empty", where=where, remedy="Give at least one character")


def _count(name: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be an integer of at least {least}, not {value!r}", where=name)
    return int(value)


def _stops(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise InputError(f"stop must be a non-empty string or a list of them, not {stop!r}", where="stop")
    return tuple(strings)


def _as_array(value: Any, name: str, allow_bool: bool = False) -> NDArray[np.int64]:
    """A torch tensor by duck typing, a list or an array, as int64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is no array of integers: {error}", where=name) from error
    if array.size == 0 and array.dtype == np.float64:  # np.asarray([])
        return array.astype(np.int64)
    allowed = "iub" if allow_bool else "iu"
    if array.dtype.kind not in allowed:
        remedy = "Give integers, for instance numpy int64"
        raise InputError(f"{name} has dtype {array.dtype}, not an integer type", where=name, remedy=remedy)
    return array.astype(np.int64)


def _as_rows(value: Any) -> tuple[list[NDArray[np.int64]], bool]:
    if isinstance(value, list | tuple) and value and all(_rank(entry) == 1 for entry in value):
        rows = [_as_array(entry, f"input_ids[{index}]") for index, entry in enumerate(value)]
        if all(row.ndim == 1 for row in rows):
            return rows, False
    array = _as_array(value, "input_ids")
    if array.ndim == 1 and array.size:
        return [array], True
    if array.size == 0 and array.ndim < 3:
        raise InputError("the batch is empty", where="input_ids", remedy="Give at least one sequence of one token")
    if array.ndim != 2:
        what = f"input_ids has rank {array.ndim}, shape {array.shape}"
        raise InputError(what, where="input_ids", remedy="Give one sequence, or [batch, sequence]")
    return list(array), False


def _rank(entry: Any) -> int:
    """Dimensions of one entry of a list; -1 when it is ragged itself."""
    if hasattr(entry, "ndim"):
        return int(entry.ndim)
    try:
        return np.ndim(entry)
    except ValueError:
        return -1


def _apply_mask(rows: list[NDArray[np.int64]], value: Any, single: bool) -> list[NDArray[np.int64]]:
    masks, mask_single = _as_rows_of_mask(value)
    shapes, expected = [len(mask) for mask in masks], [len(row) for row in rows]
    if shapes != expected or single != mask_single:
        what = f"attention_mask has rows of {shapes[:_SHOWN]} entries, input_ids of {expected[:_SHOWN]}"
        raise InputError(what, where="attention_mask", remedy="Give a mask of the shape of input_ids")
    result = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        if len(mask) and (mask.min() < 0 or mask.max() > 1):
            raise InputError("attention_mask holds other values than 0 and 1", where=f"attention_mask[{index}]")
        real = np.flatnonzero(mask)
        if len(real) and real[-1] - real[0] + 1 != len(real):
            what = "attention_mask has holes between real tokens, which a causal model's cache does not have"
            raise InputError(what, where=f"attention_mask[{index}]", remedy="Pad on the left or on the right only")
        result.append(row[real])
    return result


def _as_rows_of_mask(value: Any) -> tuple[list[NDArray[np.int64]], bool]:
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | np.ndarray):
        return [_as_array(entry, f"attention_mask[{i}]", allow_bool=True) for i, entry in enumerate(value)], False
    array = _as_array(value, "attention_mask", allow_bool=True)
    if array.ndim not in (1, 2):
        raise InputError(f"attention_mask has rank {array.ndim}, shape {array.shape}", where="attention_mask")
    return ([array], True) if array.ndim == 1 else (list(array), False)


__all__ = ["DEFAULT_NEW_TOKENS", "GenerationOptions", "RequestReader", "check_texts"]
