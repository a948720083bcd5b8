"""The encoder's calls and embeddings: values computed text by text, without batches, next to what it returns."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from accel.bundle import Bundle
from accel.errors import BundleError, EngineError, InputError
from accel.runtime.encoder import Encoder, TruncationWarning
from accel.runtime.results import Timings
from tests.runtime.encoder_samples import ARCH, HIDDEN, FakeSession, Opened, hidden_states, model_folder, write_bundle

PHRASE = "the quick brown fox jumps over a lazy dog while unbelievable electroencephalographers watch in silence"
WORDS = PHRASE.split()
POOLING = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(count)]


@lru_cache
def library_tokenizer(limit: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return tokenizer


def token_ids(text: str, limit: int = 256) -> list[int]:
    return library_tokenizer(limit).encode(text).ids


def token_vectors(text: str, limit: int = 256) -> np.ndarray:
    """[S, H] of one text run alone."""
    ids = np.array([token_ids(text, limit)])
    return hidden_states(ids, np.ones_like(ids), np.zeros_like(ids))[0]


def measured(call: Callable[[], Timings | None]) -> Timings:
    """The call's timings, agreeing with this clock within 2 % in one of five tries (machines are shared)."""
    differences = []
    for _ in range(5):
        start = time.perf_counter()
        timings = call()
        whole = time.perf_counter() - start
        assert timings is not None and timings.total <= whole
        differences.append(1 - timings.total / whole)
        if differences[-1] <= 0.02:
            return timings
    raise AssertionError(differences)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("encoder") / "b")


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def encoder(bundle: Bundle, session: FakeSession) -> Encoder:
    return Encoder(bundle, Opened(session))


