from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.bench.cases import Case
from accel.bench.models import VOCABULARY, encoder_inputs
from accel.bench.peers.base import BindForward, Feeds, Forward, Generate, Peer, Unsupported
from accel.bench.worker import POOLED_BATCH, Worker


class SlowPeer(Peer):
    """Costs 20 ms for the prompt and 5 ms per further token; its forward returns the ids as hidden state."""

    name = label = "slow"
    packages = ("numpy",)
    lost_tokens = 0

    def open_encoder(self) -> BindForward:
        def bind(feeds: Feeds) -> Forward:
            return lambda: feeds["input_ids"][..., None].astype(np.float32)

        return bind

    def open_decoder(self) -> Generate:
        def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
            time.sleep(0.02 + 0.005 * (new_tokens - 1))
            return [7] * (new_tokens - self.lost_tokens)

        return generate


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(SlowPeer("gpt2", tmp_path, tmp_path, 1))


def measure(worker: Worker, case: Case, **fields: Any) -> dict[str, list[float]]:
    return worker.answer({"op": "measure", "case": case.to_json(), **fields})["times"]


def test_decode_per_token_is_the_difference_of_two_generations(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only the peer moves: a busy machine sleeps longer than it is told to."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    worker.answer({"op": "open", "role": "decoder"})
    times = measure(worker, Case("m", "decoder", prompt=4, new=10))
    assert times["m: first token"][0] == pytest.approx(20)
    assert times["m: per token"][0] == pytest.approx(5)


def test_a_generation_that_ends_early_is_an_error(worker: Worker) -> None:
    worker.peer.lost_tokens = 1  # type: ignore[attr-defined]
    worker.answer({"op": "open", "role": "decoder"})
    with pytest.raises(RuntimeError, match="asked for 1 tokens, got 0"):
        measure(worker, Case("m", "decoder", prompt=4, new=10))


def test_forward_is_repeated_at_least_as_often_as_asked(worker: Worker) -> None:
    worker.answer({"op": "open", "role": "encoder"})
    case = Case("m 2x8", "encoder", batch=2, seq=8)
    assert len(measure(worker, case, repetitions=4)["m 2x8"]) == 4
    assert len(measure(worker, case, repetitions=1, seconds=0.02)["m 2x8"]) > 4


def test_output_is_what_the_peer_computed(worker: Worker, tmp_path: Path) -> None:
    worker.answer({"op": "open", "role": "encoder"})
    case = Case("m 2x8", "encoder", batch=2, seq=8)
    answer = worker.answer({"op": "output", "case": case.to_json(), "path": str(tmp_path / "out.npy")})
    saved = np.load(tmp_path / "out.npy")
    assert answer["shape"] == [2, 8, 1]
    assert np.array_equal(saved[..., 0], encoder_inputs(2, 8, VOCABULARY["gpt2"])["input_ids"])


def test_pooled_vectors_of_real_sentences(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "sentences.json"
    texts.write_text(json.dumps([f"text {number}" for number in range(20)]))
    monkeypatch.setenv("ACCEL_BENCH_SENTENCES", str(texts))
    seen: list[str] = []

    def tokenize(folder: Path, batch: list[str]) -> dict[str, NDArray[np.int64]]:
        seen.extend(batch)
        assert folder == worker.peer.source and len(batch) <= POOLED_BATCH
        ids = np.array([[len(seen), 7]] * len(batch))
        return {"input_ids": ids, "attention_mask": np.array([[1, 0]] * len(batch))}

    monkeypatch.setattr("accel.bench.worker.tokenize", tokenize)
    worker.answer({"op": "open", "role": "encoder"})
    assert worker.answer({"op": "pooled", "count": 18, "path": str(tmp_path / "p.npy")}) == {"count": 18}
    assert seen == [f"text {number}" for number in range(18)]
    assert np.array_equal(np.load(tmp_path / "p.npy"), np.ones((18, 1)))


def test_gap_is_the_mean_over_another_peers_tokens(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("m", "decoder", prompt=4, new=1)
    with pytest.raises(Unsupported, match="slow judges no tokens"):
        worker.answer({"op": "gap", "case": case.to_json(), "tokens": [1, 2]})
    monkeypatch.setattr(worker.peer, "token_gaps", lambda ids, tokens: np.array(tokens) / ids.shape[1])
    assert worker.answer({"op": "gap", "case": case.to_json(), "tokens": [1, 2]}) == {"gap": 0.375}


def test_memory_and_versions(worker: Worker) -> None:
    memory = worker.answer({"op": "memory"})
    assert 10 < memory["rss"] <= memory["peak_rss"]
    assert worker.answer({"op": "versions"})["versions"]["numpy"] == np.__version__


def test_unknown_operation_is_refused(worker: Worker) -> None:
    with pytest.raises(ValueError, match="unknown operation 'guess'"):
        worker.answer({"op": "guess"})
