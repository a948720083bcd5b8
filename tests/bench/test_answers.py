from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.bench.answers import collect_answers, compare, compare_answers, cosines
from accel.bench.cases import COSINE, COSINE_LEAST, Case, Suite
from accel.bench.client import WorkerFailure

ENCODER = Case("m 1x8", "encoder", batch=1, seq=8)
DECODER = Case("m", "decoder", prompt=4, new=1)
GAPS = {(5, 6): 0.0, (5, 9): 0.25}


class FakeWorker:
    """Answers with what it was made with; judges the tokens it knows."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.asked, self.closed = answers, [], False  # type: ignore[var-annotated]

    def ask(self, op: str, *, limit_s: float = 0, **fields: Any) -> dict[str, Any]:
        self.asked.append(op)
        if op in ("output", "pooled"):
            np.save(fields["path"], np.asarray(self.answers[op]))
        if op == "gap":
            return {"gap": GAPS[tuple(fields["tokens"])]}
        return {"count": fields.get("count")}

    def close(self) -> None:
        self.closed = True


class FakeWorkspace:
    def __init__(self, root: Path, reference: FakeWorker | None) -> None:
        self.bench, self.reference = root, reference

    def start(self, peer: str, model: str) -> FakeWorker:
        assert peer == "torch"
        if self.reference is None:
            raise WorkerFailure("no torch here")
        return self.reference


def run(workspace: Any, suite: Suite, **answers: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    for peer, answer in answers.items():
        worker: Any = FakeWorker(answer)
        collect_answers(workspace, suite, peer, worker)
    peers: dict[str, Any] = {peer: {"status": "measured"} for peer in answers}
    compare_answers(workspace, suite, peers, said.append)
    return peers, said


def test_tokens_are_judged_by_the_reference(tmp_path: Path) -> None:
    reference = FakeWorker({"output": [5, 6]})
    suite = Suite("s", "gpt2", (DECODER,), ("accel", "genai"), (), reference="torch")
    peers, _ = run(FakeWorkspace(tmp_path, reference), suite, accel={"output": [5, 6]}, genai={"output": [5, 9]})
    assert peers["accel"]["agreement"]["m"] == "2/2 tokens, 0.000 below the best logit"
    assert peers["genai"]["agreement"]["m"] == "1/2 tokens, 0.250 below the best logit"
    assert reference.asked == ["open", "output", "gap", "gap"] and reference.closed


def test_pooled_sentences_give_figures(tmp_path: Path) -> None:
    same, turned = np.eye(2), np.array([[1.0, 0.0], [0.8, 0.6]])
    reference = FakeWorker({"output": [[0.0]], "pooled": same})
    suite = Suite("s", "minilm", (ENCODER,), ("accel",), (), reference="torch", pooled=2)
    peers, _ = run(FakeWorkspace(tmp_path, reference), suite, accel={"output": [[0.5]], "pooled": turned})
    assert peers["accel"]["figures"] == pytest.approx({COSINE: 0.8, COSINE_LEAST: 0.6})
    assert peers["accel"]["agreement"] == {
        "reference": "torch",
        "m 1x8": "max abs 5.0e-01",
        "sentences": "cosine 0.8000 (least 0.6000)",
    }
    assert "gap" not in reference.asked


def test_without_the_reference_nothing_is_compared_and_that_is_said(tmp_path: Path) -> None:
    suite = Suite("s", "gpt2", (DECODER,), ("accel",), (), reference="torch")
    peers, said = run(FakeWorkspace(tmp_path, None), suite, accel={"output": [5, 6]})
    assert "agreement" not in peers["accel"]
    assert said[-1] == "torch: no torch here; answers are not compared"


def test_compare_counts_tokens_up_to_the_first_difference() -> None:
    assert compare(DECODER, np.array([5, 6, 9, 8]), np.array([5, 6, 7, 8])) == "2/4 tokens"
    assert compare(DECODER, np.array([5, 6]), np.array([5, 6])) == "2/2 tokens"
    assert compare(DECODER, np.array([5]), np.array([5, 6])) == "shape [1] instead of [2]"


def test_cosines_of_unit_vectors() -> None:
    mean, least = cosines(np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert (mean, least) == pytest.approx((0.9, 0.8))
