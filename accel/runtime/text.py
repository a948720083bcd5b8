"""A model's tokenizer, read from a bundle with the ``tokenizers`` library alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from accel.errors import BundleError, InputError
from accel.runtime.chat import ChatTemplates
from accel.runtime.streaming import StopStrings, StreamDecoder
from accel.runtime.tokenizer_files import TokenizerFiles, TokenizerSettings, read_settings

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"


class SpaceCleanup:
    """transformers' ``clean_up_tokenization``: drops the spaces that WordPiece puts before punctuation."""

    _replacements = (
        *((f" {mark}", mark) for mark in ".?!,"),
        (" ' ", "'"),
        *((f" {tail}", tail) for tail in ("n't", "'m", "'s", "'ve", "'re")),
    )
    _unfinished = re.compile(r"(?: | '| n| n'| 'v| 'r)\Z")

    def apply(self, text: str) -> str:
        for spaced, cleaned in self._replacements:
            text = text.replace(spaced, cleaned)
        return text

    def may_change(self, text: str) -> bool:
        return self._unfinished.search(text) is not None


class Encoded(NamedTuple):
    """One encoded text (or pair): ids, segment ids of the same length, and whether it was cut."""

    ids: list[int]
    type_ids: list[int]
    truncated: bool


class Tokenizer:
    """Encodes texts, decodes ids, renders chats. Never changed after construction; thread-safe.

    ``tokenizer.json`` decides what encoding does, the begin-of-sequence token included (as in
    transformers, ``add_bos_token`` of the config does not override it). Padding and truncation
    stored in it are switched off: the callers pad, and ``encode_batch`` truncates.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        from tokenizers import processors

        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = settings.split_special_tokens
        if tokenizer.post_processor is None:  # then the second text of a pair would get segment 0
            tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
        self._tokenizer, self.settings = tokenizer, settings
        self.chat_templates = ChatTemplates(settings.chat_templates, settings.special_tokens)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        model = type(tokenizer.model).__name__
        # Cleaning would eat spaces that a BPE model means; transformers skips it there too.
        self._cleanup = SpaceCleanup() if settings.clean_up_spaces and model != "BPE" else None
        self._byte_tokens = _byte_tokens(tokenizer)

    @classmethod
    def from_bundle(cls, bundle: TokenizerFiles) -> Tokenizer:
        """Reads ``tokenizer.json`` and the configs beside it (each of those optional).

        Raises:
            BundleError: ``tokenizer.json`` is missing, or a file does not hold what it should.
        """
        import tokenizers

        if not bundle.has(TOKENIZER_FILE):
            raise BundleError(
                "the bundle has no tokenizer",
                where=TOKENIZER_FILE,
                remedy="Pass input_ids instead of text, or export again from a folder that has tokenizer.json",
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(bundle.file(TOKENIZER_FILE)))
        except BundleError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise BundleError(
                f"the tokenizer cannot be read: {error}", where=TOKENIZER_FILE, remedy="Export the model again"
            ) from error
        return cls(tokenizer, read_settings(bundle, tokenizer))

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included. The model's embedding may have more rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation, as the generation config, else the config, else the tokenizer has them."""
        return self.settings.eos_token_ids

    @property
    def pad_token_id(self) -> int | None:
        return self.special_token_id("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self.special_token_id("bos_token")

    @property
    def mask_token_id(self) -> int | None:
        return self.special_token_id("mask_token")

    def special_token_id(self, name: str) -> int | None:
        """The id of ``bos_token``, ``pad_token`` and the like; None where the model has none."""
        content = self.settings.special_tokens.get(name)
        return None if content is None else self.token_to_id(content)

    def token_to_id(self, token: str) -> int | None:
        index = self._tokenizer.token_to_id(token)
        return None if index is None else int(index)

    def id_to_token(self, index: int) -> str | None:
        token = self._tokenizer.id_to_token(index)
        return None if token is None else str(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's ids. A rendered chat already has its special tokens: encode it with False.

        Raises:
            InputError: not a str, or one that holds lone surrogates.
        """
        _check_text(text, "text")
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_pair(self, a: str, b: str) -> tuple[list[int], list[int]]:
        """Ids and segment ids of two texts joined with the model's separators."""
        encoded = self.encode_batch([(a, b)], pairs=True)[0]
        return encoded.ids, encoded.type_ids

    def encode_batch(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], max_length: int | None = None, pairs: bool = False
    ) -> list[Encoded]:
        """Encodes many texts (or pairs), without padding, in the caller's order.

        Args:
            texts: Texts, or pairs of texts when ``pairs``.
            max_length: Tokens kept per entry, special ones included; of a pair the longer text is cut
                first. None: everything is kept.
            pairs: Whether the entries are pairs.

        Raises:
            InputError: an entry of the wrong type, or a max_length that leaves no room for text.
        """
        for index, entry in enumerate(texts):
            _check_entry(entry, pairs, f"texts[{index}]")
        special = int(self._tokenizer.num_special_tokens_to_add(pairs))
        if max_length is not None and max_length <= special:
            raise InputError(
                f"max_length {max_length} leaves no room for text beside {special} special tokens",
                where="max_length",
                remedy=f"Use at least {special + 1}",
            )
        result = []
        for entry, encoding in zip(texts, self._tokenizer.encode_batch_fast(list(texts)), strict=True):
            truncated = max_length is not None and len(encoding.ids) > max_length
            if truncated:
                encoding = self._encode_cut(entry, max_length - special, pairs)  # type: ignore[operator]
            result.append(Encoded(encoding.ids, encoding.type_ids, truncated))
        return result

    def _encode_cut(self, entry: Any, room: int, pairs: bool) -> tokenizers.Encoding:
        """Encodes an entry whose text takes more than ``room`` tokens.

        The library's own truncation is a setting of the shared tokenizer, so it is not thread-safe.
        """
        side = self.settings.truncation_side
        texts = list(entry) if pairs else [entry]
        parts = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        lengths = split_room([len(part.ids) for part in parts], room)
        for part, length in zip(parts, lengths, strict=True):
            part.truncate(length, direction=side)
        return self._tokenizer.post_process(parts[0], parts[1] if pairs else None)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; ids outside the vocabulary have none.

        Raises:
            InputError: ids that are not non-negative integers.
        """
        try:
            text = str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
        except (TypeError, OverflowError) as error:
            raise InputError(f"ids must be non-negative integers: {error}", where="ids") from error
        return self._cleanup.apply(text) if self._cleanup else text

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A new incremental decoder; its pieces join to what ``decode`` gives."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        known = self._tokenizer.id_to_token
        return StreamDecoder(
            lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)),
            is_silent=lambda token: token in skipped or known(token) is None,
            byte_tokens=self._byte_tokens,
            cleanup=self._cleanup,
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as prompt text; see ``ChatTemplates.render`` for variables and errors."""
        return self.chat_templates.render(messages, add_generation_prompt, **variables)


def split_room(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens of each text stay when ``room`` tokens are free: the longer text of a pair is cut first."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter, longer = sorted(lengths)
    if shorter + longer > room:
        longer = max(shorter, room - shorter)
        if shorter + longer > room:
            shorter, longer = room // 2, room - room // 2
    return [shorter, longer] if lengths[0] <= lengths[1] else [longer, shorter]


def _byte_tokens(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """The tokens ``<0x00>`` to ``<0xFF>`` where the decoder turns them into bytes."""
    if tokenizer.decoder is None or b"ByteFallback" not in tokenizer.decoder.__getstate__():
        return frozenset()
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(index for index in ids if index is not None)


def _check_entry(entry: object, pairs: bool, where: str) -> None:
    if not pairs:
        _check_text(entry, where)
    elif not isinstance(entry, tuple | list) or len(entry) != 2:
        raise InputError(f"a pair of texts is expected, not {type(entry).__name__}", where=where)
    else:
        for text in entry:
            _check_text(text, where)


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"text must be a str, not {type(text).__name__}", where=where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds a lone surrogate at character {error.start}",
            where=where,
            remedy='Repair it, for instance with text.encode("utf-8", "replace").decode()',
        ) from error


__all__ = [
    "TOKENIZER_FILE",
    "Encoded",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerFiles",
    "TokenizerSettings",
    "read_settings",
    "split_room",
]
