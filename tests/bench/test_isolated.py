from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accel.bench import isolated
from accel.bench.cases import EXPORT_RSS, PEAK_ANONYMOUS, PEAK_RSS, SUITES
from accel.bench.client import WorkerFailure
from accel.bench.isolated import PeakSampler, folder_megabytes, run_isolated
from accel.bench.machine import describe_machine, meminfo_bytes, tree_resident


def test_sampler_sees_what_a_child_process_held_and_let_go() -> None:
    code = "import time; data = bytearray(b'x') * 80_000_000; time.sleep(0.3)"
    with PeakSampler(os.getpid()) as sampler:
        before = tree_resident(os.getpid()).total / 1e6
        subprocess.run([sys.executable, "-c", code], check=True)
    assert 80 < sampler.peak_megabytes - before < 160
    assert 80 < sampler.peak_anonymous < sampler.peak_megabytes


def test_hard_links_count_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"x" * 2_000_000)
    os.link(tmp_path / "sub" / "a", tmp_path / "b")
    assert folder_megabytes(tmp_path) == pytest.approx(2.0)


def test_machine_description() -> None:
    machine = describe_machine()
    assert machine["cpu"] and machine["cores"] >= 1
    assert machine["memory_gb"] == pytest.approx(meminfo_bytes("MemTotal") / 1e9, abs=0.1)


def test_figures_collect_over_rounds_and_a_failing_peer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(workspace: Any, suite: Any, peer: str) -> tuple[dict[str, float], dict[str, str]]:
        asked.append(peer)
        if peer == "genai":
            raise WorkerFailure("no")
        return {EXPORT_RSS: float(len(asked))}, {"accelrt": "0"}

    monkeypatch.setattr(isolated, "_measure_export", measure)
    workspace: Any = None
    outcome = run_isolated(workspace, SUITES["export"], ["accel", "genai"], 2, False, lambda message: None)
    assert asked == ["accel", "genai", "accel"]
    assert outcome.groups == [{"accel": {EXPORT_RSS: [1.0, 3.0]}}]
    assert outcome.peers["genai"]["reason"] == "no"


@pytest.mark.parametrize(("suite", "case"), [("memory", "Qwen2.5-0.5B fp32"), ("int4-memory", "Qwen2.5-0.5B int4")])
def test_memory_is_reported_under_the_suites_own_case(suite: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Worker:
        pid = os.getpid()

        def ask(self, op: str, **fields: Any) -> dict[str, Any]:
            asked.append(op)
            return {"peak_rss": 7.0, "versions": {"pkg": "1"}}

        def close(self) -> None:
            asked.append("close")

    class Workspace:
        def start(self, peer: str, model: str) -> Worker:
            return Worker()

    monkeypatch.setattr(isolated, "ensure_export", lambda *arguments: None)
    workspace: Any = Workspace()
    chosen = SUITES[suite]
    outcome = run_isolated(workspace, chosen, [chosen.subject], 1, False, lambda message: None)
    figures = outcome.groups[0][chosen.subject]
    assert list(figures) == [f"{case}: {PEAK_RSS}", f"{case}: {PEAK_ANONYMOUS}"]
    assert figures[f"{case}: {PEAK_RSS}"] == [7.0]
    assert asked == ["open", "measure", "memory", "versions", "close"]
