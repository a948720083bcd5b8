"""What the peers answered, beside the reference: a fast wrong answer must not pass unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.bench.cases import COSINE, COSINE_LEAST, Case, Suite
from accel.bench.client import WorkerFailure, WorkerProcess
from accel.bench.prepare import OPEN_LIMIT_S, Workspace

Peers = dict[str, dict[str, Any]]  # an Outcome's


def collect_answers(workspace: Workspace, suite: Suite, peer: str, worker: WorkerProcess) -> None:
    """Has an opened peer answer every case once, and encode the real sentences, into files."""
    for case in suite.cases:
        path = _path(workspace, suite, peer, case.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        worker.ask("output", limit_s=OPEN_LIMIT_S, case=case.to_json(), path=str(path))
    if suite.pooled:
        path = _path(workspace, suite, peer, COSINE)
        worker.ask("pooled", limit_s=OPEN_LIMIT_S, count=suite.pooled, path=str(path))


def compare_answers(workspace: Workspace, suite: Suite, peers: Peers, say: Callable[[str], None]) -> None:
    """Adds to every measured peer its ``agreement`` with the reference in words, and ``figures`` where there are some.

    A reference that is not among the peers is opened for this alone, and closed again.
    """
    measured = [peer for peer, state in peers.items() if state["status"] == "measured"]
    if not suite.reference:
        reference = next((peer for peer in ("torch", "sentence-transformers") if peer in measured), None)
        if reference is not None:
            _compare(workspace, suite, peers, measured, reference, None)
        return
    say(f"{suite.reference}: answering, for comparison")
    worker = None
    try:
        worker = workspace.start(suite.reference, suite.model)
        worker.ask("open", limit_s=OPEN_LIMIT_S, role=suite.cases[0].role)
        collect_answers(workspace, suite, suite.reference, worker)
        _compare(workspace, suite, peers, measured, suite.reference, worker)
    except WorkerFailure as failure:
        say(f"{suite.reference}: {failure}; answers are not compared")
    finally:
        if worker is not None:
            worker.close()


def _compare(
    workspace: Workspace,
    suite: Suite,
    peers: Peers,
    measured: list[str],
    reference: str,
    judge: WorkerProcess | None,
) -> None:
    for peer in measured:
        agreement: dict[str, Any] = {"reference": reference}
        for case in suite.cases:
            ours, expected = (np.load(_path(workspace, suite, name, case.name)) for name in (peer, reference))
            agreement[case.name] = compare(case, ours, expected)
            if judge is not None and case.role == "decoder":
                gap = judge.ask("gap", limit_s=OPEN_LIMIT_S, case=case.to_json(), tokens=ours.tolist())["gap"]
                agreement[case.name] += f", {gap:.3f} below the best logit"
        if suite.pooled:
            ours, expected = (np.load(_path(workspace, suite, name, COSINE)) for name in (peer, reference))
            mean, least = cosines(ours, expected)
            peers[peer]["figures"] = {COSINE: mean, COSINE_LEAST: least}
            agreement["sentences"] = f"cosine {mean:.4f} (least {least:.4f})"
        peers[peer]["agreement"] = agreement


def compare(case: Case, ours: NDArray, expected: NDArray) -> str:
    """``n/m tokens`` up to the first difference for a decoder; else the largest absolute difference."""
    if ours.shape != expected.shape:
        return f"shape {list(ours.shape)} instead of {list(expected.shape)}"
    if case.role == "decoder":
        different = np.flatnonzero(ours != expected)
        return f"{different[0] if different.size else ours.size}/{ours.size} tokens"
    return f"max abs {np.abs(ours.astype(np.float64) - expected).max():.1e}"


def cosines(ours: NDArray, expected: NDArray) -> tuple[float, float]:
    """Mean and least cosine of the rows of two sets of unit vectors, [N, H] each."""
    values = (ours * expected).sum(axis=1)
    return float(values.mean()), float(values.min())


def _path(workspace: Workspace, suite: Suite, peer: str, what: str) -> Path:
    return workspace.bench / "outputs" / suite.name / peer / f"{what.replace(' ', '_')}.npy"
