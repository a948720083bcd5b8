"""Whole jobs: real TensorRT-RTX engines from real child processes, and what can go wrong with one of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import AccelError, InputError, RecipeError, StorageError
from accel.store import EngineStore
from accel.warmup_jobs import WarmupReport, child, run
from accel.warmup_jobs.scheduler import Outcome
from tests.store.conftest import s3
from tests.store.test_broken_disks import without_rights

__all__ = ["s3"]  # a fixture
pytest.importorskip("tensorrt_rtx")
LLAMA = {"bundle": "llama", "target": "rtx", "precision": "fp16", "capacity": 32, "max_batch": 2}
BERT = {"bundle": "bert", "target": "rtx", "precision": "fp16", "max_batch": 2}


def write(folder: Path, *jobs: dict[str, Any], **more: Any) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(json.dumps({"store": "store", "jobs": jobs, **more}))  # JSON is YAML
    return path


def states(report: WarmupReport) -> list[tuple[str, str, str]]:
    return [(Path(line.bundle).name, line.sm, line.status) for line in report.engines]


def plans(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.plan"))


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


def test_an_outdated_variant_is_planned_and_lowered_again(
    bundles: Path, in_process: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = bundles / "llama" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["variants"]["fp16"]["graphs"]["tensorrt"]["lowering"] = None  # by an accel that did not record it
    manifest.write_text(json.dumps(data))
    path = write(bundles, {**LLAMA, "sm": ["sm86"]})
    before = manifest.read_bytes()
    assert main(["warmup", str(path), "--dry-run"]) == 0
    assert "miss    llama rtx sm86 fp16 capacity 32: variant outdated" in capsys.readouterr().out
    assert manifest.read_bytes() == before and in_process == []
    report = accel.warmup(path)
    assert states(report) == [("llama", "sm86", "built")]
    assert [request["do"] for request in in_process] == ["variant", "build"]
    entry = Bundle.open(bundles / "llama", verify=True).graph("fp16", "tensorrt")
    assert entry.lowering is not None and entry.file == "fp16.tensorrt.2.onnx"


def test_two_sms_from_plan_to_hits(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [{**LLAMA, "sm": ["sm86", "sm89"]}, {**BERT, "sm": ["sm86", "sm120"], "precision": "bf16"}]
    path = write(bundles, *jobs, summary="out.json", logs="logs")

    assert main(["warmup", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "miss    llama rtx sm86 fp16 capacity 32: not in the store, 0.5 GB of memory" in printed
    assert "miss    bert rtx sm120 bf16: variant missing" in printed
    assert not (bundles / "store").exists() and not (bundles / "logs").exists()
    assert "bf16" not in Bundle.open(bundles / "bert").manifest.variants

    report = accel.warmup(path, workers=2, show_progress=True)
    done = [("llama", "sm86"), ("llama", "sm89"), ("bert", "sm86"), ("bert", "sm120")]
    assert states(report) == [(*name, "built") for name in done] and report.ok
    assert len(list((bundles / "logs").glob("*-bert-bf16.log"))) == 1  # the variant was added once, not once per SM
    assert all(line.digest and line.bytes and line.seconds and line.attempts == 1 for line in report.engines)
    assert {entry.digest for entry in EngineStore(bundles / "store").verify()} == {x.digest for x in report.engines}
    assert "bert bf16: done" in capsys.readouterr().err
    assert json.loads((bundles / "out.json").read_text()) == report.to_json()

    before = plans(bundles)
    assert main(["warmup", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["counts"] == {"hit": 4} and summary["ok"] and summary["gpu"] is None
    assert [line["bytes"] for line in summary["engines"]] == [line.bytes for line in report.engines]
    assert plans(bundles) == before
    planned = accel.warmup(path, dry_run=True)
    assert states(planned) == [(*name, "hit") for name in done]
    assert "not run: there is no GPU" in str(report) and "not run" not in str(planned)


def test_failures_among_good_ones(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bundles / "bert", bundles / "damaged")
    weights = bundles / "damaged" / "fp16.weights"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    upside_down = {"decode": {"batch": {"min": 2, "opt": 1, "max": 2}, "sequence": {"min": 1, "opt": 1, "max": 1}}}
    jobs: list[dict[str, Any]] = [
        {**BERT, "sm": "sm42"},
        {**BERT, "bundle": "absent", "sm": "sm86"},
        {**BERT, "bundle": "damaged", "sm": "sm86"},
        {**BERT, "precision": "fp8", "sm": "sm86"},
        {**BERT, "capacity": 8, "sm": "sm86"},
        {**LLAMA, "sm": "sm86", "profiles": upside_down},
        {**LLAMA, "sm": "auto"},
        {**BERT, "sm": "sm86"},
    ]
    path = write(bundles, *jobs)
    assert main(["warmup", str(path), "--json", "--retries", "3"]) == 1
    lines = json.loads(capsys.readouterr().out)["engines"]
    assert [line["status"] for line in lines] == ["failed"] * 7 + ["built"]
    reasons = ["sm42", "no bundle", "corrupt", "precision 'fp8'", "encoder", "min <= opt <= max", "no GPU here"]
    for line, reason in zip(lines, reasons):
        assert reason in line["reason"]
    assert lines[5]["attempts"] == 1 and lines[5]["retried"] == []  # found by the build: the next would fail alike
    assert "Traceback" in Path(lines[5]["log"]).read_text()
    shutil.rmtree(Path(lines[5]["log"]).parent)


def test_a_store_that_cannot_be_written_is_tried_again(bundles: Path) -> None:
    (bundles / "store").mkdir()
    (bundles / "store" / ".locks").write_text("a file")
    path = write(bundles, {**BERT, "sm": "sm86"}, logs="logs")
    report = accel.warmup(path, retries=1)
    (line,) = report.engines
    assert line.status == "failed" and line.attempts == 2 and not report.ok
    assert "nothing was left behind" in str(line.reason) and line.retried == (line.reason,)
    assert "attempt 2" in line.text() and f"log: {bundles}/logs/" in line.text()


def test_a_refused_engine_is_built_again(bundles: Path) -> None:
    path = write(bundles, {**BERT, "sm": "sm86"}, logs="logs")
    accel.warmup(path)
    (plan,) = (bundles / "store").rglob("*.plan")
    os.truncate(plan, 1000)
    report = accel.warmup(path)
    assert states(report) == [("bert", "sm86", "built")]
    assert [entry.problem for entry in EngineStore(bundles / "store").verify()] == [None]


@pytest.fixture
def open_to_all(bundles: Path) -> Iterator[Path]:
    """A copy of the job's folder that every user may enter, unlike ``tmp_path``."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(bundles, folder, dirs_exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def test_a_read_only_store_serves_hits(
    open_to_all: Path, in_process: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(open_to_all / "cache"))
    accel.warmup(write(open_to_all, {**BERT, "sm": "sm86"}))
    path = write(open_to_all, {**BERT, "sm": ["sm86", "sm89"]}, {**BERT, "precision": "bf16", "sm": "sm86"})
    with without_rights(open_to_all):
        report = accel.warmup(path, retries=0)
    assert [line.status for line in report.engines] == ["hit", "failed", "failed"]
    assert all("no permission to write" in str(line.reason) for line in report.engines[1:])
    assert [request["do"] for request in in_process] == ["build", "variant", "build"]
    assert states(accel.warmup(path)) == [("bert", "sm86", "hit"), ("bert", "sm89", "built"), ("bert", "sm86", "built")]


