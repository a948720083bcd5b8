"""Whole jobs: real TensorRT-RTX engines from real child processes, and what can go wrong with one of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import accel
from accel import engine_latency
from accel.bundle import Bundle, file_entry
from accel.cli import main
from accel.errors import InputError, RecipeError
from accel.schema import to_dict
from accel.store import EngineStore
from accel.warmup_jobs import WarmupReport, run
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
    assert "miss    llama rtx sm86 fp16 capacity 32, max_batch 2: variant outdated" in capsys.readouterr().out
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
    assert "miss    llama rtx sm86 fp16 capacity 32, max_batch 2: not in the store, 0.5 GB of memory" in printed
    assert "miss    bert rtx sm120 bf16 max_batch 2: variant missing" in printed
    assert not (bundles / "store").exists() and not (bundles / "logs").exists()
    assert "bf16" not in Bundle.open(bundles / "bert").manifest.variants

    report = accel.warmup(path, workers=2, show_progress=True)
    done = [("llama", "sm86"), ("llama", "sm89"), ("bert", "sm86"), ("bert", "sm120")]
    assert states(report) == [(*name, "built") for name in done] and report.ok
    assert len(list((bundles / "logs").glob("*-bert-bf16.log"))) == 1  # the variant was added once, not once per SM
    assert all(line.digest and line.bytes and line.seconds and line.attempts == 1 for line in report.engines)
    assert {entry.digest for entry in EngineStore(bundles / "store").verify()} == {x.digest for x in report.engines}
    told = capsys.readouterr().err
    assert re.search(r"\[1/1\] bert bf16: \d", told) and re.search(r"\[4/4\] \w+ rtx sm\d+ \w+.*: \d+\.\d s\n", told)
    assert "done" not in told and "built" not in told  # what became of each engine stands in the report, once
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


def spoil(bundle: Path) -> None:
    """An operator of the graph becomes one that nobody knows; the manifest takes it for the right file."""
    graph, manifest = bundle / "fp16.tensorrt.onnx", bundle / "manifest.json"
    graph.write_bytes(graph.read_bytes().replace(b"LayerNormalization", b"LayerNormalizatiom"))
    data = json.loads(manifest.read_text())
    data["files"][graph.name] = to_dict(file_entry(graph))
    manifest.write_text(json.dumps(data))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def test_failures_among_good_ones(bundles: Path, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("damaged", "unknown"):
        shutil.copytree(bundles / "bert", bundles / name)
    weights = bundles / "damaged" / "fp16.weights"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    spoil(bundles / "unknown")
    upside_down = {"decode": {"batch": {"min": 2, "opt": 1, "max": 2}, "sequence": {"min": 1, "opt": 1, "max": 1}}}
    jobs: list[dict[str, Any]] = [
        {**BERT, "sm": "sm42"},
        {**BERT, "bundle": "absent", "sm": "sm86"},
        {**BERT, "bundle": "damaged", "sm": "sm86"},
        {**BERT, "precision": "fp8", "sm": "sm86"},
        {**LLAMA, "sm": "sm86", "profiles": upside_down},
        {**LLAMA, "sm": "auto"},
        {**BERT, "bundle": "unknown", "sm": "sm86"},
        {**BERT, "sm": "sm86"},
    ]
    path = write(bundles, *jobs)
    assert main(["warmup", str(path), "--json", "--retries", "3"]) == 1
    lines = json.loads(capsys.readouterr().out)["engines"]
    assert [line["status"] for line in lines] == ["failed"] * 7 + ["built"]
    reasons = ["sm42", "no bundle", "corrupt", "precision 'fp8'", "min <= opt <= max", "no GPU here"]
    for line, reason in zip(lines, [*reasons, "LayerNormalizatiom"]):
        assert reason in line["reason"]
    assert [line["attempts"] for line in lines] == [0] * 6 + [1, 1]  # the plan found the others
    assert lines[6]["retried"] == []  # the next attempt would fail alike
    log = Path(lines[6]["log"])
    assert "Traceback" in log.read_text() and list(log.parent.iterdir()) == [log] and log.parent.parent == temporary


def test_a_variant_that_fails_has_a_log(bundles: Path, temporary: Path) -> None:
    (bundles / "bert" / "canonical.onnx").write_bytes(b"no graph")
    data = json.loads((bundles / "bert" / "manifest.json").read_text())
    data["files"]["canonical.onnx"] = to_dict(file_entry(bundles / "bert" / "canonical.onnx"))
    (bundles / "bert" / "manifest.json").write_text(json.dumps(data))
    (line,) = accel.warmup(write(bundles, {**BERT, "sm": "sm86", "precision": "bf16"}), retries=0).engines
    assert line.status == "failed" and "Traceback" in Path(str(line.log)).read_text()
    assert f"log: {temporary}/" in line.text()


def test_encoders_leave_a_shared_capacity_aside(bundles: Path, in_process: list[dict[str, Any]]) -> None:
    job = {**LLAMA, "bundle": ["llama", "bert"], "capacity": [32, 64], "sm": "sm86, sm89"}
    report = accel.warmup(write(bundles, job))
    named = [(Path(line.bundle).name, line.sm, line.capacity, line.status) for line in report.engines]
    assert named == [
        *(("llama", sm, capacity, "built") for capacity in (32, 64) for sm in ("sm86", "sm89")),
        *(("bert", sm, None, "built") for sm in ("sm86", "sm89")),  # once, not once per capacity
    ]
    assert [line.note for line in report.engines] == [None] * 4 + ["an encoder has no cache: capacity is not used"] * 2
    assert "capacity is not used" in report.engines[4].text() and len(in_process) == 6


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_dry_run_finds_what_a_build_would(bundles: Path, in_process: list[dict[str, Any]], precision: str) -> None:
    """Also where the variant is still missing."""
    job, one = {**LLAMA, "sm": "sm86", "precision": precision}, {"min": 1, "opt": 1, "max": 1}
    wide = {"all": {"batch": one, "sequence": {"min": 1, "opt": 8, "max": 33}}}
    jobs: list[tuple[dict[str, Any], str]] = [
        ({**job, "capacity": 161}, "capacity 161 is more than the model's 160 positions"),
        ({**job, "profiles": wide}, "goes up to 33, the capacity to 32"),
        ({**job, "capacity": 31}, "no multiple of 256 bytes"),
        ({**job, "max_batch": 0}, "max_batch must be"),
        ({**job, "optimization_level": 6}, "no optimization level 6"),
        ({**job, "hardware_compatibility": "same"}, "no hardware compatibility levels"),
        ({**job, "sm": "sm75", "precision": "bf16"}, "sm75 does not compute in bf16.*fp16"),
        ({**BERT, "sm": "sm75", "precision": "bf16"}, "sm75 does not compute in bf16"),
    ]
    path = write(bundles, *(one for one, _ in jobs), job)
    report = accel.warmup(path, dry_run=True)
    for line, (_, reason) in zip(report.engines, jobs):
        assert line.status == "failed" and re.search(reason, str(line.reason)), line
    assert report.engines[-1].status == "miss" and not report.ok
    assert [line.attempts for line in accel.warmup(path, retries=2).engines] == [0] * len(jobs) + [1]
    assert {request["do"] for request in in_process} <= {"build", "variant"} and len(in_process) <= 2


def test_a_store_that_cannot_be_written_is_tried_again(bundles: Path) -> None:
    (bundles / "store").mkdir()
    (bundles / "store" / ".locks").write_text("a file")
    path = write(bundles, {**BERT, "sm": "sm86"}, logs="logs")
    report = accel.warmup(path, retries=1)
    (line,) = report.engines
    assert line.status == "failed" and line.attempts == 2 and not report.ok
    assert "nothing was left behind" in str(line.reason) and line.retried == (line.reason,)
    assert "attempt 2" in line.text() and f"log: {bundles}/logs/" in line.text()


def test_a_store_that_may_not_hold_the_whole_job(bundles: Path, in_process: list[dict[str, Any]]) -> None:
    """The engines that had to go for the others are missing in the end, and it is said."""
    path = write(bundles, {**BERT, "sm": ["sm86", "sm89"]}, max_bytes="1k")
    report = accel.warmup(path)
    assert states(report) == [("bert", "sm86", "failed"), ("bert", "sm89", "built")] and not report.ok
    assert "removed for later engines: the store may hold 0 MB" in str(report.engines[0].reason)
    assert [request["max_bytes"] for request in in_process] == [1000, 1000] and len(plans(bundles)) == 1
    with pytest.raises(RecipeError, match="'lots' is no size.*max_bytes"):
        accel.warmup(write(bundles, {**BERT, "sm": "sm86"}, max_bytes="lots"))


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
        planned = accel.warmup(path, dry_run=True)
        report = accel.warmup(path)
    assert [line.status for line in planned.engines] == ["hit", "failed", "failed"] and not planned.ok
    assert f"(at {open_to_all}/store). Give a store" in str(planned.engines[1].reason)
    (open_to_all / "bf16").mkdir()
    (open_to_all / "bf16").chmod(0o777)
    other = write(open_to_all / "bf16", {**BERT, "bundle": "../bert", "precision": "bf16", "sm": "sm86"})
    with without_rights(open_to_all / "bert"):
        (line,) = accel.warmup(other, store=open_to_all / "bf16", dry_run=True).engines
    assert line.status == "failed" and re.search(r"accel quantize \S+/bert --variant bf16", str(line.reason))
    assert [line.status for line in report.engines] == ["hit", "failed", "failed"]
    assert all("no permission to write" in str(line.reason) for line in report.engines[1:])
    assert [request["do"] for request in in_process] == ["build"]

    assert states(accel.warmup(path)) == [("bert", "sm86", "hit"), ("bert", "sm89", "built"), ("bert", "sm86", "built")]


def test_a_gpu_that_does_not_run_the_engine(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds no GPU, which is a reason like any other."""
    monkeypatch.setattr(run, "current_sm", lambda: "sm86")
    report = accel.warmup(write(bundles, {**BERT, "sm": "sm86"}, logs="logs"), retries=0)
    assert states(report) == [("bert", "sm86", "failed")] and plans(bundles)
    assert "was built but does not run: no GPU sm86 here" in str(report.engines[0].reason)
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

    session, asked = Session(), []

    def open_tensorrt(bundle: Any, variant: str, options: Any, plan: memoryview, facts: Any, *_: Any, **__: Any) -> Any:
        asked.append((bundle.path.name, variant, options.max_batch, hashlib.sha256(plan).hexdigest(), facts.sms))
        return session

    for module in (run, engine_latency):
        monkeypatch.setattr(module, "current_sm", lambda: "sm89")
    monkeypatch.setattr("accel.engines.tensorrt.open.open_tensorrt", open_tensorrt)
    report = accel.warmup(write(bundles, {**BERT, "sm": ["sm86", "sm89"]}))
    assert [request["do"] for request in in_process] == ["build", "build", "run"]
    assert [sorted(line.latency_ms or {}) for line in report.engines] == [[], ["encode"]] and report.gpu == "sm89"
    stored = {entry.digest: entry.manifest for entry in EngineStore(bundles / "store").entries()}
    manifest = stored[str(report.engines[1].digest)]
    assert manifest is not None and asked == [("bert", "fp16", 2, manifest.sha256, ("sm89",))]
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
