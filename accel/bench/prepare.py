"""Finds each peer's environment and makes its export, once."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.bench.client import PACKAGE_ROOT, WorkerFailure, WorkerProcess
from accel.bench.models import model_folder
from accel.bench.peers import PEERS

EXPORT_LIMIT_S, OPEN_LIMIT_S = 900.0, 300.0


@dataclass(frozen=True)
class Workspace:
    """Folders and settings of one benchmark run.

    Attributes:
        cache: ``.cache``: environments under ``peers/``, models, exports, logs and outputs under ``bench/``.
        threads: Threads of every peer.
    """

    cache: Path
    threads: int = 2

    @property
    def bench(self) -> Path:
        return self.cache / "bench"

    @property
    def sentences(self) -> Path:
        return self.bench / "sentences.json"

    def artifact(self, peer: str, model: str) -> Path:
        return self.bench / "artifacts" / (PEERS[peer].export_of or peer) / model

    def start(self, peer: str, model: str, artifact: Path | None = None) -> WorkerProcess:
        """Starts a peer's worker. Raises WorkerFailure when its environment is not there."""
        where = artifact or self.artifact(peer, model)
        return WorkerProcess(
            self.python(peer),
            [peer, model, str(model_folder(self.bench, model)), str(where), str(self.threads)],
            {
                "OMP_NUM_THREADS": str(self.threads),
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_VERBOSITY": "error",
                "ACCEL_BENCH_SENTENCES": str(self.sentences),
            },
            self.bench / "logs" / f"{model}-{peer}.log",
        )

    def python(self, peer: str) -> Path:
        """The interpreter of the peer's environment."""
        environment = PEERS[peer].environment
        if environment == "host":
            return Path(sys.executable)
        folder = self.cache / "peers" / environment
        if (folder / "installed").exists():
            return folder / "bin" / "python"
        failed = self.cache / "peers" / f"{environment}.failed"
        if failed.exists():
            reason = " ".join(failed.read_text(encoding="utf-8").split())[:400]
            raise WorkerFailure(f"its environment {environment!r} did not install: {reason}")
        raise WorkerFailure(f"its environment {environment!r} is not there: run scripts/peers.sh {environment}")


def ensure_export(workspace: Workspace, peer: str, model: str, refresh: bool = False) -> None:
    """Makes the peer's export unless an up-to-date one is there.

    What it did last time is kept beside it, a failure too: an export that failed with the same versions is not
    tried again. ``refresh`` tries anyway.

    Raises:
        WorkerFailure: The export fails, now or when it was last tried.
    """
    if not PEERS[peer].exports:
        return
    artifact = workspace.artifact(peer, model)
    record_path = artifact.with_name(f"{model}.json")
    key = _export_key(workspace, peer)
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else {}
    if refresh or record.get("key") != key:
        record = {"key": key, **_export(workspace, peer, model)}
        record_path.parent.mkdir(parents=True, exist_ok=True)
        if "error" in record and PEERS[peer].environment == "host":
            raise WorkerFailure(record["error"], record["unsupported"])  # sources under work: try again next time
        record_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if "error" in record:
        raise WorkerFailure(record["error"], record["unsupported"])


def _export(workspace: Workspace, peer: str, model: str) -> dict[str, Any]:
    artifact = workspace.artifact(peer, model)
    shutil.rmtree(artifact, ignore_errors=True)
    artifact.parent.mkdir(parents=True, exist_ok=True)
    worker = workspace.start(peer, model)
    try:
        return {"seconds": worker.ask("export", limit_s=EXPORT_LIMIT_S)["seconds"]}
    except WorkerFailure as failure:
        return {"error": f"export: {failure}", "unsupported": failure.unsupported}
    finally:
        worker.close()


def _export_key(workspace: Workspace, peer: str) -> str:
    """Changes when the peer's export would: with its environment, or for accel with accel's own sources."""
    digest = hashlib.sha256()
    if PEERS[peer].environment == "host":
        for folder, pattern in (("accel", "*.py"), ("kernels", "*.py"), ("export_configs", "*.yaml")):
            for source in sorted((PACKAGE_ROOT / folder).rglob(pattern)):
                if "bench" not in source.parts:
                    digest.update(source.read_bytes())
    else:
        workspace.python(peer)
        digest.update((workspace.cache / "peers" / PEERS[peer].environment / "installed").read_bytes())
    return digest.hexdigest()