def test_a_gpu_that_does_not_run_the_engine(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds no GPU, which is a reason like any other."""
    monkeypatch.setattr(run, "current_sm", lambda: "sm86")
    report = accel.warmup(write(bundles, {**BERT, "sm": "sm86"}, logs="logs"), retries=0)
    assert states(report) == [("bert", "sm86", "failed")] and plans(bundles)
    assert "was built but does not run: no engine can run this bundle" in str(report.engines[0].reason)
    assert str(report.engines[0].log).endswith("-run.log")


def test_a_gpu_runs_its_engines(
    bundles: Path, in_process: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        calls: tuple[str, ...] = ()

        def warm_up(self) -> None:
            self.calls += ("warm up",)

        def run(self, feeds: dict[str, Any]) -> None:
            self.calls += (str(feeds["input_ids"].shape),)

        def close(self) -> None:
            self.calls += ("close",)

    session, asked = Session(), {}

    def open_session(bundle: Bundle, **options: Any) -> Any:
        asked.update(options)
        return type("Opened", (), {"session": session})

    monkeypatch.setattr(run, "current_sm", lambda: "sm89")
    monkeypatch.setattr("accel.engines.open_session", open_session)
    report = accel.warmup(write(bundles, {**BERT, "sm": ["sm86", "sm89"]}))
    assert [request["do"] for request in in_process] == ["build", "build", "run"]
    assert [sorted(line.latency_ms or {}) for line in report.engines] == [[], ["encode"]] and report.gpu == "sm89"
    assert asked["engine"] == "rtx" and asked["variant"] == "fp16" and asked["options"].max_batch == 2
    assert asked["options"].store == str(bundles / "store")
    assert session.calls[0] == "warm up" and session.calls[-1] == "close" and "(2, 64)" in session.calls
    assert "encode 0." in str(report) and "no GPU" not in str(report)


def test_a_signed_store_in_a_bucket(bundles: Path, s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Children get to it by the environment, as this process does."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["client_kwargs"]["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3["secret"])
    monkeypatch.setenv("ACCEL_STORE_KEY", "env:SIGNING_KEY")
    monkeypatch.setenv("SIGNING_KEY", "ab" * 32)
    path = write(bundles, {**BERT, "sm": "sm86"}, store="s3://bucket/warmup", logs="logs")
    assert states(accel.warmup(path)) == [("bert", "sm86", "built")]
    assert states(accel.warmup(path)) == [("bert", "sm86", "hit")]
    monkeypatch.setenv("SIGNING_KEY", "cd" * 32)
    assert states(accel.warmup(path, dry_run=True)) == [("bert", "sm86", "miss")]  # another's engine is no hit


def test_a_summary_that_cannot_be_written_is_found_first(bundles: Path) -> None:
    (bundles / "file").touch()
    with pytest.raises(StorageError):
        accel.warmup(write(bundles, {**BERT, "sm": "sm86"}, summary="file/out.json"))
    assert not (bundles / "store").exists()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"workers": 0}, InputError, "workers"),
        ({"retries": -1}, InputError, "retries must be 0 or more"),
        ({"memory": "lots"}, RecipeError, "no size.*memory"),
        ({"store": "memory://engines"}, InputError, "one process alone"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        accel.warmup({"jobs": [{**BERT, "sm": "sm86"}]}, **options)


def test_where_the_store_is(bundles: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(bundles)
    job = {"jobs": [{**BERT, "sm": "sm86"}]}
    default = accel.warmup(job, dry_run=True)
    assert default.store == str(tmp_path / "cache" / "engines")
    monkeypatch.setenv("ACCEL_STORE", str(tmp_path / "shared"))
    assert accel.warmup(job, dry_run=True).store == str(tmp_path / "shared")
    assert accel.warmup({**job, "store": "here"}, dry_run=True).store == str(bundles / "here")
    assert accel.warmup({**job, "store": "here"}, store=tmp_path / "x", dry_run=True).store == str(tmp_path / "x")
