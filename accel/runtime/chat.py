"""Chat templates in jinja2's immutable sandbox, with the globals and filters that transformers gives them.

A template comes with the model and is untrusted code: it sees plain JSON data only, and an
attempt to reach Python internals raises instead of rendering as nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from accel.errors import AccelError, BundleError, InputError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# Names a message's reasoning is passed under; transformers fills in the first from the others.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class ChatTemplates:
    """The templates of one model, compiled on first use. Thread-safe."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Keeps the templates.

        Args:
            templates: Template text by name; the usual one is called ``default``. May be empty.
            special_tokens: ``bos_token``, ``eos_token`` and the like, visible to the templates.
        """
        self._templates, self._special_tokens = dict(templates), dict(special_tokens)
        self._compiled: dict[str, Template] = {}

    def __bool__(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model's prompt text; encode it without adding special tokens.

        Args:
            messages: ``{"role": ..., "content": ...}`` mappings, at least one. A None value counts as absent.
            add_generation_prompt: End with the header that makes the assistant speak.
            chat_template: A template's name, or a template; None: the model's own.
            variables: Further template variables (``tools`` and ``documents``: lists of dicts).

        Raises:
            InputError: no template; malformed messages; a value that is not JSON data; or the template refused them.
            BundleError: the template is not valid, or tries to leave its sandbox.
        """
        if variables.pop("continue_final_message", False):
            raise InputError(
                "continue_final_message is not supported",
                where="continue_final_message",
                remedy="Render with add_generation_prompt=True and append the beginning of the answer to the text",
            )
        chat = _check_messages(messages)
        for name in ("tools", "documents"):
            variables[name] = _check_dicts(name, variables.get(name))
        text = self._choose(chat_template, with_tools=variables["tools"] is not None)
        plain = _plain(variables, "the template variables")
        return self._render(
            text,
            {**self._special_tokens, "messages": chat, "add_generation_prompt": bool(add_generation_prompt), **plain},
        )

    def _choose(self, chat_template: str | None, with_tools: bool) -> str:
        """A template's text: by name, as given, ``tool_use`` for tools, else the default."""
        if chat_template is not None:
            return self._templates.get(chat_template, chat_template)
        if not self._templates:
            raise InputError(
                "this model has no chat template",
                where="chat_template",
                remedy="Pass chat_template=... with a Jinja template, or give the prompt as plain text",
            )
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        raise InputError(
            "this model has several chat templates and none is called default",
            where="chat_template",
            remedy=f"Pass chat_template= one of {', '.join(sorted(self._templates))}",
        )

    def _render(self, text: str, variables: dict[str, Any]) -> str:
        from jinja2 import TemplateSyntaxError
        from jinja2.exceptions import SecurityError

        try:
            template = self._compiled.get(text)
            if template is None:
                template = self._compiled[text] = make_environment().from_string(text)
            return template.render(**variables)
        except TemplateSyntaxError as error:
            raise BundleError(
                f"the chat template is not valid Jinja: {error}",
                where=f"chat template, line {error.lineno}",
                remedy="Repair the model's chat_template.jinja, or pass chat_template=...",
            ) from error
        except SecurityError as error:
            raise BundleError(
                f"the chat template tried something unsafe: {error}",
                where="chat template",
                remedy="Do not trust this model's files; pass a chat_template=... of your own",
            ) from error
        except AccelError:
            raise
        except Exception as error:  # a template can raise anything on data that it does not expect
            raise InputError(
                f"the chat template refused these messages: {error or type(error).__name__}",
                where="messages",
                remedy="Check the roles, their order and the contents against what the model's template expects",
            ) from error


def make_environment() -> Environment:
    """The Jinja environment of transformers' ``apply_chat_template``, stricter about unsafe attributes."""
    import jinja2
    import jinja2.ext
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class StrictSandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            # Jinja would return an undefined value here, which prints as nothing.
            raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__}")

    class GenerationBlock(jinja2.ext.Extension):
        """``{% generation %}`` marks assistant text for training; here its body is rendered as it stands."""

        tags: set[str] = {"generation"}  # noqa: RUF012 (the base class declares it without ClassVar)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class TemplateNamespace(jinja2.utils.Namespace):
        """A namespace without underscore-prefixed attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja: leaves the name self free for the template
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    environment = StrictSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_TemplateDict(), namespace=TemplateNamespace
    )
    return environment


def _refuse_private(name: object) -> None:
    from jinja2.exceptions import SecurityError

    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute {name!r} that starts with an underscore")


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no chat template wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _TemplateDict:
    """Stands for ``dict`` in templates, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages as plain data, without None values, with reasoning under its standard name."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            f"messages must be a list of mappings, not {type(messages).__name__}",
            where="messages",
            remedy='Pass [{"role": "user", "content": "..."}]',
        )
    if not messages:
        raise InputError("the conversation is empty", where="messages", remedy="Pass at least one message")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    remedy = 'A message is {"role": "user", "content": "..."}'
    if not isinstance(message, Mapping):
        raise InputError(f"a message must be a mapping, not {type(message).__name__}", where=where, remedy=remedy)
    plain = _plain({key: value for key, value in message.items() if value is not None}, where)
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        raise InputError("a message must have a role", where=where, remedy=remedy)
    content = plain.get("content")
    parts = isinstance(content, list | tuple) and all(isinstance(part, dict) for part in content)
    if not isinstance(content, str) and not parts and not (content is None and "tool_calls" in plain):
        raise InputError("a message's content must be text or a list of parts", where=where, remedy=remedy)
    reasoning = next((plain[name] for name in _REASONING_NAMES if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _check_dicts(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)):
        return value
    raise InputError(f"{name} must be a list of mappings", where=name, remedy="Describe each one as JSON data")


def _plain(value: Any, where: str) -> Any:
    """A deep copy made of plain JSON types, so that a template meets no object with methods of its own."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    raise InputError(
        f"a {type(value).__name__} cannot be given to a chat template",
        where=where,
        remedy="Give text, numbers, booleans, lists and mappings only",
    )
