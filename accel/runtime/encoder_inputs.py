"""Checks of what a caller hands to an encoder: token arrays and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import InputError

Text = str | tuple[str, str]
_SHOWN = 5  # positions listed in an error


class TokenInputs:
    """Turns the arrays of one call into feeds, or says what is wrong with them.

    Args:
        vocab_size: Ids are below it.
        max_positions: Longest sequence.
        with_type_ids: Whether the graph has ``token_type_ids``.
        type_vocab_size: Token types are below it; None: not known.
    """

    def __init__(self, vocab_size: int, max_positions: int, with_type_ids: bool, type_vocab_size: int | None) -> None:
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.with_type_ids, self.type_vocab_size = with_type_ids, type_vocab_size

    def prepare(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> dict[str, NDArray[np.int64]]:
        """int64 [B, S] feeds. What says nothing is left out: a mask of ones, token types of zeros.

        Raises:
            InputError: Wrong dtype, rank or shape; an empty batch; ids or types out of range; a sequence that is
                too long; a mask with other values than 0 and 1, or with a row of zeros.
        """
        ids = _as_int64(input_ids, "input_ids")
        if ids.ndim != 2:
            remedy = "Give [batch, sequence]; wrap one sequence in a list"
            raise InputError(f"input_ids has rank {ids.ndim}, shape {ids.shape}", where="input_ids", remedy=remedy)
        if ids.size == 0:
            what = f"The batch is empty: input_ids has shape {ids.shape}"
            raise InputError(what, where="input_ids", remedy="Give at least one row of at least one token")
        if ids.shape[1] > self.max_positions:
            what = f"The sequence of {ids.shape[1]} tokens is longer than the model's {self.max_positions} positions"
            raise InputError(what, where="input_ids", remedy="Truncate or split the text")
        _check_range(ids, self.vocab_size, "input_ids", "the vocabulary")
        feeds = {"input_ids": ids}
        mask = None if attention_mask is None else self._mask(attention_mask, ids.shape)
        if mask is not None:
            feeds["attention_mask"] = mask
        types = None if token_type_ids is None else self._types(token_type_ids, ids.shape)
        if types is not None:
            feeds["token_type_ids"] = types
        return feeds

    def _mask(self, value: Any, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
        mask = _as_int64(value, "attention_mask", allow_bool=True)
        _check_shape(mask, shape, "attention_mask")
        if mask.item(mask.argmin()) == 1 == mask.item(mask.argmax()):
            return None
        if mask.min() < 0 or mask.max() > 1:
            bad = sorted(set(mask[(mask != 0) & (mask != 1)].tolist()))[:_SHOWN]
            what = f"attention_mask holds other values than 0 and 1: {bad}"
            raise InputError(what, where="attention_mask", remedy="1 keeps a token, 0 marks padding")
        if not mask.any(axis=1).all():
            rows = np.flatnonzero(~mask.any(axis=1))[:_SHOWN].tolist()
            what = f"attention_mask is all zero in rows {rows}"
            raise InputError(what, where="attention_mask", remedy="Leave rows without a token out of the batch")
        return mask

    def _types(self, value: Any, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
        types = _as_int64(value, "token_type_ids")
        _check_shape(types, shape, "token_type_ids")
        if _largest(types) == 0:
            return None
        if not self.with_type_ids:
            what = "The model has no token types, but token_type_ids is not all zero"
            raise InputError(what, where="token_type_ids", remedy="Leave token_type_ids out")
        if self.type_vocab_size is not None:
            _check_range(types, self.type_vocab_size, "token_type_ids", "the token types")
        return types


def _as_int64(value: Any, name: str, allow_bool: bool = False) -> NDArray[np.int64]:
    if type(value) is np.ndarray and value.dtype == np.int64 and value.ndim and value.flags.c_contiguous:
        return value
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        remedy = "Pad them to one length and mark the padding in attention_mask"
        raise InputError(f"The rows of {name} differ in length", where=name, remedy=remedy) from error
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)  # an empty list reads as float64; the emptiness is what is wrong
    if array.dtype.kind not in ("iub" if allow_bool else "iu"):
        raise InputError(f"{name} has dtype {array.dtype}", where=name, remedy="Give integers, e.g. int64")
    return np.ascontiguousarray(array, np.int64) if array.ndim else array.astype(np.int64)


def _check_shape(array: NDArray, shape: tuple[int, ...], name: str) -> None:
    if array.shape != shape:
        what = f"{name} has shape {array.shape}, input_ids has {shape}"
        raise InputError(what, where=name, remedy="Give both the same shape")


def _largest(array: NDArray[np.int64]) -> int:
    """The largest number, a negative one read as a huge one. Next to a small run ``max()`` would cost 10 us more."""
    unsigned = array.view(np.uint64)
    return unsigned.item(unsigned.argmax())


def _check_range(array: NDArray, size: int, name: str, of: str) -> None:
    if _largest(array) >= size:
        row, column = np.argwhere((array < 0) | (array >= size))[0].tolist()
        what = f"{name}[{row}, {column}] = {array[row, column]} is outside {of} of size {size}"
        raise InputError(what, where=name, remedy=f"Ids are 0 to {size - 1}; use the model's own tokenizer")


def check_texts(texts: Any, allow_pairs: bool = False, where: str = "texts") -> tuple[list[Any], bool, bool]:
    """The texts as a list.

    Args:
        texts: One string, or a sequence of strings (or, if allowed, of pairs of strings).
        allow_pairs: Whether an item may be a pair.
        where: The argument's name.

    Returns:
        The list, whether it was a single string, and whether its items are pairs.

    Raises:
        InputError: Empty, an empty or blank text, something that is no text, or texts mixed with pairs.
    """
    if isinstance(texts, str):
        check_one_text(texts, where)
        return [texts], True, False
    if isinstance(texts, Mapping) or not hasattr(texts, "__iter__"):
        raise InputError(f"Expected texts, got {type(texts).__name__}", where=where, remedy="Give a list of strings")
    items = list(texts)
    if not items:
        raise InputError("The batch is empty", where=where, remedy="Give at least one text")
    pairs = allow_pairs and not isinstance(items[0], str)
    if not pairs:
        for i, item in enumerate(items):
            if not isinstance(item, str) or not item or item.isspace():
                check_one_text(item, f"{where}[{i}]")
        return items, False, False
    checked: list[Text] = []
    for i, item in enumerate(items):
        if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 2:
            raise InputError("Expected a pair of texts", where=f"{where}[{i}]", remedy="Give texts or pairs, not both")
        check_one_text(item[0], f"{where}[{i}][0]")
        check_one_text(item[1], f"{where}[{i}][1]")
        checked.append((item[0], item[1]))
    return checked, False, True


def check_one_text(item: Any, where: str) -> None:
    """Raises InputError unless ``item`` is a string with something in it."""
    if not isinstance(item, str):
        raise InputError(f"Expected a text, got {type(item).__name__}", where=where, remedy="Give a string")
    if not item or item.isspace():
        raise InputError("The text is empty", where=where, remedy="Leave empty texts out")


def check_count(value: Any, name: str, allow_none: bool = True) -> None:
    """Raises InputError unless ``value`` is a positive int (or None, if allowed)."""
    if value is None and allow_none:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} is {value!r}", where=name, remedy="Give a whole number of at least 1")


__all__ = ["Text", "TokenInputs", "check_count", "check_one_text", "check_texts"]
