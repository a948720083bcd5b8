"""The texts that a variant is measured on: the user's, or the built-in ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accel.errors import InputError
from accel.passages import read_passages
from accel.quality.texts import PAIRS, PASSAGES

BUILT_IN = "built-in"
MAX_PAIRED = 64  # passages of a user's text whose similarities are compared, each with each


@dataclass(frozen=True)
class TextSet:
    """Passages, and pairs of texts for encoders.

    Attributes:
        name: ``built-in``, the file's name, or ``given``.
        passages: One text each, none empty.
        pairs: Texts whose similarity is compared.
        sha256: Of the passages.
    """

    name: str
    passages: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n\n".join(self.passages).encode("utf-8", "surrogatepass")).hexdigest()


def resolve_text(text: str | Path | Sequence[str] | None) -> TextSet:
    """The texts to measure on.

    Args:
        text: A UTF-8 file whose passages are separated by blank lines; a list of passages; or None for the built-in
            texts. The pairs of a text that is given are each of its first 64 passages with each other one.

    Raises:
        InputError: The file cannot be read, is no UTF-8, binary or JSON, or there is no passage; one is no string, or
            empty.
    """
    if text is None:
        return TextSet(BUILT_IN, PASSAGES, PAIRS)
    if isinstance(text, str | Path):
        path = Path(text)
        return _paired(path.name, read_passages(path, "The text"), str(path))
    if not isinstance(text, Sequence) or isinstance(text, bytes):
        remedy = "Give a UTF-8 file, or a list of passages"
        raise InputError(f"{text!r:.60} is no text to measure on", where="text", remedy=remedy)
    for index, passage in enumerate(text):
        if not isinstance(passage, str) or not passage.strip():
            shown = repr(passage)[:60]
            raise InputError(f"A passage is no text: {shown}", where=f"text[{index}]", remedy="Leave it out")
    return _paired("given", tuple(text), "text")


def _paired(name: str, passages: tuple[str, ...], where: str) -> TextSet:
    if not passages:
        remedy = "Give at least one passage; blank lines separate them"
        raise InputError("There is no text to measure on", where=where, remedy=remedy)
    first = tuple(dict.fromkeys(passages))[:MAX_PAIRED]
    pairs = tuple((a, b) for index, a in enumerate(first) for b in first[index + 1 :])
    return TextSet(name, passages, pairs)


__all__ = ["BUILT_IN", "TextSet", "resolve_text"]
