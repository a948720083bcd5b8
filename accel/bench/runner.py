"""Runs a suite: opens the peers, checks that they agree, and times them in interleaved rounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel.bench.answers import collect_answers, compare_answers
from accel.bench.cases import Case, Suite
from accel.bench.client import WorkerFailure, WorkerProcess
from accel.bench.machine import meminfo_bytes
from accel.bench.peers import PEERS
from accel.bench.prepare import OPEN_LIMIT_S, Workspace, ensure_export
from accel.bench.stats import median

TURN_LIMIT_S = 300.0
MEMORY_SHARE = 0.7  # of the available memory; the rest absorbs the peak of the peer that is just opening
Rounds = dict[str, dict[str, list[float]]]  # peer -> metric -> one figure per round
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds, and per turn the repetitions and seconds of a forward."""

    rounds: int
    repetitions: int = 3
    seconds: float = 0.3


@dataclass
class Outcome:
    """What a run found: per group of peers its rounds, and per peer its state, reason, versions, agreement."""

    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[Rounds] = field(default_factory=list)

    def fail(self, peer: str, failure: WorkerFailure) -> None:
        status = "unsupported" if failure.unsupported else "failed"
        self.peers.setdefault(peer, describe(peer)).update(status=status, reason=str(failure))


def describe(peer: str) -> dict[str, Any]:
    """What is known of a peer before it runs."""
    return {"label": PEERS[peer].label, **({"ours": True} if PEERS[peer].ours else {})}


def run_suite(workspace: Workspace, suite: Suite, peers: Sequence[str], pace: Pace, refresh: bool, say: Say) -> Outcome:
    """Measures ``peers`` on the suite's cases.

    All peers that fit into memory together form one group, whose rounds are interleaved: in every round each peer
    takes one turn, in a new random order. Peers that do not fit form a further group together with the anchors (the
    subject and the references of the targets), so that every ratio is between turns of the same rounds.
    """
    outcome = Outcome()
    ready = [peer for peer in peers if _prepare(workspace, suite, peer, refresh, outcome, say)]
    anchors = [p for p in ready if p == suite.subject or p in {target.reference for target in suite.targets}]
    pending = [peer for peer in ready if peer not in anchors]
    while pending or not outcome.groups:
        workers: dict[str, WorkerProcess] = {}
        try:
            pending = _open_group(workspace, suite, anchors, pending, workers, outcome, say)
            if workers:
                outcome.groups.append(_measure_group(suite, workers, pace, outcome, say))
        finally:
            for worker in workers.values():
                worker.close()
        if not workers:
            break
    compare_answers(workspace, suite, outcome.peers, say)
    return outcome


def _prepare(workspace: Workspace, suite: Suite, peer: str, refresh: bool, outcome: Outcome, say: Say) -> bool:
    try:
        workspace.python(peer)
        say(f"{peer}: preparing")
        ensure_export(workspace, peer, suite.model, refresh)
    except WorkerFailure as failure:
        outcome.fail(peer, failure)
        say(f"{peer}: {failure}")
        return False
    return True


def _open_group(
    workspace: Workspace,
    suite: Suite,
    anchors: list[str],
    others: list[str],
    workers: dict[str, WorkerProcess],
    outcome: Outcome,
    say: Say,
) -> list[str]:
    """Opens the anchors and as many others (at least one) as fit into memory; returns those that did not."""
    budget = MEMORY_SHARE * meminfo_bytes("MemAvailable") / 1e6
    used, opened = 0.0, 0
    for index, peer in enumerate([*anchors, *others]):
        try:
            worker, state = _open_worker(workspace, suite, peer)
        except WorkerFailure as failure:
            outcome.fail(peer, failure)
            say(f"{peer}: {failure}")
            continue
        used += state["rss"]
        if peer in others and opened and used > budget:
            worker.close()
            say(f"{peer}: waits for the next group ({used:.0f} of {budget:.0f} MB)")
            return others[index - len(anchors) :]
        opened += peer in others
        workers[peer] = worker
        outcome.peers[peer] = state
        say(f"{peer}: open in {state['open_seconds']:.1f} s, {state['rss']:.0f} MB")
    return []


def _open_worker(workspace: Workspace, suite: Suite, peer: str) -> tuple[WorkerProcess, dict[str, Any]]:
    """Starts a peer, loads its model and has it answer every case once; returns it with what is known about it."""
    worker = workspace.start(peer, suite.model)
    try:
        opened = worker.ask("open", limit_s=OPEN_LIMIT_S, role=suite.cases[0].role)
        collect_answers(workspace, suite, peer, worker)
        versions = worker.ask("versions")["versions"]
        memory = worker.ask("memory")
    except WorkerFailure:
        worker.close()
        raise
    state = {**describe(peer), "status": "measured", "versions": versions, "open_seconds": opened["seconds"]}
    return worker, {**state, **memory}


def _measure_group(suite: Suite, workers: dict[str, WorkerProcess], pace: Pace, outcome: Outcome, say: Say) -> Rounds:
    rounds: Rounds = {peer: {} for peer in workers}
    order = random.Random(0)
    for number in range(pace.rounds):
        for case in suite.cases:
            for peer in order.sample(sorted(workers), len(workers)):
                try:
                    times = take_turn(workers[peer], case, pace)
                except WorkerFailure as failure:
                    outcome.fail(peer, failure)
                    say(f"{peer}: {failure}")
                    workers.pop(peer).close()
                    rounds.pop(peer)
                    continue
                for metric, value in times.items():
                    rounds[peer].setdefault(metric, []).append(value)
        say(f"round {number + 1} of {pace.rounds}")
    return rounds


def take_turn(worker: WorkerProcess, case: Case, pace: Pace) -> dict[str, float]:
    """One peer's turn at one case: an untimed call, then timed repetitions; their median in ms per metric."""
    answer = worker.ask(
        "measure",
        limit_s=TURN_LIMIT_S,
        case=case.to_json(),
        warm=1,
        repetitions=1 if case.role == "embedder" else pace.repetitions,
        seconds=0.0 if case.role == "embedder" else pace.seconds,
    )
    return {metric: median(times) for metric, times in answer["times"].items()}
