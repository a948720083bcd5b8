"""Chat templates: the same text as transformers renders, bad conversations named, the sandbox closed."""

from __future__ import annotations

import enum
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.errors import BundleError, InputError
from accel.runtime.chat import ChatTemplates
from accel.runtime.text import Tokenizer
from tests.runtime.tokenizer_folders import CHATML, Folder, write_byte_level

# Uses what real templates use: namespaces, loop controls, tojson, filters, tests, macros, block trimming.
ELABORATE = """{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=1) }}
    {%- endfor %}
{%- endif %}
{% set ns = namespace(turns=0, system=none) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% set ns.system = message.content | trim %}
        {% continue %}
    {% endif %}
    {% if message.role == 'stop' %}{% break %}{% endif %}
    {% set ns.turns = ns.turns + 1 %}
{{ bos_token if loop.first else '' }}[{{ message['role'] | upper }}:{{ loop.index0 }}]
    {%- if message.content is string %}
 {{ message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %} {{ part.text }}{% endfor %}
    {%- endif %}
    {% if message.reasoning_content is defined %}
<think>{{ message.reasoning_content }}</think>
    {% endif %}
    {% generation %}
{{ eos_token }}
    {% endgeneration %}
{% endfor %}
{{ ns.turns }} {{ ns.system | default('none', true) }} {{ {'a<b': 'é"'} | tojson }} {{ dict(x=1).x }}
{% if enable_thinking is defined and enable_thinking is false %}no thinking{% endif %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "  You are terse. "},
        {"role": "user", "content": '你好 😀 <tag> & "quotes"'},
        {"role": "assistant", "content": "Hi.\n\nTwo lines", "name": None},
        {"role": "user", "content": " and { braces } {{ not }} {% rendered %}"},
    ],
]
RICH: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "answer", "thinking": "because"},
        {"role": "stop", "content": "x"},
        {"role": "user", "content": "never rendered"},
    ],
]


def _render_both(folder: Folder, messages: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(folder.path))
    options = {"add_generation_prompt": True, **options}
    expected = reference.apply_chat_template(messages, tokenize=False, **options)
    return Tokenizer.from_bundle(folder).apply_chat_template(messages, **options), expected


@pytest.mark.parametrize("template", [CHATML, ELABORATE], ids=["chatml", "elaborate"])
@pytest.mark.parametrize("prompt", [True, False])
def test_text_is_that_of_transformers(template: str, prompt: bool, tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, template)
    for messages in CONVERSATIONS + (RICH if template is ELABORATE else []):
        actual, expected = _render_both(folder, messages, add_generation_prompt=prompt)
        assert actual == expected
        assert len(actual) > 20


def test_variables_and_tools_reach_the_template(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, ELABORATE)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    actual, expected = _render_both(folder, CONVERSATIONS[1], tools=tools, enable_thinking=False)
    assert actual == expected
    assert "<tools>" in actual
    assert "no thinking" in actual


def test_template_file_comes_before_the_config(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, "from the config")
    (tmp_path / "chat_template.jinja").write_text("from the file {{ messages[0].content }}")
    actual, expected = _render_both(folder, CONVERSATIONS[0])
    assert actual == expected == "from the file Hello"


def test_named_templates(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "default"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "rag {{ documents[0].text }}"},
    ]
    folder = write_byte_level(tmp_path, named)
    messages = CONVERSATIONS[0]
    assert _render_both(folder, messages) == ("default", "default")
    assert _render_both(folder, messages, tools=[{"name": "f"}]) == ("tools", "tools")
    documents = [{"text": "d"}]
    assert _render_both(folder, messages, chat_template="rag", documents=documents) == ("rag d", "rag d")
    assert _render_both(folder, messages, chat_template="{{ eos_token }}") == ("<|im_end|>", "<|im_end|>")


def test_rendered_chat_encodes_to_the_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_bundle(write_byte_level(tmp_path))
    ids = tokenizer.encode(tokenizer.apply_chat_template(CONVERSATIONS[0]), add_special_tokens=False)
    assert ids.count(1) == 2  # <|im_start|>, once for each side
    assert ids.count(2) == 1  # <|im_end|>


def test_time_is_that_of_the_call() -> None:
    rendered = ChatTemplates({"default": "{{ strftime_now('%Y') }}"}, {}).render(CONVERSATIONS[0])
    assert int(rendered) in (datetime.now().year, datetime.now().year - 1)


def test_no_template_names_the_remedy(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_bundle(write_byte_level(tmp_path, template=None))
    assert not tokenizer.chat_templates
    with pytest.raises(InputError, match="no chat template.*Pass chat_template="):
        tokenizer.apply_chat_template(CONVERSATIONS[0])


def test_several_templates_without_a_default() -> None:
    with pytest.raises(InputError, match="one of a, b"):
        ChatTemplates({"b": "B", "a": "A"}, {}).render(CONVERSATIONS[0])


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (None, "messages"),
        ([["user", "x"]], "messages[0]"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], "messages[1]"),
        ([{"role": "", "content": "x"}], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": None}], "messages[0]"),
        ([{"role": "user", "content": 3}], "messages[0]"),
        ([{"role": "user", "content": ["x"]}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "image", "image": np.zeros(3)}]}], "messages[0]"),
    ],
)
def test_malformed_messages_are_located(messages: Any, where: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplates({"default": CHATML}, {}).render(messages)
    assert caught.value.where == where
    assert caught.value.remedy


def test_tool_calls_need_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert ChatTemplates({"default": "{{ messages[0].tool_calls[0].name }}"}, {}).render([message]) == "f"


def test_what_the_template_refuses_is_reported() -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    with pytest.raises(InputError, match="Roles must alternate"):
        ChatTemplates({"default": template}, {}).render(CONVERSATIONS[1])
    with pytest.raises(InputError, match="refused these messages"):
        ChatTemplates({"default": "{{ 1 // 0 }}"}, {}).render(CONVERSATIONS[0])


@pytest.mark.parametrize("option", [{"continue_final_message": True}, {"tools": [len]}, {"documents": "d"}, {"x": {1}}])
def test_options_that_would_be_lost_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ChatTemplates({"default": CHATML}, {}).render(CONVERSATIONS[0], **option)


def test_invalid_template() -> None:
    with pytest.raises(BundleError, match="not valid Jinja"):
        ChatTemplates({"default": "{% for %}"}, {}).render(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ dict.__class__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__dict__ = 1 %}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__ }}",
        "{{ messages.__len__() }}",
    ],
)
def test_escapes_from_the_sandbox_raise(template: str) -> None:
    with pytest.raises(BundleError, match="tried something unsafe"):
        ChatTemplates({"default": template}, {}).render(CONVERSATIONS[0])


def test_templates_see_plain_data_and_cannot_change_the_caller_s() -> None:
    class Role(str, enum.Enum):  # noqa: UP042 (callers write it this way)
        USER = "user"

    message = {"role": Role.USER, "content": "x", "n": np.int64(3), "flag": np.bool_(False), "parts": ("a", "b")}
    template = "{{ messages[0].role }} {{ messages[0].n }} {{ 1 if messages[0].flag else 0 }} {{ messages[0].parts }}"
    assert ChatTemplates({"default": template}, {}).render([message]) == "user 3 0 ('a', 'b')"
    assert message["role"] is Role.USER
