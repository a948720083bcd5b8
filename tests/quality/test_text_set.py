from __future__ import annotations

from pathlib import Path

import pytest

from accel.bench.sentences import docstring_passages
from accel.errors import InputError
from accel.passages import split_passages
from accel.quality import resolve_text
from accel.quality.text_set import MAX_PAIRED
from accel.quality.texts import PAIRS, PASSAGES


def test_the_built_in_set() -> None:
    text = resolve_text(None)
    assert text.name == "built-in" and len(text.passages) == len(set(PASSAGES)) == 40
    assert len(text.pairs) == len(set(PAIRS)) == 40
    assert all(passage == " ".join(passage.split()) and len(passage) > 250 for passage in PASSAGES)
    assert text.sha256 == resolve_text(None).sha256 != resolve_text(PASSAGES[:39]).sha256


def test_blank_lines_separate_passages(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffone\r\nstill one\r\n \t\r\n\r\ntwo\n\n\n\nthree  \n".encode())
    text = resolve_text(path)
    assert text.passages == ("one\nstill one", "two", "three") and text.name == "text.txt"
    assert text.pairs == (("one\nstill one", "two"), ("one\nstill one", "three"), ("two", "three"))
    assert resolve_text(str(path)) == text
    assert split_passages("  \n\n ") == ()


def test_pairs_of_a_long_text_are_limited() -> None:
    text = resolve_text([f"passage {index}" for index in range(500)])
    assert len(text.passages) == 500 and len(text.pairs) == MAX_PAIRED * (MAX_PAIRED - 1) // 2
    assert resolve_text(["a", "a"]).pairs == ()


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "no text to measure"),
        (b" \n\n\t\n", "no text to measure"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"words\0" * 99, "The text is binary: it holds null characters.*plain text"),
        (b'[{"text": "words"}]\n', "The text is JSON.*a list of passages"),
        (b'{\n "data": ["words", "words"]\n}', "is JSON"),
        (b'{"text": "words"}\n{"text": "words"}\n', "is JSON"),
    ],
)
def test_useless_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as info:
        resolve_text(path)
    assert info.value.where == str(path)


def test_text_that_only_begins_as_json_does(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for text in ("[1]\nSmith, J., On lists.", "{ x | x > 0 } is a set.", "[" * 5000, "12"):
        path.write_text(text)
        assert resolve_text(path).passages == (text,)


def test_useless_lists_and_paths(tmp_path: Path) -> None:
    for given in (["fine", ""], ["fine", "  "], ["fine", 3]):
        with pytest.raises(InputError, match="no text") as info:
            resolve_text(given)  # type: ignore[arg-type]
        assert info.value.where == "text[1]"
    with pytest.raises(InputError, match="no text to measure on"):
        resolve_text([])
    with pytest.raises(InputError, match="cannot be read"):
        resolve_text("The quick brown fox")
    with pytest.raises(InputError, match="cannot be read"):
        resolve_text(tmp_path)
    with pytest.raises(InputError, match="cannot be read: embedded null"):
        resolve_text("a\0b")
    for junk in (5, b"bytes", {"text": "words"}):
        with pytest.raises(InputError, match="is no text to measure on"):
            resolve_text(junk)  # type: ignore[arg-type]


def test_docstrings_are_the_larger_set() -> None:
    found = docstring_passages()
    assert len(found) == len(set(found)) > 1000 and sum(map(len, found)) > 300_000
    assert docstring_passages(7) == found[:7]
    assert not set(found) & set(PASSAGES)
