from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from accel.bench.peers.ort_common import bind_session_forward, greedy_loop

VOCABULARY = 10


class CountingSession:
    """A decoder whose next token is the sum of all tokens seen so far, modulo 10; its cache holds that history."""

    def __init__(self) -> None:
        self.positions: list[list[int]] = []

    def get_inputs(self) -> list[Any]:
        names = ("input_ids", "attention_mask", "position_ids")
        return [SimpleNamespace(name=name, shape=["b", "s"]) for name in names] + [
            SimpleNamespace(name="past.0.key", shape=["b", 1, "p", 1])
        ]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits"), SimpleNamespace(name="present.0.key")]

    def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
        from onnxruntime import OrtValue

        assert all(isinstance(value, np.ndarray) for value in feeds.values())
        values = {name: OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        return [value.numpy() for value in self.run_with_ort_values([], values)]

    def run_with_ort_values(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        from onnxruntime import OrtValue

        ids, past = feeds["input_ids"].numpy(), feeds["past.0.key"].numpy()
        self.positions.append(feeds["position_ids"].numpy()[0].tolist())
        present = np.concatenate([past, ids[:, None, :, None].astype(np.float32)], axis=2)
        assert feeds["attention_mask"].numpy().shape == (1, present.shape[2])
        logits = np.zeros((1, ids.shape[1], VOCABULARY), np.float32)
        logits[0, -1, int(present.sum()) % VOCABULARY] = 1.0
        return [OrtValue.ortvalue_from_numpy(value) for value in (logits, present)]


@pytest.mark.parametrize("keep_values", [False, True])
def test_greedy_loop_feeds_the_cache_back_and_counts_positions(keep_values: bool) -> None:
    pytest.importorskip("onnxruntime")
    session = CountingSession()
    tokens = greedy_loop(session, keep_values)(np.array([[1, 2, 4]], np.int64), 4)
    assert tokens == [7, 4, 8, 6]  # 7, then 14, 18, 26 modulo 10
    assert session.positions == [[0, 1, 2], [3], [4], [5]]


def test_forward_drops_inputs_that_the_graph_lacks() -> None:
    session = SimpleNamespace(
        get_inputs=lambda: [SimpleNamespace(name="input_ids")], run=lambda names, feeds: [sorted(feeds)]
    )
    bind: Any = bind_session_forward(session)
    assert bind({"input_ids": 1, "token_type_ids": 2})() == ["input_ids"]
