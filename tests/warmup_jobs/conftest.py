"""Two tiny bundles with an fp16 variant, and a cache folder of each test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.errors import AccelError
from accel.warmup_jobs import child, run
from accel.warmup_jobs.scheduler import Outcome
from tests.parity.families import ALL, build_model

MakeOnce = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """History, hashes and the default store go here."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ACCEL_STORE", raising=False)
    monkeypatch.delenv("ACCEL_STORE_KEY", raising=False)
    monkeypatch.delenv("ACCEL_STORE_MAX_BYTES", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def warmup_bundles(made_once: MakeOnce) -> Path:
    """A folder with ``llama`` and ``bert``, both with fp32 and fp16. Read-only."""

    def make(out: Path) -> None:
        for name in ("llama", "bert"):
            exported = made_once(
                f"family_{name}",
                lambda path, name=name: accel.export(  # type: ignore[misc]
                    build_model(name), path, task=ALL[name].task, show_progress=False
                ),
            )
            shutil.copytree(exported, out / name)
            accel.add_variant(out / name, "fp16", check=False, show_progress=False)

    return made_once("warmup_bundles", make)


@pytest.fixture
def bundles(warmup_bundles: Path, tmp_path: Path) -> Path:
    """A copy of ``warmup_bundles`` to be changed: the folder of a job."""
    return Path(shutil.copytree(warmup_bundles, tmp_path / "job"))


class InProcess:
    """Stands in for a child process: the same work, done here and at once."""

    requests: list[dict[str, Any]]

    def __init__(self, request: dict[str, Any], log: Path) -> None:
        self.requests.append(request)
        try:
            self._outcome = Outcome(child._answer(request))
        except AccelError as error:
            self._outcome = Outcome(error=str(error), permanent=child.is_permanent(error))

    def poll(self) -> Outcome:
        return self._outcome

    def interrupt(self) -> None: ...

    def kill(self) -> None: ...


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No children; returns what they would have been asked."""
    InProcess.requests = []
    monkeypatch.setattr(run, "Child", InProcess)
    return InProcess.requests
