"""Peak memory and export time: each figure from a fresh process, one after another."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from accel.bench.cases import (
    EXPORT_ANONYMOUS,
    EXPORT_RSS,
    EXPORT_SECONDS,
    EXPORT_SIZE,
    PEAK_ANONYMOUS,
    PEAK_RSS,
    Suite,
)
from accel.bench.client import WorkerFailure
from accel.bench.machine import tree_resident
from accel.bench.prepare import EXPORT_LIMIT_S, OPEN_LIMIT_S, Workspace, ensure_export
from accel.bench.runner import TURN_LIMIT_S, Outcome, Say, describe

SAMPLE_SECONDS = 0.02


class PeakSampler:
    """Highest resident memory, in MB, of a process and its descendants while the block runs.

    Attributes:
        peak_megabytes: All resident pages.
        peak_anonymous: Those that belong to no file; its peak may fall at another moment.
    """

    def __init__(self, pid: int) -> None:
        self.peak_megabytes = self.peak_anonymous = 0.0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            resident = tree_resident(self._pid)
            self.peak_megabytes = max(self.peak_megabytes, resident.total / 1e6)
            self.peak_anonymous = max(self.peak_anonymous, resident.anonymous / 1e6)


def run_isolated(
    workspace: Workspace, suite: Suite, peers: Sequence[str], rounds: int, refresh: bool, say: Say
) -> Outcome:
    """Measures peak memory (the memory suites) or exports (suite ``export``) ``rounds`` times per peer."""
    outcome = Outcome(groups=[{}])
    measure = _measure_export if suite.name == "export" else _measure_memory
    for number in range(rounds):
        for peer in peers:
            if outcome.peers.get(peer, {}).get("status", "measured") != "measured":
                continue
            try:
                if suite.name != "export":
                    ensure_export(workspace, peer, suite.model, refresh and number == 0)
                figures, versions = measure(workspace, suite, peer)
            except WorkerFailure as failure:
                outcome.fail(peer, failure)
                outcome.groups[0].pop(peer, None)
                say(f"{peer}: {failure}")
                continue
            outcome.peers[peer] = {**describe(peer), "status": "measured", "versions": versions}
            for metric, value in figures.items():
                outcome.groups[0].setdefault(peer, {}).setdefault(metric, []).append(value)
            say(f"{peer}: " + ", ".join(f"{metric} {value:.1f}" for metric, value in figures.items()))
    return outcome


def _measure_memory(workspace: Workspace, suite: Suite, peer: str) -> tuple[dict[str, float], dict[str, str]]:
    """Loads the model, generates from a full prompt, and asks for the peak of the process's whole life."""
    worker = workspace.start(peer, suite.model)
    try:
        with PeakSampler(worker.pid) as sampler:
            worker.ask("open", limit_s=OPEN_LIMIT_S, role=suite.cases[0].role)
            for case in suite.cases:
                worker.ask("measure", limit_s=TURN_LIMIT_S, case=case.to_json())
        peak = worker.ask("memory")["peak_rss"]
        name = suite.cases[0].name
        figures = {f"{name}: {PEAK_RSS}": peak, f"{name}: {PEAK_ANONYMOUS}": sampler.peak_anonymous}
        return figures, worker.ask("versions")["versions"]
    finally:
        worker.close()


def _measure_export(workspace: Workspace, suite: Suite, peer: str) -> tuple[dict[str, float], dict[str, str]]:
    """Exports into a throw-away folder, from process start to files written, imports included."""
    artifact = workspace.bench / "export-runs" / peer
    shutil.rmtree(artifact, ignore_errors=True)
    artifact.parent.mkdir(parents=True, exist_ok=True)
    worker = workspace.start(peer, suite.model, artifact)
    try:
        with PeakSampler(worker.pid) as sampler:
            answer = worker.ask("export", limit_s=EXPORT_LIMIT_S)
        figures = {
            EXPORT_SECONDS: answer["seconds"],
            EXPORT_RSS: max(sampler.peak_megabytes, answer["peak_rss"]),
            EXPORT_ANONYMOUS: sampler.peak_anonymous,
            EXPORT_SIZE: folder_megabytes(artifact),
        }
        return figures, worker.ask("versions")["versions"]
    finally:
        worker.close()
        shutil.rmtree(artifact, ignore_errors=True)


def folder_megabytes(folder: Path) -> float:
    """Size of all files below a folder, in MB (1e6 bytes); hard links count once."""
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values()) / 1e6
