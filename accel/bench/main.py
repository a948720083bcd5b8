"""Runs suites from start to written results; the script's arguments arrive here as they were given."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.bench.cases import SENTENCES, SUITES, Suite
from accel.bench.isolated import run_isolated
from accel.bench.machine import use_cores
from accel.bench.models import model_folder
from accel.bench.peers import PEERS
from accel.bench.prepare import Workspace
from accel.bench.report import Result, build_result
from accel.bench.runner import Pace, run_suite
from accel.bench.sentences import fingerprint, load_sentences
from accel.errors import InputError

ROUNDS, ISOLATED_ROUNDS, QUICK_ROUNDS, QUICK_TOKENS = 15, 3, 2, 8


def measure_suite(
    name: str,
    cache: Path,
    peers: Sequence[str] | None = None,
    rounds: int | None = None,
    threads: int = 2,
    quick: bool = False,
    refresh: bool = False,
    subject: str | None = None,
) -> Result:
    """Runs one suite and returns its result.

    Args:
        name: A key of ``SUITES``.
        cache: Where models, exports and the peers' environments lie.
        peers: Which peers; None: all of the suite.
        rounds: Interleaved rounds; None: 15, or 3 where each figure takes a process of its own.
        threads: Threads of each peer; the run keeps to as many cores.
        quick: Two rounds and 8 tokens: checks that everything runs, proves nothing.
        refresh: Makes all exports anew.
        subject: Another of accel's own peers in the place of the suite's: another variant, or another engine.

    Raises:
        InputError: An unknown suite or peer.
    """
    suite = choose(name, peers, subject)
    if quick:
        suite = replace(suite, cases=tuple(replace(c, new=QUICK_TOKENS) if c.new else c for c in suite.cases))
    if rounds is None:
        rounds = 1 if quick and suite.isolated else QUICK_ROUNDS if quick else _default_rounds(suite)
    use_cores(threads)
    workspace = Workspace(cache.resolve(), threads)
    settings: dict[str, Any] = {"rounds": rounds, "threads": threads, "quick": quick, "cases": []}
    settings["cases"] = [case.to_json() for case in suite.cases]
    folder = model_folder(workspace.bench, suite.model)
    if suite.pooled or any(case.role == "embedder" for case in suite.cases):
        settings["sentences"] = prepare_sentences(workspace, folder, SENTENCES)
    if suite.isolated:
        outcome = run_isolated(workspace, suite, suite.peers, rounds, refresh, say)
    else:
        outcome = run_suite(workspace, suite, suite.peers, Pace(rounds), refresh, say)
    return build_result(suite, outcome, settings)


def choose(name: str, peers: Sequence[str] | None, subject: str | None = None) -> Suite:
    """The suite, on another of accel's variants if so asked, and cut down to the peers asked for."""
    if name not in SUITES:
        raise InputError(f"no suite is called {name!r}", remedy=f"Choose among {', '.join(SUITES)}.")
    suite = SUITES[name]
    if subject is not None:
        suite = _with_subject(suite, subject)
    if peers is None:
        return suite
    unknown = [peer for peer in peers if peer not in suite.peers]
    if unknown:
        raise InputError(
            f"suite {name} has no peer {', '.join(unknown)}", remedy=f"Choose among {', '.join(suite.peers)}."
        )
    return replace(suite, peers=tuple(peer for peer in suite.peers if peer in peers))


def _with_subject(suite: Suite, subject: str) -> Suite:
    ours = [name for name, peer in PEERS.items() if peer.ours]
    if subject not in ours:
        raise InputError(f"{subject!r} is no variant of accel", remedy=f"Choose among {', '.join(ours)}.")
    others = (peer for peer in suite.peers if peer not in (subject, suite.subject))
    return replace(suite, subject=subject, peers=(subject, *others))


def prepare_sentences(workspace: Workspace, folder: Path, count: int) -> str:
    """Writes the sentences where the workers read them; returns their fingerprint."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return fingerprint(load_sentences(workspace.bench, count, lambda text: len(tokenizer.encode(text).ids)))


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _default_rounds(suite: Suite) -> int:
    return ISOLATED_ROUNDS if suite.isolated else ROUNDS
