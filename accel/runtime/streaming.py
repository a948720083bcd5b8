"""Text that comes piece by piece: from tokens to final characters, and stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from accel.errors import InputError

# What tokenizers decode bytes to that are not (yet) a whole character.
_REPLACEMENT = "\ufffd"


class Cleanup(Protocol):
    """A change made to decoded text, such as removing spaces before punctuation."""

    def apply(self, text: str) -> str: ...

    def may_change(self, text: str) -> bool:
        """Whether the end of this text, not yet cleaned, may be the beginning of something that is changed."""
        ...


class StreamDecoder:
    """Turns token ids into text, one at a time, such that the pieces join to the one-shot decoding.

    Cases: characters split over tokens (held back until whole); byte-fallback tokens ``<0xE4>`` (held
    back until a token of another kind follows, since one stray byte spoils a whole run of them);
    a leading space that the tokenizer drops at the start of a text only; skipped special tokens.
    ``tokenizers``' own ``DecodeStream`` raises in the second case and cannot be flushed.

    Work per token does not grow with the text: only the tokens since the last piece but one
    are decoded again. One stream, one thread.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_silent: Callable[[int], bool] = lambda token: False,
        byte_tokens: Collection[int] = (),
        cleanup: Cleanup | None = None,
    ) -> None:
        """Starts at the beginning of a text.

        Args:
            decode: One-shot decoding of ids, without any clean-up.
            is_silent: Whether a token has no text (skipped special tokens, ids outside the vocabulary).
            byte_tokens: The byte-fallback tokens of the vocabulary.
            cleanup: What is done to the decoded text; None: nothing.
        """
        self._decode, self._is_silent, self._byte_tokens, self._cleanup = decode, is_silent, byte_tokens, cleanup
        self._context: list[int] = []  # tokens of the last piece: spaces depend on what stands before
        self._context_size = 0  # characters they decode to
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is final since the last call, often empty."""
        if self._is_silent(token):
            return ""
        self._pending.append(token)
        if token in self._byte_tokens:
            return ""
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) or (self._cleanup and self._cleanup.may_change(text)):
            return ""
        text = self._clean(text)
        if len(text) <= self._context_size:
            return ""
        piece = text[self._context_size :]
        self._context, self._pending = self._pending, []
        self._context_size = len(self._clean(self._decode(self._context)))
        return piece

    def flush(self) -> str:
        """Ends the text; returns what was held back (broken characters as U+FFFD)."""
        if not self._pending:
            return ""
        piece = self._clean(self._decode(self._context + self._pending))[self._context_size :]
        self._context, self._context_size, self._pending = [], 0, []
        return piece

    def _clean(self, text: str) -> str:
        return self._cleanup.apply(text) if self._cleanup else text


class StopStrings:
    """Watches streamed text for stop strings and cuts it before the first one that is complete.

    The outcome does not depend on how the text is split into pieces: of several matches the one
    that ends first wins, and of those that end together the longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Starts with no text.

        Raises:
            InputError: an empty stop string, or one that is not text.
        """
        strings = [stop] if isinstance(stop, str) else list(stop)
        for string in strings:
            if not isinstance(string, str) or not string:
                raise InputError(f"a stop string must be non-empty text, not {string!r}", where="stop")
        self._strings = tuple(strings)
        self._held = ""
        self._stopped = False

    def push(self, text_piece: str) -> tuple[str, bool]:
        """Adds text; returns what may be shown and whether a stop string is complete (nothing comes after that)."""
        if self._stopped:
            return "", True
        if not self._strings:
            return text_piece, False
        text = self._held + text_piece
        matches = [(text.find(string), string) for string in self._strings]
        ends = [(start + len(string), start) for start, string in matches if start >= 0]
        if ends:
            self._stopped, self._held = True, ""
            return text[: min(ends)[1]], True
        keep = self._open_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Ends the text; returns what was held back, since no stop string can complete any more."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = min(len(text), max(len(string) for string in self._strings) - 1)
        for size in range(longest, 0, -1):
            if any(len(string) > size and text.endswith(string[:size]) for string in self._strings):
                return size
        return 0