class TestCall:
    def test_arrays_lists_and_tensors_give_the_same(self, encoder: Encoder, session: FakeSession) -> None:
        ids, mask = np.array([[101, 7592, 102], [101, 102, 0]]), np.array([[1, 1, 1], [1, 1, 0]])

        class Tensor:
            def __init__(self, array: np.ndarray) -> None:
                self.array = array

            def detach(self) -> Tensor:
                return self

            cpu = detach

            def numpy(self) -> np.ndarray:
                return self.array

        expected = hidden_states(ids, mask, np.zeros_like(ids))
        for given in (ids, ids.tolist(), ids.astype(np.int32), np.asfortranarray(ids), Tensor(ids)):
            np.testing.assert_array_equal(encoder(given, mask).last_hidden_state, expected)
        np.testing.assert_array_equal(encoder(ids, mask.astype(bool))["last_hidden_state"], expected)
        np.testing.assert_array_equal(encoder(ids).last_hidden_state, hidden_states(ids, ids >= 0, ids * 0))
        types = np.array([[0, 0, 1], [0, 1, 0]])
        np.testing.assert_array_equal(encoder(ids, mask, types).last_hidden_state, hidden_states(ids, mask, types))
        assert not session.waves  # a call is one run, on all threads

    def test_output_is_a_mapping_with_attributes(self, encoder: Encoder) -> None:
        output = encoder([[101, 102]])
        assert list(output) == ["last_hidden_state"] and len(output) == 1
        assert repr(output) == f"EncoderOutput(last_hidden_state=[1, 2, {HIDDEN}])"
        with pytest.raises(AttributeError, match=r"no 'logits'.*last_hidden_state"):
            output.logits  # noqa: B018
        assert encoder.last_timings is output.timings
        for again in (copy.copy(output), pickle.loads(pickle.dumps(output))):
            np.testing.assert_array_equal(again.last_hidden_state, output.last_hidden_state)
            assert again.timings == output.timings

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (([[1.5]],), "float64"),
            (([["a"]],), "input_ids has dtype"),
            (([[True]],), "input_ids has dtype bool"),
            (([1, 2],), "rank 1"),
            ((5,), "rank 0"),
            (([[[1]]],), "rank 3"),
            (([[1, 2], [3]],), "differ in length.*attention_mask"),
            (([[]],), "empty"),
            ((np.zeros((0, 4), int),), "empty"),
            (([[1, 30522]],), r"input_ids\[0, 1\] = 30522 .*30522"),
            (([[1], [-1]],), r"input_ids\[1, 0\] = -1"),
            ((np.ones((1, 513), int),), "513 tokens.*512 positions"),
            (([[1, 2]], [[1]]), r"attention_mask has shape \(1, 1\), input_ids has \(1, 2\)"),
            (([[1, 2]], [1, 1]), "attention_mask has shape"),
            (([[1, 2]], [[1, 2]]), r"other values.*\[2\]"),
            (([[1, 2]], [[1.0, 1.0]]), "attention_mask has dtype float64"),
            (([[1, 2], [1, 2], [3, 4]], [[1, 0], [0, 0], [0, 0]]), r"all zero in rows \[1, 2\]"),
            (([[1, 2]], None, [[0]]), "token_type_ids has shape"),
            (([[1, 2]], None, [[0, 2]]), r"token_type_ids\[0, 1\] = 2"),
        ],
    )
    def test_bad_input(self, encoder: Encoder, session: FakeSession, arguments: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            encoder(*arguments)
        assert not session.seen

    def test_timings_match_an_independent_clock(self, encoder: Encoder, session: FakeSession) -> None:
        plain = session.run
        session.run = lambda feeds: (time.sleep(0.05), plain(feeds))[1]  # type: ignore[method-assign]
        timings = measured(lambda: encoder([[101, 102]]).timings)
        assert timings.compute + timings.prepost + timings.system == pytest.approx(timings.total)
        assert 0.05 <= timings.compute <= timings.total
        assert timings.steps == 1

    def test_a_small_call_adds_less_than_200_us(self, encoder: Encoder, session: FakeSession) -> None:
        ready = {"last_hidden_state": np.zeros((1, 8, HIDDEN), np.float32)}
        session.run = lambda feeds: ready  # type: ignore[method-assign]
        ids, mask = np.arange(8)[None], np.ones((1, 8), np.int64)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            encoder(ids, mask)
            times.append(time.perf_counter() - start)
        assert np.median(times) < 200e-6


class TestEmbed:
    def test_each_text_gets_its_own_vector(self, encoder: Encoder, session: FakeSession) -> None:
        texts = sentences(120)
        expected = np.stack([unit(token_vectors(text).mean(axis=0)) for text in texts])
        result = encoder.embed(texts)
        assert result.dtype == np.float32 and result.shape == (120, HIDDEN) and result.flags.c_contiguous
        np.testing.assert_allclose(result, expected, atol=2e-6)
        assert sum(session.waves) == len(session.seen) > 1

    @pytest.mark.parametrize("many", [True, False])
    def test_with_padding(self, bundle: Bundle, many: bool) -> None:
        texts = sentences(20, seed=3)
        session = FakeSession(many=many)
        result = Encoder(bundle, Opened(session)).embed(texts, batch_size=8)
        assert any((feeds["attention_mask"] == 0).any() for feeds in session.seen)
        assert [len(feeds["input_ids"]) for feeds in session.seen] == [8, 8, 4]
        np.testing.assert_allclose(result, [unit(token_vectors(text).mean(axis=0)) for text in texts], atol=2e-6)

    def test_one_text(self, encoder: Encoder, session: FakeSession) -> None:
        vector = encoder.embed("a quick fox")
        assert vector.shape == (HIDDEN,)
        np.testing.assert_allclose(vector, unit(token_vectors("a quick fox").mean(axis=0)), atol=1e-6)
        assert not session.waves

    def test_options(self, encoder: Encoder) -> None:
        texts = sentences(5)
        both = np.stack([np.r_[vectors[0], vectors.max(axis=0)] for vectors in map(token_vectors, texts)])
        np.testing.assert_allclose(encoder.embed(texts, pooling=("cls", "max"), normalize=False), both, atol=1e-6)
        cut = encoder.embed(texts, pooling="cls", truncate_dim=3)
        np.testing.assert_allclose(cut, [unit(row[:3]) for row in both], atol=1e-6)

    def test_waves_change_nothing(self, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = sentences(40)
        whole = encoder.embed(texts)
        monkeypatch.setattr("accel.runtime.encoder_core.WAVE_BYTES", 1)
        np.testing.assert_array_equal(encoder.embed(texts), whole)

    def test_prompts_and_their_exclusion(self, tmp_path: Path) -> None:
        files = {
            "modules": POOLING,
            "1_Pooling__config": {"pooling_mode_mean_tokens": True, "include_prompt": False},
            "config_sentence_transformers": {"prompts": {"query": "search query: "}},
        }
        encoder = Encoder(write_bundle(tmp_path / "b", **files), Opened(FakeSession()))
        vectors = token_vectors("search query: lazy dogs")
        skip = len(token_ids("search query: ")) - 1  # without [SEP]
        assert 0 < skip < len(vectors) - 1
        result = encoder.embed(["lazy dogs"], prompt_name="query")
        np.testing.assert_allclose(result[0], vectors[skip:].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(
            encoder.embed("dogs", prompt="lazy "), token_vectors("lazy dogs")[2:].mean(0), atol=1e-6
        )
        np.testing.assert_allclose(encoder.embed("lazy dogs"), token_vectors("lazy dogs").mean(axis=0), atol=1e-6)

    def test_truncation_is_reported(self, encoder: Encoder) -> None:
        texts = ["short", "dog " * 300, "fox " * 400]
        with pytest.warns(TruncationWarning, match="2 of 3 texts were cut to 256 tokens; the longest has 402") as seen:
            result = encoder.embed(texts)
        assert seen[0].filename == __file__
        expected = [unit(token_vectors(text, 256).mean(axis=0)) for text in texts]
        np.testing.assert_allclose(result, expected, atol=2e-6)
        with pytest.raises(InputError, match=r"2 of 3 texts are longer than 256.*402.*\[1, 2\]"):
            encoder.embed(texts, truncate=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder.embed(texts[:1], truncate=False)

    def test_limit_without_sentence_files_is_the_models(self, tmp_path: Path) -> None:
        short = replace(ARCH, max_positions=40)
        encoder = Encoder(write_bundle(tmp_path / "b", short, sentence=False), Opened(FakeSession()))
        assert encoder.max_length == 40
        with pytest.warns(TruncationWarning, match="1 of 1"):
            result = encoder.embed(["dog " * 50])
        np.testing.assert_allclose(result[0], unit(token_vectors("dog " * 50, 40).mean(axis=0)), atol=2e-6)

    def test_lowercase(self, tmp_path: Path) -> None:
        cased = write_bundle(tmp_path / "b", sentence_bert_config={"max_seq_length": 64, "do_lower_case": True})
        path = cased.path / "tokenizer.json"
        path.write_text(path.read_text().replace('"lowercase":true', '"lowercase":false'))
        encoder = Encoder(cased, Opened(FakeSession()))
        np.testing.assert_array_equal(encoder.embed("QUICK Fox"), encoder.embed("quick fox"))
        np.testing.assert_allclose(encoder.embed("QUICK Fox"), unit(token_vectors("quick fox").mean(axis=0)), atol=1e-6)

    @pytest.mark.parametrize(
        "texts, options, message",
        [
            ([], {}, "batch is empty"),
            ("", {}, r"text is empty \(at texts\)"),
            (["a", " \n"], {}, r"text is empty \(at texts\[1\]\)"),
            (["a", 3], {}, r"got int \(at texts\[1\]\)"),
            (5, {}, "got int"),
            ({"a": 1}, {}, "got dict"),
            (["a"], {"pooling": "average"}, "'average'"),
            (["a"], {"batch_size": 0}, "batch_size is 0"),
            (["a"], {"batch_size": 1.5}, "batch_size is 1.5"),
            (["a"], {"truncate_dim": 9}, "truncate_dim 9 exceeds the 8"),
            (["a"], {"prompt_name": "query"}, "no prompt named 'query'"),
        ],
    )
    def test_bad_input(self, encoder: Encoder, texts: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            encoder.embed(texts, **options)

    def test_modules_that_are_not_applied_are_refused(self, tmp_path: Path) -> None:
        modules = [*POOLING, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
        encoder = Encoder(write_bundle(tmp_path / "b", modules=modules), Opened(FakeSession()))
        assert encoder([[101, 102]]).last_hidden_state.shape == (1, 2, HIDDEN)
        with pytest.raises(BundleError, match=r"models\.Dense"):
            encoder.embed("a")

    def test_progress_bar(
        self, encoder: Encoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("accel.runtime.encoder_core.PROGRESS_TEXTS", 3)
        encoder.embed(["a", "b", "c"])
        assert capsys.readouterr() == ("", "")  # no terminal
        encoder.embed(["a", "b", "c"], show_progress=True)
        shown = capsys.readouterr()
        assert "3/3" in shown.err and not shown.out

    def test_timings_cover_the_whole_call(self, bundle: Bundle, session: FakeSession) -> None:
        texts = sentences(100)
        plain = session.run_many
        session.run_many = lambda feeds: (time.sleep(0.1), plain(feeds))[1]  # type: ignore[method-assign]
        encoder = Encoder(bundle, Opened(session))
        encoder.embed(texts[:1])  # reads the files and the tokenizer
        timings = measured(lambda: (encoder.embed(texts), encoder.last_timings)[1])
        assert 0.1 < timings.compute < timings.total
        assert 0 < timings.prepost < timings.total - timings.compute
        assert 0 <= timings.system < 0.01
        assert timings.steps == session.waves[-1]


def test_similarity(encoder: Encoder) -> None:
    vectors = encoder.embed(["a dog", "the fox"], normalize=False)
    expected = np.array([[unit(a) @ unit(b) for b in vectors] for a in vectors])
    np.testing.assert_allclose(encoder.similarity(vectors, vectors), expected, atol=1e-6)
    assert encoder.similarity(vectors[0], vectors).shape == (1, 2)
    with pytest.raises(InputError, match="a has 3 dimensions, b has 8"):
        encoder.similarity(vectors[:, :3], vectors)
    with pytest.raises(InputError, match="not an array of numbers"):
        encoder.similarity("a dog", vectors)


def test_who_runs(encoder: Encoder, session: FakeSession) -> None:
    assert encoder.engine is session.info
    assert [fallback.engine for fallback in encoder.fallbacks] == ["other"]
    assert encoder.arch == ARCH
    assert repr(encoder) == "Encoder(BertModel, feature-extraction, fake, fp32)"


def test_after_close_every_method_says_so(bundle: Bundle, session: FakeSession) -> None:
    with Encoder(bundle, Opened(session)) as encoder:
        encoder.embed("a")
    encoder.close()
    assert session.closed == 1
    for call in (lambda: encoder([[101]]), lambda: encoder.embed(["a", "b"])):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_close_waits_for_the_calls_in_flight(encoder: Encoder, session: FakeSession) -> None:
    running, order = threading.Event(), []
    plain = session.run

    def slow(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        running.set()
        time.sleep(0.05)
        order.append("run")
        return plain(feeds)

    session.run = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=encoder, args=([[101, 102]],))
    thread.start()
    running.wait()
    encoder.close()
    order.append("closed")
    thread.join()
    assert order == ["run", "closed"]


def test_a_fork_is_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.runtime.batching.os.getpid", lambda: -1)
    with pytest.raises(EngineError, match="forked"):
        encoder([[101]])


def test_eight_threads_give_what_one_gives(encoder: Encoder) -> None:
    lists = [sentences(30, seed) for seed in range(8)]
    expected = [encoder.embed(texts) for texts in lists]
    found: list[Any] = [None] * 8
    timings: list[Any] = [None] * 8

    def work(i: int, texts: Sequence[str]) -> None:
        found[i] = encoder.embed(texts)
        timings[i] = encoder.last_timings

    threads = [threading.Thread(target=work, args=item) for item in enumerate(lists)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, eight in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, eight)
    assert len({id(record) for record in timings}) == 8


def test_wrong_task_names_the_right_method(encoder: Encoder) -> None:
    for call in (
        lambda: encoder.classify("a"),
        lambda: encoder.entities("a"),
        lambda: encoder.answer("a", "b"),
        lambda: encoder.fill_mask("a"),
        lambda: encoder.rank("a", ["b"]),
    ):
        with pytest.raises(InputError, match=r"this one is for feature-extraction.*Use \.embed\(\)"):
            call()
