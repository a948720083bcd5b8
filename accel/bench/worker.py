"""The process a peer lives in: JSON lines in on stdin, JSON lines out on what was stdout.

Requests: ``{"op": "export" | "open" | "measure" | "output" | "memory" | "versions" | "quit", ...}``. Each gets one
line back; a failure is ``{"error": reason, "unsupported": bool}`` and leaves the worker alive. Between requests the
worker blocks in a read; whoever drives it may stop the process meanwhile, so that no thread of it spins.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import accel
from accel.bench.cases import Case
from accel.bench.machine import process_status
from accel.bench.models import VOCABULARY, encoder_inputs, prompt
from accel.bench.peers import PEERS, Peer, Unsupported
from accel.bench.sentences import mean_pool, tokenize

Work = Callable[[], Any]
POOLED_BATCH = 16  # sentences
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Worker:
    """Answers requests for one peer and one model."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._opened: Any = None
        self._role = ""
        self._forwards: dict[tuple[int, int], Work] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        handler = getattr(self, f"_{request['op']}", None)
        if handler is None:
            raise ValueError(f"unknown operation {request['op']!r}")
        return handler(request)

    def _export(self, _: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self.peer.export()
        return {"seconds": time.perf_counter() - start, **memory_megabytes()}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self._role = request["role"]
        self.peer.selection = request.get("selection", {})
        self._opened = getattr(self.peer, f"open_{self._role}")()
        return {"seconds": time.perf_counter() - start, **memory_megabytes()}

    def _measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds per repetition and metric; ``warm`` calls go before, untimed."""
        case = Case(**request["case"])
        if case.role == "decoder":
            return {"times": self._measure_decoder(case)}
        work = self._work(case)
        for _ in range(request.get("warm", 1)):
            work()
        times: list[float] = []
        end = time.perf_counter() + request.get("seconds", 0.0)
        while len(times) < request.get("repetitions", 1) or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return {"times": {case.name: times}}

    def _measure_decoder(self, case: Case) -> dict[str, list[float]]:
        """First token: a generation of one token. Per token: (a generation of 1 + N tokens - the first token) / N."""
        ids = prompt(case.prompt, self._vocabulary)
        self._opened(ids, 2)
        elapsed = []
        for tokens in (1, 1 + case.new):
            start = time.perf_counter()
            produced = self._opened(ids, tokens)
            elapsed.append(1e3 * (time.perf_counter() - start))
            if len(produced) != tokens:
                raise RuntimeError(f"asked for {tokens} tokens, got {len(produced)}")
        first, per_token = case.metrics
        return {first: [elapsed[0]], per_token: [(elapsed[1] - elapsed[0]) / case.new]}

    def _output(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes what the peer computes for a case (hidden state, vectors, token ids) to ``path`` as ``.npy``."""
        result = np.asarray(self._work(Case(**request["case"]))())
        np.save(request["path"], result)
        return {"shape": list(result.shape)}

    def _pooled(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes the pooled vectors of the first ``count`` real sentences, in padded batches, to ``path``."""
        texts = self._texts()[: request["count"]]
        vectors = []
        for start in range(0, len(texts), POOLED_BATCH):
            feeds = tokenize(self.peer.source, texts[start : start + POOLED_BATCH])
            vectors.append(mean_pool(self._opened(feeds)(), feeds["attention_mask"]))
        np.save(request["path"], np.concatenate(vectors))
        return {"count": len(texts)}

    def _gap(self, request: dict[str, Any]) -> dict[str, Any]:
        """How far, on average, another peer's tokens are below this one's best choices (``Peer.token_gaps``)."""
        ids = prompt(Case(**request["case"]).prompt, self._vocabulary)
        return {"gap": float(self.peer.token_gaps(ids, request["tokens"]).mean())}

    def _memory(self, _: dict[str, Any]) -> dict[str, Any]:
        return memory_megabytes()

    def _versions(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"versions": {name: _version(name) for name in (*self.peer.packages, "numpy")}}

    def _work(self, case: Case) -> Work:
        if case.role == "embedder":
            texts = self._texts()
            return lambda: self._opened(texts[: case.sentences])
        if case.role == "decoder":
            return lambda: self._opened(prompt(case.prompt, self._vocabulary), 1 + case.new)
        shape = (case.batch, case.seq)
        if shape not in self._forwards:
            feeds = encoder_inputs(*shape, self._vocabulary)
            names = self._manifest_inputs() if self.peer.model == "bundle" else set(feeds)
            self._forwards[shape] = self._opened({name: feeds[name] for name in feeds if name in names})
        return self._forwards[shape]

    @staticmethod
    def _texts() -> list[str]:
        return json.loads(Path(os.environ["ACCEL_BENCH_SENTENCES"]).read_text(encoding="utf-8"))

    @cached_property
    def _vocabulary(self) -> int:
        if self.peer.model != "bundle":
            return VOCABULARY[self.peer.model]
        from accel.bundle import Bundle

        return Bundle.open(self.peer.source).manifest.arch.vocab_size

    def _manifest_inputs(self) -> set[str]:
        from accel.bundle import Bundle

        variants = Bundle.open(self.peer.source).manifest.variants.values()
        return {spec.name for variant in variants for graph in variant.graphs.values() for spec in graph.inputs}


def memory_megabytes() -> dict[str, float]:
    """Resident set of this process in MB (1e6 bytes): now (``rss``), now without file pages, and at its peak."""
    status = process_status()
    return {
        "rss": status["VmRSS"] / 1e6,
        "anonymous_rss": status["RssAnon"] / 1e6,
        "peak_rss": status["VmHWM"] / 1e6,
    }


def _version(distribution: str) -> str:
    if distribution == "accelrt":  # often run from a checkout, without its metadata
        return accel.__version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _private_stdout() -> TextIO:
    """Keeps the real stdout for answers; whatever the peers' libraries print goes to stderr (the worker's log)."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _die_with_parent() -> None:
    """Has the kernel end this process with the one that drives it: a stopped orphan would hold its memory for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    name, model, source, artifact, threads = arguments
    _die_with_parent()
    answers = _private_stdout()
    worker = Worker(PEERS[name](model, Path(source), Path(artifact), int(threads)))
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            break
        try:
            answer = worker.answer(request)
        except Exception as error:  # whatever a peer raises is reported as the reason it failed
            traceback.print_exc()
            reason = str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
            reason = reason.replace(source, model).replace(artifact, "its export")  # results carry no local paths
            answer = {"error": reason[:500], "unsupported": isinstance(error, Unsupported)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
