"""Ranking, classification, entities, answers and masks, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from accel.errors import InputError
from accel.runtime.encoder import Answer, Encoder, Entity, TruncationWarning
from accel.runtime.results import Classification
from tests.runtime.encoder_samples import ARCH, FakeSession, Opened, model_folder, write_bundle

Head = Callable[[NDArray, dict[str, NDArray]], dict[str, NDArray]]
VOCABULARY = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


def token(text: str) -> int:
    index = VOCABULARY.token_to_id(text)
    assert index is not None
    return index


def open_encoder(path: Path, task: Any, head: Head, **files: Any) -> tuple[Encoder, FakeSession]:
    session = FakeSession(head)
    bundle = write_bundle(path / "b", replace(ARCH, task=task), sentence=False, **files)
    return Encoder(bundle, Opened(session)), session


def counting(words: dict[str, list[float]]) -> Head:
    """Logits [B, C]: the sum over a row's kept tokens of what each word brings."""
    weights = {token(word): np.array(values, np.float32) for word, values in words.items()}
    zero = np.zeros(len(next(iter(weights.values()))), np.float32)

    def head(hidden: NDArray, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        kept = np.where(feeds["attention_mask"] == 1, feeds["input_ids"], -1)
        return {"logits": np.stack([sum((weights.get(i, zero) for i in row), zero) for row in kept.tolist()])}

    return head


def sigmoid(value: float) -> float:
    return 1 / (1 + np.exp(-value))


class TestRank:
    HEAD = staticmethod(counting({"dog": [1.0], "cat": [-2.0], "fox": [0.5]}))
    DOCUMENTS = ("a cat", "dog dog dog and more of it", "dog", "fox")

    def test_order_scores_and_texts(self, tmp_path: Path) -> None:
        encoder, session = open_encoder(tmp_path, "text-classification", self.HEAD)
        ranked = encoder.rank("dog", self.DOCUMENTS, return_documents=True)
        assert [entry["corpus_id"] for entry in ranked] == [1, 2, 3, 0]
        assert [entry["score"] for entry in ranked] == pytest.approx([sigmoid(x) for x in (4, 2, 1.5, -1)], abs=1e-6)
        assert [entry["text"] for entry in ranked] == [self.DOCUMENTS[i] for i in (1, 2, 3, 0)]
        assert all(type(entry["score"]) is float for entry in ranked)
        assert encoder.rank("dog", self.DOCUMENTS, top_k=2) == [
            {"corpus_id": entry["corpus_id"], "score": entry["score"]} for entry in ranked[:2]
        ]
        types = next(feeds["token_type_ids"] for feeds in session.seen if feeds["input_ids"].shape[1] > 6)
        assert types[0].tolist() == [0] * 3 + [1] * (types.shape[1] - 3)  # [CLS] dog [SEP] | document [SEP]

    def test_activation_of_the_config(self, tmp_path: Path) -> None:
        config = {"type_vocab_size": 2, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
        encoder, _ = open_encoder(tmp_path, "text-classification", self.HEAD, config=config)
        assert [entry["score"] for entry in encoder.rank("dog", self.DOCUMENTS)] == [4, 2, 1.5, -1]

    def test_ties_keep_the_documents_order(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "text-classification", self.HEAD)
        assert [entry["corpus_id"] for entry in encoder.rank("x", ["fox a", "dog", "fox b", "fox c"])] == [1, 0, 2, 3]

    def test_bad_input(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "text-classification", self.HEAD)
        for query, documents, options, message in (
            ("", ["a"], {}, r"empty \(at query\)"),
            (3, ["a"], {}, r"got int \(at query\)"),
            ("a", [], {}, r"batch is empty \(at documents\)"),
            ("a", "b", {}, "single string"),
            ("a", ["b", ""], {}, r"empty \(at documents\[1\]\)"),
            ("a", ["b"], {"top_k": 0}, "top_k is 0"),
        ):
            with pytest.raises(InputError, match=message):
                encoder.rank(query, documents, **options)  # type: ignore[arg-type]
        two, _ = open_encoder(tmp_path / "2", "text-classification", counting({"dog": [1.0, 2.0]}))
        with pytest.raises(InputError, match=r"one label; this one has 2.*\.classify\(\)"):
            two.rank("a", ["b"])


class TestClassify:
    HEAD = staticmethod(counting({"dog": [2.0, 0.0, 0.0], "cat": [0.0, 1.0, 3.0]}))
    LABELS: ClassVar = {"type_vocab_size": 2, "id2label": {"0": "DOG", "1": "FUR", "2": "CAT"}}

    def test_labels_and_softmax(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "text-classification", self.HEAD, config=self.LABELS)
        found = encoder.classify(["my cat", "dog", "a very long text about a dog"])
        assert [entry.label for entry in found] == ["CAT", "DOG", "DOG"]
        scores = np.exp([0, 1, 3]) / np.exp([0, 1, 3]).sum()
        assert found[0].score == pytest.approx(scores[2], abs=1e-6)
        assert found[1].score == pytest.approx(np.exp(2) / (np.exp(2) + 2), abs=1e-6)
        assert encoder.classify("my cat") == found[0]
        best = encoder.classify("my cat", top_k=2)
        assert [(entry.label, entry.score) for entry in best] == [
            ("CAT", pytest.approx(scores[2], abs=1e-6)),
            ("FUR", pytest.approx(scores[1], abs=1e-6)),
        ]
        assert [len(row) for row in encoder.classify(["cat", "dog"], top_k=None)] == [3, 3]

    def test_multi_label_regression_and_one_label(self, tmp_path: Path) -> None:
        config = self.LABELS | {"problem_type": "multi_label_classification"}
        several, _ = open_encoder(tmp_path / "1", "text-classification", self.HEAD, config=config)
        assert [x.score for x in several.classify("cat", top_k=None)] == pytest.approx(
            [sigmoid(3), sigmoid(1), 0.5], abs=1e-6
        )
        config = {"problem_type": "regression"}
        value, _ = open_encoder(tmp_path / "2", "text-classification", counting({"dog": [2.5]}), config=config)
        assert value.classify("dog") == Classification("LABEL_0", 2.5)
        one, _ = open_encoder(tmp_path / "3", "text-classification", counting({"dog": [2.5]}))
        assert one.classify("dog").score == pytest.approx(sigmoid(2.5), abs=1e-6)

    def test_pairs(self, tmp_path: Path) -> None:
        encoder, session = open_encoder(tmp_path, "text-classification", self.HEAD, config=self.LABELS)
        assert encoder.classify([("my", "cat")])[0].label == "CAT"
        assert session.seen[0]["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
        with pytest.raises(InputError, match=r"Expected a pair of texts \(at texts\[1\]\)"):
            encoder.classify([("a", "b"), "c"])
        with pytest.raises(InputError, match=r"empty \(at texts\[0\]\[1\]\)"):
            encoder.classify([("a", "")])


def tagging(tags: dict[str, int], count: int, strength: float = 5.0) -> Head:
    by_id = {token(piece): tag for piece, tag in tags.items()}

    def head(hidden: NDArray, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        ids = feeds["input_ids"]
        logits = np.zeros((*ids.shape, count), np.float32)
        for place in np.ndindex(*ids.shape):
            logits[(*place, by_id.get(int(ids[place]), 0))] = strength
        return {"logits": logits}

    return head


class TestEntities:
    CONFIG: ClassVar = {"type_vocab_size": 2, "id2label": {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC"}}
    HEAD = staticmethod(tagging({"ada": 1, "love": 2, "london": 3, "paris": 3}, 4))
    SCORE = float(np.exp(5) / (np.exp(5) + 3))

    def test_neighbours_are_joined_with_character_ranges(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "token-classification", self.HEAD, config=self.CONFIG)
        text = "In London, Ada Love met ADA in Paris London"
        found = encoder.entities(text)
        assert [(entity.label, entity.text) for entity in found] == [
            ("LOC", "London"),
            ("PER", "Ada Love"),
            ("PER", "ADA"),
            ("LOC", "Paris"),
            ("LOC", "London"),
        ]
        for entity in found:
            assert text[entity.start : entity.end] == entity.text
            assert entity.score == pytest.approx(self.SCORE, abs=1e-6)
        single = encoder.entities(text, aggregation="none")
        assert [(entity.label, entity.text) for entity in single][1:3] == [("B-PER", "Ada"), ("I-PER", "Love")]
        assert encoder.classify(text) == found

    def test_rows_of_a_padded_batch_keep_their_own(self, tmp_path: Path) -> None:
        encoder, session = open_encoder(tmp_path, "token-classification", self.HEAD, config=self.CONFIG)
        texts = ["Ada", "nobody is here at all", "we saw Paris"]
        found = encoder.entities(texts, batch_size=3)
        assert session.seen[0]["input_ids"].shape[0] == 3
        assert [[entity.text for entity in row] for row in found] == [["Ada"], [], ["Paris"]]

    def test_a_word_is_split_by_simple_and_kept_by_first(self, tmp_path: Path) -> None:
        pieces = VOCABULARY.encode("lovelace", add_special_tokens=False).tokens
        assert pieces[0] == "love" and len(pieces) > 1
        encoder, _ = open_encoder(tmp_path, "token-classification", self.HEAD, config=self.CONFIG)
        assert [entity.text for entity in encoder.entities("Ada Lovelace")] == ["Ada Love"]
        first = encoder.entities("Ada Lovelace", aggregation="first")
        assert first == [Entity("PER", pytest.approx(self.SCORE, abs=1e-6), 0, 12, "Ada Lovelace")]

    def test_bad_input_and_truncation(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "token-classification", self.HEAD, config=self.CONFIG)
        with pytest.raises(InputError, match="'max'.*simple, first, none"):
            encoder.entities("a", aggregation="max")
        with pytest.raises(InputError, match="one label each"):
            encoder.classify("a", top_k=2)
        with pytest.raises(InputError, match="batch is empty"):
            encoder.entities([])
        text = "dog " * 600 + "london"
        with pytest.warns(TruncationWarning, match="1 of 1 texts were cut to 512 tokens; the longest has 603"):
            assert encoder.entities(text) == []
        with pytest.raises(InputError, match="603"):
            encoder.entities(text, truncate=False)


def pointing(start: dict[str, float], end: dict[str, float]) -> Head:
    starts, ends = ({token(word): value for word, value in side.items()} for side in (start, end))

    def head(hidden: NDArray, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        ids, kept = feeds["input_ids"].tolist(), feeds["attention_mask"] == 1
        sides = [np.array([[side.get(i, 0.0) for i in row] for row in ids], np.float32) for side in (starts, ends)]
        return {name: np.where(kept, x, 99) for name, x in zip(("start_logits", "end_logits"), sides, strict=True)}

    return head


class TestAnswer:
    HEAD = staticmethod(pointing({"london": 4.0, "paris": 3.0, "who": 9.0}, {"london": 4.0, "love": 3.0, "who": 9.0}))

    def test_span_score_and_place(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "question-answering", self.HEAD)
        context = "He lived in London."
        answer = encoder.answer("Who?", context)
        assert (answer.text, answer.start, answer.end) == ("London", 12, 18)
        share = np.exp(4) / (np.exp(4) + 5)  # [CLS] and the four other tokens of the context, not the question
        assert answer.score == pytest.approx(share**2, abs=1e-6)

    def test_several_answers_and_the_length_limit(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "question-answering", self.HEAD)
        context = "Paris is a fine city of love, says London"
        best = encoder.answer("Who?", context, top_k=2)
        assert [answer.text for answer in best] == ["London", "Paris is a fine city of love, says London"]
        assert best[0].score > best[1].score
        short = encoder.answer("Who?", context, top_k=2, max_answer_tokens=7)
        assert [answer.text for answer in short] == ["London", "Paris is a fine city of love"]

    def test_widened_to_words(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "question-answering", pointing({"ada": 9.0}, {"love": 9.0}))
        assert encoder.answer("who", "it was Ada Lovelace then") == Answer(
            "Ada Lovelace", pytest.approx(1, abs=0.01), 7, 19
        )

    def test_a_long_context_is_read_to_its_end(self, tmp_path: Path) -> None:
        encoder, session = open_encoder(tmp_path, "question-answering", self.HEAD)
        context = "dog " * 900 + "London " + "cat " * 20
        answer = encoder.answer("who", context)
        assert (answer.text, answer.start) == ("London", 3600)
        assert sum(len(feeds["input_ids"]) for feeds in session.seen) >= 4
        assert max(feeds["input_ids"].shape[1] for feeds in session.seen) == 384

    def test_bad_input(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "question-answering", self.HEAD)
        for arguments, options, message in (
            (("", "a"), {}, r"empty \(at question\)"),
            (("a", " "), {}, r"empty \(at context\)"),
            (("a", "b"), {"top_k": 0}, "top_k is 0"),
            (("a", "b"), {"max_answer_tokens": None}, "max_answer_tokens is None"),
            (("dog " * 400, "b"), {}, r"question of 403 tokens leaves 0 of 384"),
        ):
            with pytest.raises(InputError, match=message):
                encoder.answer(*arguments, **options)  # type: ignore[arg-type]


class TestFillMask:
    @staticmethod
    def head(hidden: NDArray, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        """At a mask, the next token's id is most probable, then "dog"."""
        ids = feeds["input_ids"]
        logits = np.zeros((*ids.shape, ARCH.vocab_size), np.float32)
        for row, place in zip(*np.nonzero(ids == token("[MASK]")), strict=True):
            logits[row, place, token("dog")] = 11.0
            logits[row, place, ids[row, place + 1]] = 12.0
        return {"logits": logits}

    def test_candidates(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "fill-mask", self.head)
        fills = encoder.fill_mask("a lazy [MASK] fox", top_k=2)
        assert [(fill.id, fill.token) for fill in fills] == [(token("fox"), "fox"), (token("dog"), "dog")]
        assert [fill.sequence for fill in fills] == ["a lazy fox fox", "a lazy dog fox"]
        total = np.exp(12) + np.exp(11) + ARCH.vocab_size - 2
        assert [fill.score for fill in fills] == pytest.approx([np.exp(12) / total, np.exp(11) / total], rel=1e-4)

    def test_several_masks(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "fill-mask", self.head)
        found = encoder.fill_mask("[MASK] cat and [MASK] fox", top_k=1)
        assert [[fill.token for fill in row] for row in found] == [["cat"], ["fox"]]

    def test_bad_input(self, tmp_path: Path) -> None:
        encoder, _ = open_encoder(tmp_path, "fill-mask", self.head)
        with pytest.raises(InputError, match=r"no mask.*\[MASK\]"):
            encoder.fill_mask("no gap here")
        with pytest.raises(InputError, match="got list"):
            encoder.fill_mask(["[MASK]"])  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"this one is for fill-mask.*\.fill_mask\(\)"):
            encoder.embed("a")
