from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from accel.bench import prepare
from accel.bench.client import WorkerFailure
from accel.bench.prepare import Workspace, ensure_export


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def install(workspace: Workspace, name: str, packages: str = "pkg==1") -> None:
    folder = workspace.cache / "peers" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "installed").write_text(packages)


def test_interpreter_of_each_environment(workspace: Workspace) -> None:
    assert workspace.python("accel") == Path(sys.executable)
    install(workspace, "current")
    assert workspace.python("genai") == workspace.cache / "peers" / "current" / "bin" / "python"


def test_missing_and_failed_environments_say_so(workspace: Workspace) -> None:
    with pytest.raises(WorkerFailure, match="run scripts/peers.sh openvino"):
        workspace.python("openvino")
    (workspace.cache / "peers").mkdir()
    (workspace.cache / "peers" / "openvino.failed").write_text("ERROR: no matching\n distribution")
    with pytest.raises(WorkerFailure, match="did not install: ERROR: no matching distribution"):
        workspace.python("openvino")


@pytest.mark.parametrize("record", [{"seconds": 2.0}, {"error": "export: no", "unsupported": True}])
def test_exports_and_their_failures_are_kept_until_the_environment_changes(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]
) -> None:
    install(workspace, "current")
    made: list[str] = []

    def export(workspace: Workspace, peer: str, model: str) -> dict[str, Any]:
        made.append(peer)
        return record

    def ensure(refresh: bool = False) -> None:
        if "error" not in record:
            ensure_export(workspace, "genai", "gpt2", refresh)
            return
        with pytest.raises(WorkerFailure, match="export: no") as failure:
            ensure_export(workspace, "genai", "gpt2", refresh)
        assert failure.value.unsupported

    monkeypatch.setattr(prepare, "_export", export)
    ensure()
    ensure()
    assert len(made) == 1
    ensure(refresh=True)
    assert len(made) == 2
    install(workspace, "current", "pkg==2")
    ensure()
    assert len(made) == 3


def test_peers_without_export_are_ready(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_export", lambda *arguments: pytest.fail("nothing to export"))
    ensure_export(workspace, "torch", "gpt2")
