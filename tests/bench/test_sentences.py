from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from accel.bench.sentences import (
    MAX_TOKENS,
    MIN_TOKENS,
    choose_by_length,
    fingerprint,
    load_sentences,
    mean_pool,
    tokenize,
)


def count_words(text: str) -> int:
    return len(text.split()) + 2


def test_lengths_spread_over_the_whole_range() -> None:
    passages = [f"p{n} " + "word " * (n - 1) for n in range(1, 400)]
    tokens = [count_words(text) for text in passages]
    chosen = choose_by_length(passages, tokens, 64)
    lengths = np.array([count_words(text) for text in chosen])
    assert len(set(chosen)) == 64
    assert lengths.min() == MIN_TOKENS and lengths.max() == MAX_TOKENS
    assert np.median(lengths) < 60 < lengths.mean()  # logarithmic: short ones are the most frequent
    assert not np.array_equal(lengths, np.sort(lengths))


def test_too_few_passages_are_refused() -> None:
    with pytest.raises(ValueError, match="only 1 passages"):
        choose_by_length(["short", "a fitting one"], [2, 9], 2)


def test_sentences_are_kept_and_reread(tmp_path: Path) -> None:
    first = load_sentences(tmp_path, 40, count_words)
    assert len(set(first)) == 40
    assert all(MIN_TOKENS <= count_words(text) <= MAX_TOKENS for text in first)

    def never(text: str) -> int:
        raise AssertionError("kept sentences are not counted again")

    assert load_sentences(tmp_path, 40, never) == first


def test_fingerprint_follows_the_text() -> None:
    assert fingerprint(["a", "b"]) == fingerprint(["a", "b"]) != fingerprint(["b", "a"])


def test_batches_are_padded_and_masked(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    feeds = tokenize(tmp_path, ["a b a", "b"])
    assert feeds["input_ids"].tolist() == [[1, 2, 1], [2, 0, 0]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert feeds["token_type_ids"].shape == (2, 3) and feeds["input_ids"].dtype == np.int64


def test_pooling_leaves_padding_out_and_scales_to_unit_length() -> None:
    hidden = np.array([[[3.0, 0.0], [5.0, 8.0]], [[0.0, 2.0], [9.0, 9.0]]], np.float32)
    vectors = mean_pool(hidden, np.array([[1, 1], [1, 0]]))
    assert vectors == pytest.approx(np.array([[2**-0.5, 2**-0.5], [0.0, 1.0]]))
