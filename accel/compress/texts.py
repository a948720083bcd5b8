"""Calibration data: the user's text or token ids, or the built-in text, as samples of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.compress.builtin_texts import TEXTS
from accel.errors import InputError
from accel.passages import CHARACTERS, read_passages
from accel.runtime.text import Tokenizer
from accel.spec import ArchSpec

BUILT_IN = "built-in"
WINDOW = 512  # tokens of one sample of a decoder
MIN_TOKENS = 256  # fewer say next to nothing of what a layer's inputs are like
MAX_TOKENS = 16384  # more changes little, and all are held in memory

Source = str | Path | Sequence[str] | Sequence[Sequence[int]] | Sequence[NDArray] | None


@dataclass(frozen=True)
class Calibration:
    """Samples that an algorithm looks at.

    Attributes:
        name: ``built-in``, the file's name, or ``given``.
        samples: Token ids, int64 [n] each, n >= 2; one sequence each, special tokens included.
        sha256: Of the ids.
    """

    name: str
    samples: tuple[NDArray[np.int64], ...]

    @property
    def tokens(self) -> int:
        """In all samples together."""
        return sum(map(len, self.samples))

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(np.ascontiguousarray(sample, "<i8").tobytes() + b"\n")
        return digest.hexdigest()


def resolve_calibration(
    source: Source, arch: ArchSpec, tokenizer: Tokenizer | None, max_tokens: int = MAX_TOKENS
) -> Calibration:
    """Makes samples of what the user gives.

    Args:
        source: A UTF-8 file whose passages are separated by blank lines; a list of passages; a list of sequences of
            token ids; or None for the built-in text.
        arch: The model's. Decoders get passages joined into samples of 512 tokens, encoders one passage each.
        tokenizer: The model's; None: it has none, and ``source`` must be token ids.
        max_tokens: What comes later is not looked at.

    Raises:
        InputError: The file cannot be read, is no UTF-8, binary or JSON; nothing is in it; there are less than 256
            tokens; an entry is neither a text nor token ids of the model; or the model has no tokenizer for a text.
    """
    if source is None:
        return _checked(Calibration(BUILT_IN, _samples(TEXTS, arch, _needed(tokenizer), max_tokens)))
    if isinstance(source, str | Path):
        path = Path(source)
        texts = read_passages(path, "the calibration text")
        if not texts:
            raise _empty(str(path))
        return _checked(Calibration(path.name, _samples(texts, arch, _needed(tokenizer), max_tokens)))
    if not isinstance(source, Sequence | np.ndarray):
        remedy = "Give a UTF-8 file, a list of passages, or a list of sequences of token ids"
        raise InputError(f"{source!r:.60} is no calibration data", where="calibration", remedy=remedy)
    entries = list(source)
    if not entries:
        raise _empty("calibration")
    if all(isinstance(entry, str) for entry in entries):
        texts = tuple(entry for entry in entries if isinstance(entry, str) and entry.strip())
        if not texts:
            raise _empty("calibration")
        return _checked(Calibration("given", _samples(texts, arch, _needed(tokenizer), max_tokens)))
    rows = [_ids(entry, arch, f"calibration[{index}]") for index, entry in enumerate(entries)]
    return _checked(Calibration("given", tuple(_cut(rows, max_tokens))))


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        remedy = "Give token ids: calibration=[[1, 734, ...], ...]; or export again from a folder with tokenizer.json"
        raise InputError("the model has no tokenizer to read a text with", where="calibration", remedy=remedy)
    return tokenizer


def _empty(where: str) -> InputError:
    remedy = "Give at least 256 tokens of text like the model's own use, or leave it out for the built-in text"
    return InputError("the calibration data is empty", where=where, remedy=remedy)


def _checked(calibration: Calibration) -> Calibration:
    if calibration.tokens < MIN_TOKENS:
        what = f"the calibration data is too short: {calibration.tokens} tokens, and {MIN_TOKENS} are the least"
        remedy = "Give more text (some thousand tokens are good), or leave it out for the built-in text"
        raise InputError(what, where=calibration.name, remedy=remedy)
    return calibration


def _samples(texts: Sequence[str], arch: ArchSpec, tokenizer: Tokenizer, limit: int) -> tuple[NDArray[np.int64], ...]:
    width = min(WINDOW, arch.max_positions)
    if arch.kind == "encoder":
        some = [text[: width * CHARACTERS] for text in texts[:limit]]  # each has a token at least
        encoded = (np.array(item.ids, np.int64) for item in tokenizer.encode_batch(some, max_length=width))
        return tuple(_cut((row for row in encoded if len(row) > 1), limit))
    start = [token for token in tokenizer.encode("") if token not in tokenizer.eos_token_ids][:1]
    stream: list[int] = []
    for text in texts:
        part = text[: (limit - len(stream)) * CHARACTERS]
        stream += tokenizer.encode(part + "\n\n", add_special_tokens=False)
        if len(stream) >= limit:
            break
    room = width - len(start)
    rows = [np.array(start + stream[at : at + room], np.int64) for at in range(0, min(len(stream), limit), room)]
    return tuple(_cut((row for row in rows if len(row) > 1), limit))


def _cut(rows: Iterable[NDArray[np.int64]], limit: int) -> list[NDArray[np.int64]]:
    """The first rows, up to a number of tokens."""
    result, left = [], limit
    for row in rows:
        if left < 2:
            break
        result.append(row[:left])
        left -= len(row)
    return result


def _ids(entry: Any, arch: ArchSpec, where: str) -> NDArray[np.int64]:
    remedy = "Give texts, or sequences of at least two token ids of this model; not both"
    try:
        row = np.asarray(entry)
    except ValueError as error:
        raise InputError(f"neither a text nor token ids: {error}", where=where, remedy=remedy) from error
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer) or len(row) < 2:
        shown = repr(entry)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise InputError(f"neither a text nor token ids: {shown}", where=where, remedy=remedy)
    outside = row[(row < 0) | (row >= arch.vocab_size)]
    if len(outside):
        what = f"{outside[0]} is no token of a vocabulary of {arch.vocab_size}"
        raise InputError(what, where=where, remedy=remedy)
    if len(row) > arch.max_positions:
        what = f"{len(row)} tokens are more than the model's {arch.max_positions} positions"
        raise InputError(what, where=where, remedy="Cut the sequence")
    return row.astype(np.int64)


__all__ = ["BUILT_IN", "Calibration", "Source", "resolve_calibration"]
