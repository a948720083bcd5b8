"""What a warm-up tells: lines that differ, retries, logs, and a summary."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.cli import main
from accel.warmup_jobs import SummaryError, run
from accel.warmup_jobs.scheduler import Outcome
from tests.warmup_jobs.conftest import InProcess
from tests.warmup_jobs.test_warmup import BERT, states, temporary, write

__all__ = ["temporary"]  # a fixture
pytest.importorskip("tensorrt_rtx")


def test_logs_of_killed_jobs_are_swept(
    bundles: Path, temporary: Path, in_process: list[dict[str, Any]]
) -> None:
    """Those of a job that lives, and those that a job left to be read, stay."""
    for name in ("killed", "alive", "kept"):
        (temporary / f"accel-warmup-{name}").mkdir()
        (temporary / f"accel-warmup-{name}" / "001-x.log").write_text("why")
    for name in ("killed", "alive"):
        (temporary / f"accel-warmup-{name}" / ".running").write_text("locked")
    with (temporary / "accel-warmup-alive" / ".running").open() as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        accel.warmup(write(bundles, {**BERT, "sm": "sm86"}))
    assert sorted(path.name for path in temporary.iterdir()) == ["accel-warmup-alive", "accel-warmup-kept"]


def test_a_retry_of_a_variant_is_told(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was killed while it added the precision."""

    class KilledOnce(InProcess):
        def __init__(self, request: dict[str, Any], log: Path) -> None:
            super().__init__(request, log)
            if len(self.requests) == 1:
                self._outcome = Outcome(error="The process was ended by SIGKILL", killed=True)

    monkeypatch.setattr(InProcess, "requests", [], raising=False)
    monkeypatch.setattr(run, "Child", KilledOnce)
    jobs = write(bundles, {**BERT, "sm": "sm86", "precision": "bf16"}, summary="out.json")
    (line,) = accel.warmup(jobs).engines
    assert (line.status, line.attempts, line.retried) == ("built", 1, ())
    assert line.variant_attempts == 2 and "bf16 added at attempt 2" in line.text()
    (told,) = json.loads((bundles / "out.json").read_text())["engines"]
    assert told["variant_retried"] == ["The process was ended by SIGKILL"]


def test_engines_of_one_bundle_are_told_apart(
    bundles: Path, in_process: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the plan, the running lines and the report alike; ``auto`` is what it came to."""
    axis = {"min": 1, "opt": 2, "max": 4}
    job = {**BERT, "sm": "sm86", "precision": "auto"}
    jobs = [job, {**job, "max_batch": 4}, {**job, "profiles": {"one": {"batch": axis, "sequence": axis}}}]
    report = accel.warmup(write(bundles, *jobs), show_progress=True)
    names = [line.text().split(":")[0].removeprefix("built").strip() for line in report.engines]
    assert names == [f"bert rtx sm86 fp16 max_batch {rest}" for rest in ("2", "4", "2, one 1-4 (2) x 1-4 (2)")]
    told = capsys.readouterr().err
    assert all(f"] {name}: " in told for name in names) and "auto" not in told
    assert len(in_process) == 3


def test_a_summary_that_cannot_be_written_is_found_first(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is shown all the same, and the error names the key."""
    (bundles / "file").touch()
    jobs = write(bundles, {**BERT, "sm": "sm86"}, summary="file/out.json")
    with pytest.raises(SummaryError, match=r"at summary: .*file/out.json\). Give 'summary'") as caught:
        accel.warmup(jobs)
    assert states(caught.value.report) == [("bert", "sm86", "miss")]
    assert not (bundles / "store").exists()
    assert main(["warmup", str(jobs)]) == 1
    printed = capsys.readouterr()
    assert "miss    bert rtx sm86 fp16" in printed.out and "summary" in printed.err
    assert main(["warmup", str(jobs), "--dry-run", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["counts"] == {"miss": 1} and answer["error"]["type"] == "SummaryError"


def test_no_empty_folder_is_left(
    bundles: Path, temporary: Path, in_process: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(bundles, {**BERT, "sm": ["sm86", "sm42"]})
    assert states(accel.warmup(path)) == [("bert", "sm86", "built"), ("bert", "sm42", "failed")]
    assert list(temporary.iterdir()) == []  # the plan says why, no log does

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_tasks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        accel.warmup(write(bundles, {**BERT, "sm": "sm89"}))
    assert list(temporary.iterdir()) == []
