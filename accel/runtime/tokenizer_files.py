"""What the files beside ``tokenizer.json`` say: special tokens, limits, chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accel.errors import BundleError

if TYPE_CHECKING:
    import tokenizers

_NAMED_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Above this, a tokenizer's model_max_length means "unknown" (transformers writes 1e30).
_NO_LIMIT = 10**9


class TokenizerFiles(Protocol):
    """The part of ``accel.bundle.Bundle`` that a tokenizer needs."""

    def has(self, name: str) -> bool: ...

    def file(self, name: str) -> Path: ...

    def read_json(self, name: str) -> Any: ...


@dataclass(frozen=True)
class TokenizerSettings:
    """What stands beside ``tokenizer.json`` in the other files.

    Attributes:
        special_tokens: Content by name (``bos_token``, ...); only those the model has.
        eos_token_ids: Tokens that end a generation.
        model_max_length: Longest input in tokens; None: not said.
        truncation_side: Which end of a long text is cut.
        clean_up_spaces: Remove spaces before punctuation when decoding.
        split_special_tokens: Treat special tokens in texts as plain text.
        chat_templates: By name.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    model_max_length: int | None = None
    truncation_side: str = "right"
    clean_up_spaces: bool = False
    split_special_tokens: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def read_settings(bundle: TokenizerFiles, tokenizer: tokenizers.Tokenizer) -> TokenizerSettings:
    """Reads the configs beside ``tokenizer.json`` and registers the special tokens that they name.

    Raises:
        BundleError: a config is not a JSON object or an entry has the wrong type.
    """
    config = read_object(bundle, "tokenizer_config.json")
    legacy = read_object(bundle, "special_tokens_map.json")
    model = {**read_object(bundle, "config.json"), **_set_values(read_object(bundle, "generation_config.json"))}
    named = {name: _content(config.get(name, legacy.get(name)), name) for name in _NAMED_TOKENS}
    special = {name: content for name, content in named.items() if content is not None}
    for name in _NAMED_TOKENS:  # gpt2 and its kin name their tokens by id, in config.json alone
        ids = token_ids(model.get(f"{name}_id"), f"{name}_id")
        if name not in special and ids and (content := tokenizer.id_to_token(ids[0])) is not None:
            special[name] = content
    _register(tokenizer, config, [*special.values(), *_extra_tokens(config, legacy)])
    eos = token_ids(model.get("eos_token_id"), "eos_token_id")
    if not eos and "eos_token" in special:
        index = tokenizer.token_to_id(special["eos_token"])
        eos = () if index is None else (index,)
    limit = config.get("model_max_length")
    side = config.get("truncation_side", "right")
    if side not in ("left", "right"):
        raise _malformed("truncation_side", side)
    return TokenizerSettings(
        special_tokens=special,
        eos_token_ids=eos,
        model_max_length=int(limit) if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT else None,
        truncation_side=side,
        clean_up_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        split_special_tokens=bool(config.get("split_special_tokens", False)),
        chat_templates=_chat_templates(bundle, config),
    )


def read_object(bundle: TokenizerFiles, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty when the bundle has none.

    Raises:
        BundleError: the file holds something else.
    """
    if not bundle.has(name):
        return {}
    value = bundle.read_json(name)
    if not isinstance(value, dict):
        raise BundleError("a JSON object was expected", where=name, remedy="Export the model again")
    return value


def _set_values(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _malformed(name: str, value: object) -> BundleError:
    return BundleError(f"{name} has the value {value!r}", where="the tokenizer's configs", remedy="Export again")


def _content(token: Any, name: str) -> str | None:
    """A token's text: given as such, or as an object with its content and flags."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or isinstance(token, str):
        return token or None
    raise _malformed(name, token)


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """A config's entry of one id or several; negative ones, which some configs write for none, are left out.

    Raises:
        BundleError: it holds something else than integers.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise _malformed(name, value)
    return tuple(v for v in values if v >= 0)


def _extra_tokens(config: dict[str, Any], legacy: dict[str, Any]) -> list[str]:
    """Further special tokens, which transformers 5 calls extra and older versions additional."""
    for source in (config, legacy):
        for name in ("extra_special_tokens", "additional_special_tokens"):
            tokens = source.get(name)
            values = list(tokens.values()) if isinstance(tokens, dict) else tokens
            if isinstance(values, list) and values:
                return [content for token in values if (content := _content(token, name)) is not None]
    return []


def _register(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], contents: Sequence[str]) -> None:
    """Adds tokens that only ``tokenizer_config.json`` has, and marks the named ones special.

    A token that the vocabulary lacks is not given a new id: the model has no embedding for it.
    """
    import tokenizers

    known = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for index, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        if fields["content"] not in known and tokenizer.token_to_id(fields["content"]) in (None, int(index)):
            tokenizer.add_tokens([tokenizers.AddedToken(**fields)])
            if tokenizer.token_to_id(fields["content"]) != int(index):
                raise _malformed(f"added_tokens_decoder[{index}]", fields["content"])
            known[fields["content"]] = bool(fields.get("special", False))
    for content in contents:
        if not known.get(content, False) and tokenizer.token_to_id(content) is not None:
            tokenizer.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])


def _chat_templates(bundle: TokenizerFiles, config: dict[str, Any]) -> dict[str, str]:
    """``chat_template.jinja`` first; else the config's template, or its list of named ones."""
    if bundle.has("chat_template.jinja"):
        return {"default": bundle.file("chat_template.jinja").read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    except (TypeError, KeyError) as error:
        raise _malformed("chat_template", template) from error
