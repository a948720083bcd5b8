"""The tokenizer against transformers' own on the same folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from accel.errors import BundleError, InputError
from accel.runtime.text import Tokenizer, split_room
from tests.runtime.tokenizer_folders import (
    SAMPLES,
    Folder,
    write_byte_level,
    write_json,
    write_minilm,
    write_sentencepiece,
)

WRITERS = [write_minilm, write_byte_level, write_sentencepiece]


def _reference(folder: Folder) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder.path))


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return request.param(tmp_path)


def test_encoding_and_decoding_are_those_of_transformers(folder: Folder) -> None:
    ours, theirs = Tokenizer.from_bundle(folder), _reference(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.settings.special_tokens == theirs.special_tokens_map
    for text in SAMPLES:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_and_pairs_are_those_of_transformers(folder: Folder, side: str) -> None:
    config = folder.read_json("tokenizer_config.json")
    write_json(folder.path, "tokenizer_config.json", {**config, "truncation_side": side})
    ours, theirs = Tokenizer.from_bundle(folder), _reference(folder)
    pairs = [(a, b) for a in SAMPLES for b in SAMPLES if b]  # transformers takes an empty second text for none
    for max_length in (5, 6, 9, 14, 30, None):
        for entries, is_pair in ((SAMPLES, False), (pairs, True)):
            actual = ours.encode_batch(entries, max_length=max_length, pairs=is_pair)  # type: ignore[arg-type]
            for entry, encoded in zip(entries, actual, strict=True):
                both = entry if is_pair else (entry,)
                limit = {"truncation": True, "max_length": max_length} if max_length else {}
                expected = theirs(*both, return_token_type_ids=True, **limit)
                assert encoded.ids == expected["input_ids"]
                assert encoded.type_ids == expected["token_type_ids"]
                full = len(theirs(*both)["input_ids"])
                assert encoded.truncated == (max_length is not None and full > max_length)


def test_stored_padding_and_truncation_are_off(tmp_path: Path) -> None:
    folder = write_minilm(tmp_path)
    stored = folder.read_json("tokenizer.json")
    assert stored["truncation"]["max_length"] == 128
    assert stored["padding"]["strategy"] == {"Fixed": 128}
    tokenizer = Tokenizer.from_bundle(folder)
    assert len(tokenizer.encode("one two")) == 4
    assert len(tokenizer.encode("word " * 300)) == 302


def test_encode_pair(tmp_path: Path) -> None:
    ids, type_ids = Tokenizer.from_bundle(write_minilm(tmp_path)).encode_pair("a b", "c")
    assert ids == [101, 1037, 1038, 102, 1039, 102]
    assert type_ids == [0, 0, 0, 0, 1, 1]


def test_split_room_cuts_the_longer_text_first() -> None:
    assert split_room([9], 5) == [5]
    assert split_room([2, 9], 6) == [2, 4]
    assert split_room([9, 2], 6) == [4, 2]
    assert split_room([9, 9], 7) == [3, 4]
    assert split_room([2, 3], 10) == [2, 3]


@pytest.mark.parametrize("writer", WRITERS)
def test_streamed_pieces_join_to_the_one_shot_text(writer: Callable[[Path], Folder], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_bundle(writer(tmp_path))
    random_ids = random.Random(0)
    sequences = [tokenizer.encode(text, add_special_tokens=False) for text in SAMPLES]
    # Also what no text encodes to: torn characters, byte runs, special tokens, ids outside the vocabulary.
    size = tokenizer.vocab_size
    sequences += [[random_ids.randrange(size + 2) for _ in range(random_ids.randrange(1, 25))] for _ in range(400)]
    for ids in sequences:
        for skip in (True, False):
            stream = tokenizer.stream_decoder(skip_special_tokens=skip)
            pieces = [stream.push(token) for token in ids]
            assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("writer", [write_byte_level, write_sentencepiece])
def test_streaming_never_shows_half_a_character(writer: Callable[[Path], Folder], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_bundle(writer(tmp_path))
    text = "a 🦀🧪 b 龍 end"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 4  # it does stream
    stream = tokenizer.stream_decoder()
    torn = tokenizer.encode("🦀", add_special_tokens=False)[:-1]
    assert "".join(stream.push(token) for token in torn).strip() == ""
    assert "\ufffd" in stream.flush()
    assert stream.flush() == ""


def test_cleaned_spaces_stream_like_they_decode(tmp_path: Path) -> None:
    folder = write_minilm(tmp_path)
    config = folder.read_json("tokenizer_config.json")
    write_json(tmp_path, "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": True})
    data = folder.read_json("tokenizer.json")
    data["decoder"]["cleanup"] = False
    write_json(tmp_path, "tokenizer.json", data)
    tokenizer, theirs = Tokenizer.from_bundle(folder), _reference(folder)
    for text in [*SAMPLES, "we ' re here , it ' s . so ' n ' t"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        stream = tokenizer.stream_decoder()
        assert "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(tokenizer.encode("hello , world !")) == "hello, world!"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 1}, (2, 0)),
        ({"eos_token_id": None}, {"eos_token_id": 1}, (1,)),
        (None, {"eos_token_id": 0}, (0,)),
        (None, None, (2,)),  # the tokenizer's own <|im_end|>
    ],
)
def test_end_of_sequence_tokens(
    generation: dict[str, Any] | None, config: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = write_byte_level(tmp_path)
    if generation is not None:
        write_json(tmp_path, "generation_config.json", generation)
    if config is not None:
        write_json(tmp_path, "config.json", config)
    assert Tokenizer.from_bundle(folder).eos_token_ids == expected


def test_tokens_named_by_id_in_the_config_alone(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {"model_max_length": 1024})  # all that gpt2 has
    write_json(tmp_path, "config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": -1})
    tokenizer = Tokenizer.from_bundle(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (0, (0,), None)
    assert tokenizer.settings.model_max_length == 1024


def test_special_tokens_map_fills_what_the_config_lacks(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, pad_token=None)
    write_json(tmp_path, "special_tokens_map.json", {"pad_token": {"content": "<|endoftext|>", "lstrip": False}})
    assert Tokenizer.from_bundle(folder).pad_token_id == 0


def test_unlimited_model_max_length_is_none(tmp_path: Path) -> None:
    assert Tokenizer.from_bundle(write_sentencepiece(tmp_path)).settings.model_max_length is None


@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_token_does_not_override_the_tokenizer_file(flag: bool, tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, add_bos_token=flag)
    tokenizer = Tokenizer.from_bundle(folder)
    assert tokenizer.encode("fox")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("fox") == _reference(folder).encode("fox")


def test_eight_threads_give_what_one_gives(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_bundle(write_minilm(tmp_path))
    limits = [5, 8, None, 12] * 20
    expected = [tokenizer.encode_batch(SAMPLES, max_length=limit) for limit in limits]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda limit: tokenizer.encode_batch(SAMPLES, max_length=limit), limits)) == expected


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["list"], "lone \ud83d surrogate"])
def test_what_is_no_text_is_refused(text: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_bundle(write_byte_level(tmp_path))
    with pytest.raises(InputError):
        tokenizer.encode(text)
    with pytest.raises(InputError, match=r"texts\[1\]"):
        tokenizer.encode_batch(["fine", text])
    with pytest.raises(InputError, match=r"texts\[0\]"):
        tokenizer.encode_batch([("fine", text)], pairs=True)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_bundle(write_minilm(tmp_path))
    with pytest.raises(InputError, match="Use at least 3"):
        tokenizer.encode_batch(["a"], max_length=2)
    with pytest.raises(InputError, match="pair of texts"):
        tokenizer.encode_batch([("a", "b", "c")], pairs=True)  # type: ignore[list-item]
    with pytest.raises(InputError, match="non-negative"):
        tokenizer.decode([-1])


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", ["not", "an", "object"])
    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        Tokenizer.from_bundle(folder)
    write_json(tmp_path, "tokenizer_config.json", {"eos_token": 7})
    with pytest.raises(BundleError, match="eos_token has the value 7"):
        Tokenizer.from_bundle(folder)
    write_json(tmp_path, "tokenizer_config.json", {})
    write_json(tmp_path, "generation_config.json", {"eos_token_id": "2"})
    with pytest.raises(BundleError, match="eos_token_id has the value '2'"):
        Tokenizer.from_bundle(folder)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_bundle(folder)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="Pass input_ids"):
        Tokenizer.from_bundle(folder)
