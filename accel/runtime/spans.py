"""Tokenizing with character offsets, for the tasks that point into the text."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from accel.bundle import Bundle
from accel.errors import BundleError, InputError
from accel.runtime.tokenizer_files import read_settings

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MIN_WINDOW = 8  # context tokens that a window must hold at least to be of any use


class SpanTokenizer:
    """The bundle's tokenizer with offsets, words and sequence ids. Thread-safe.

    Args:
        bundle: Holds ``tokenizer.json``.

    Raises:
        BundleError: It does not, or the file cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        from tokenizers import Tokenizer

        path = bundle.file("tokenizer.json")
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            what = f"The tokenizer cannot be read: {error}"
            raise BundleError(what, where=str(path), remedy="Export the model again") from error
        self._tokenizer.no_padding()
        settings = read_settings(bundle, self._tokenizer)
        self._tokenizer.encode_special_tokens = settings.split_special_tokens
        self._side = settings.truncation_side
        self._lock = threading.Lock()  # truncation is a state of the tokenizer
        self.mask_token = settings.special_tokens.get("mask_token")
        self.mask_id = self._tokenizer.token_to_id(self.mask_token) if self.mask_token else None

    def encode(self, texts: list[str], limit: int) -> list[Encoding]:
        """One encoding of at most ``limit`` tokens per text; ``.overflowing`` is not empty where it was cut."""
        with self._lock:
            self._tokenizer.enable_truncation(limit, direction=self._side)
            return self._tokenizer.encode_batch(texts)

    def windows(self, question: str, context: str, limit: int, stride: int) -> list[Encoding]:
        """The question with each overlapping window of the context.

        Args:
            question: First sequence, whole in each window.
            context: Second sequence.
            limit: Tokens per window.
            stride: Tokens that neighbouring windows share.

        Raises:
            InputError: The question leaves no room for the context.
        """
        with self._lock:
            self._tokenizer.no_truncation()
            fixed = len(self._tokenizer.encode(question, "").ids)
            room = limit - fixed
            if room < MIN_WINDOW:
                what = f"The question of {fixed} tokens leaves {max(room, 0)} of {limit} tokens for the context"
                raise InputError(what, where="question", remedy="Shorten the question")
            self._tokenizer.enable_truncation(limit, stride=min(stride, room // 2), strategy="only_second")
            first = self._tokenizer.encode(question, context)
        return [first, *first.overflowing]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The text of one token; special tokens by name."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


__all__ = ["SpanTokenizer"]
