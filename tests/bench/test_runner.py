from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.bench import runner
from accel.bench.cases import Case, Suite, Target
from accel.bench.client import WorkerFailure
from accel.bench.runner import Pace, run_suite

CASE = Case("m 1x8", "encoder", batch=1, seq=8)


class FakeWorker:
    """A worker that answers from a script: milliseconds, megabytes, its output, and the turn it fails at."""

    def __init__(self, name: str, log: list[str], ms: float, mb: float, output: float, fails_at: int | None) -> None:
        self.name, self.log, self.ms, self.mb, self.output, self.fails_at = name, log, ms, mb, output, fails_at
        self.turns = 0
        self.closed = False

    def ask(self, op: str, *, limit_s: float = 0, **fields: Any) -> dict[str, Any]:
        if op == "output":
            np.save(fields["path"], np.full((1, 2), self.output, np.float32))
        if op == "measure":
            self.turns += 1
            self.log.append(self.name)
            if self.turns == self.fails_at:
                raise WorkerFailure("fell over")
            return {"times": {CASE.name: [self.ms, self.ms, 100.0]}}
        return {"seconds": 0.1, "rss": self.mb, "peak_rss": self.mb, "versions": {}}

    def close(self) -> None:
        self.closed = True


class FakeWorkspace:
    def __init__(self, root: Path, **workers: dict[str, Any]) -> None:
        self.bench, self.workers, self.log, self.started = root, workers, [], []  # type: ignore[var-annotated]

    def python(self, peer: str) -> Path:
        return self.bench

    def start(self, peer: str, model: str) -> FakeWorker:
        defaults = {"ms": 1.0, "mb": 100.0, "output": 1.0, "fails_at": None}
        worker = FakeWorker(peer, self.log, **{**defaults, **self.workers[peer.replace("-", "_")]})
        self.started.append(worker)
        return worker


@pytest.fixture(autouse=True)
def _no_exports_and_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ensure_export", lambda workspace, peer, model, refresh: None)
    monkeypatch.setattr(runner, "meminfo_bytes", lambda name: 1_000_000_000)


def run(workspace: FakeWorkspace, peers: list[str], rounds: int = 4, reference: str = "fastest") -> Any:
    suite = Suite("encoder", "minilm", (CASE,), tuple(peers), (Target(CASE.name, 1.0, reference),))
    return run_suite(workspace, suite, peers, Pace(rounds), False, lambda message: None)  # type: ignore[arg-type]


def test_every_round_gives_every_peer_one_turn_in_changing_order(tmp_path: Path) -> None:
    workspace = FakeWorkspace(tmp_path, accel={"ms": 1.0}, torch={"ms": 3.0}, genai={"ms": 2.0})
    outcome = run(workspace, ["accel", "torch", "genai"], rounds=6)
    rounds = [tuple(workspace.log[start : start + 3]) for start in range(0, 18, 3)]
    assert all(sorted(turns) == ["accel", "genai", "torch"] for turns in rounds)
    assert len(set(rounds)) > 1
    assert outcome.groups == [
        {"accel": {CASE.name: [1.0] * 6}, "genai": {CASE.name: [2.0] * 6}, "torch": {CASE.name: [3.0] * 6}}
    ]
    assert all(worker.closed for worker in workspace.started)


def test_peers_that_do_not_fit_into_memory_run_later_beside_the_anchors(tmp_path: Path) -> None:
    workspace = FakeWorkspace(
        tmp_path, accel={"mb": 200.0}, genai={"mb": 200.0}, torch={"mb": 250.0}, openvino={"mb": 250.0}
    )
    outcome = run(workspace, ["accel", "torch", "openvino", "genai"], reference="genai")
    assert [sorted(group) for group in outcome.groups] == [["accel", "genai", "torch"], ["accel", "genai", "openvino"]]


def test_a_peer_that_fails_midway_is_dropped_with_its_reason(tmp_path: Path) -> None:
    workspace = FakeWorkspace(tmp_path, accel={}, torch={}, genai={"fails_at": 2})
    outcome = run(workspace, ["accel", "torch", "genai"])
    assert sorted(outcome.groups[0]) == ["accel", "torch"]
    assert outcome.peers["genai"]["status"] == "failed"
    assert outcome.peers["genai"]["reason"] == "fell over"


def test_a_peer_without_environment_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = FakeWorkspace(tmp_path, accel={}, torch={})

    def missing(workspace: object, peer: str, model: str, refresh: bool) -> None:
        if peer == "torch":
            raise WorkerFailure("not there", unsupported=True)

    monkeypatch.setattr(runner, "ensure_export", missing)
    outcome = run(workspace, ["accel", "torch"])
    assert outcome.peers["torch"] == {"label": "eager PyTorch", "status": "unsupported", "reason": "not there"}
    assert list(outcome.groups[0]) == ["accel"]


def test_answers_are_compared_with_the_reference(tmp_path: Path) -> None:
    workspace = FakeWorkspace(tmp_path, accel={"output": 1.5}, torch={})
    outcome = run(workspace, ["accel", "torch"])
    assert outcome.peers["accel"]["agreement"] == {"reference": "torch", CASE.name: "max abs 5.0e-01"}


def test_peers_are_timed_beside_the_subject_and_the_reference_is_not_timed(tmp_path: Path) -> None:
    workspace = FakeWorkspace(tmp_path, accel={}, accel_w8a8_dyn={"output": 3.0}, genai={}, torch={"output": 1.0})
    peers = ("accel-w8a8-dyn", "genai")
    suite = Suite("s", "minilm", (CASE,), peers, (), subject="accel-w8a8-dyn", reference="torch")
    outcome = run_suite(workspace, suite, peers, Pace(2), False, lambda message: None)  # type: ignore[arg-type]
    assert [sorted(group) for group in outcome.groups] == [["accel-w8a8-dyn", "genai"]]
    assert outcome.peers["accel-w8a8-dyn"]["agreement"] == {"reference": "torch", CASE.name: "max abs 2.0e+00"}
    assert outcome.peers["accel-w8a8-dyn"]["ours"] and "ours" not in outcome.peers["genai"]
    assert [worker.name for worker in workspace.started] == ["accel-w8a8-dyn", "genai", "torch"]
    assert all(worker.closed for worker in workspace.started)
