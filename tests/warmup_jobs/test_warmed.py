"""Engines that compile where they run, and contests: no GPU is needed here, and no TensorRT."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import accel
import accel.bench.contest as contest
import accel.engines as engines
from accel.bench.contest import COSTS
from accel.bundle import Bundle
from accel.cli import main
from accel.engines import Engine
from accel.errors import EngineUnavailableError
from accel.measurements import recall
from accel.warmup_jobs import measuring, warming
from accel.warmup_jobs.jobs import expand, read_jobs
from accel.warmup_jobs.measuring import decoder_sizes
from tests.bench.test_contest import FakeWorker

NO_GPU = "there is no NVIDIA GPU or driver here"
ORT = next(engine for engine in engines.ENGINES if engine.name == "ort-cpu")
LLAMA = {"bundle": "llama", "target": ["cuda", "ort-cuda"], "precision": "fp16", "capacity": 64, "max_batch": 2}


@pytest.fixture(scope="module")
def folder_of_two(warmup_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` and ``bert`` with fp16 graphs for both engines. Read-only."""
    folder = Path(shutil.copytree(warmup_bundles, tmp_path_factory.mktemp("warmed") / "job"))
    for name in ("llama", "bert"):
        for target in ("cuda", "ort-cuda"):
            accel.add_variant(folder / name, "fp16", target=target, check=False, show_progress=False)
    return folder


def write(folder: Path, *jobs: dict[str, Any], **more: Any) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(json.dumps({"store": "store", "jobs": jobs, **more}))  # JSON is YAML
    return path


def fake(name: str) -> Engine:
    """Runs the bundle's fp32 graph of ONNX Runtime CPU under another name, and calls itself an engine of a GPU."""

    def open_named(bundle: Bundle, variant: str, options: Any) -> Any:
        session = ORT.open(bundle, "fp32", options)
        session.info = dataclasses.replace(session.info, name=name, variant="fp16")
        return session

    pick = lambda bundle, variant: "fp16"  # noqa: E731
    return Engine(name, "cuda", lambda bundle, variant: None, open_named, target=name, pick=pick)


Gpu = Callable[..., None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """``gpu(cuda=ms, ort_cuda=ms)``: a machine with a GPU on which the engines take so long."""
    found = (fake("cuda"), fake("ort-cuda"))

    def use(failing: dict[str, str] | None = None, **speed: float) -> None:
        FakeWorker.speed = {f"{name.replace('_', '-')} fp16": ms for name, ms in speed.items()}
        FakeWorker.failing, FakeWorker.alive, FakeWorker.groups = failing or {}, [], 0
        monkeypatch.setattr(contest, "WorkerProcess", FakeWorker)
        for module in (contest, engines, measuring):
            monkeypatch.setattr(module, "ENGINES", found)
        for place in ("accel.warmup_jobs.run.missing_gpu", "accel.engines.missing_gpu"):
            monkeypatch.setattr(place, lambda: None)
        monkeypatch.setattr("accel.engines.has_nvidia_device", lambda: True)

    return use


def test_without_a_gpu_the_reason_is_said(
    folder_of_two: Path, tmp_path: Path, in_process: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(folder_of_two, tmp_path / "job"))
    path = write(folder, {**LLAMA, "bundle": ["llama", "bert"], "sm": ["sm86", "sm89"]})
    for options in (["--dry-run"], []):
        assert main(["warmup", str(path), *options]) == 0
        printed = capsys.readouterr().out
        said = f"cuda has no use for sm, not warmed up: {NO_GPU}"
        assert f"hit     llama cuda any fp16 capacity 64, max_batch 2: {said}\n" in printed
        said = f"ort-cuda has no use for sm, capacity, not warmed up: {NO_GPU}"
        assert f"bert ort-cuda any fp16 max_batch 2: {said}\n" in printed
        assert f"Not measured for accel.load: llama, bert: {NO_GPU}\n" in printed
        assert "Engines were not run" not in printed, "of TensorRT there are none"
        assert printed.count("\nhit ") + printed.startswith("hit ") == 4, "once for both SMs"
    assert in_process == []
    assert main(["warmup", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(line["status"], line["reason"]) for line in report["measured"]] == [("skipped", NO_GPU)] * 2


def test_a_missing_graph_is_added_also_without_a_gpu(bundles: Path, in_process: list[dict[str, Any]]) -> None:
    one = {**LLAMA, "target": "cuda"}
    path = write(bundles, one, {**one, "bundle": "bert", "precision": "auto"})
    planned = accel.warmup(path, dry_run=True)
    assert [(line.status, line.reason) for line in planned.engines] == [("miss", "variant missing")] * 2 and planned.ok
    assert "llama cuda any fp16 capacity 64, max_batch 2: variant missing, " in str(planned)
    report = accel.warmup(path)
    assert [line.status for line in report.engines] == ["built"] * 2 and report.ok
    assert [(one["do"], one["variant"], one["target"]) for one in in_process] == [("variant", "fp16", "cuda")] * 2
    for name in ("llama", "bert"):
        assert "cuda" in Bundle.open(bundles / name).manifest.variants["fp16"].graphs
    assert [line.status for line in accel.warmup(path).engines] == ["hit"] * 2


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"precision": "fp61"}, "fp61"),
        ({"precision": "w8a8"}, "cannot run this decoder as w8a8"),
        ({"bundle": "absent"}, "no bundle"),
    ],
)
def test_what_cannot_be_is_found_by_the_plan(bundles: Path, job: dict[str, Any], said: str) -> None:
    (line,) = accel.warmup(write(bundles, {**LLAMA, "target": "cuda", **job}), dry_run=True).engines
    assert line.status == "failed" and said in str(line.reason)


def test_load_takes_what_warm_up_measured_to_be_fastest(
    folder_of_two: Path, tmp_path: Path, in_process: list[dict[str, Any]], gpu: Gpu, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(folder_of_two, tmp_path / "job"))
    path, store = write(folder, LLAMA), folder / "store"
    gpu(cuda=9.0, ort_cuda=4.0)
    with accel.load(folder / "llama", device="cuda", store=store) as model:
        assert (model.engine.name, model.engine.why) == ("cuda", ""), "the documented order"

    assert main(["warmup", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "to be warmed up here" in printed and "To be measured here, for accel.load: llama\n" in printed
    assert in_process == []

    report = accel.warmup(path)
    assert [request["do"] for request in in_process] == ["warm", "warm", "measure"]
    assert report.ok and [line.status for line in report.engines] == ["hit", "hit"]
    (line,) = report.measured
    assert (line.status, line.chosen) == ("measured", "ort-cuda fp16")
    assert sorted(line.engines) == ["cuda fp16", "ort-cuda fp16"]
    assert "Measured: llama: cuda fp16 " in str(report) and "accel.load takes ort-cuda fp16 here" in str(report)
    known = recall(Bundle.open(folder / "llama"), "cuda", None, str(store))
    assert known is not None and known.cost == COSTS["decoder"] and known.rounds == measuring.ROUNDS
    assert list((store / "measurements").iterdir()), "kept in the store"
    with accel.load(folder / "llama", device="cuda", store=store) as model:
        assert model.engine.name == "ort-cuda" and model.engine.why.startswith("measured: ")

    in_process.clear()
    again = accel.warmup(path)
    assert [request["do"] for request in in_process] == ["warm", "warm"], "what is known is not measured again"
    assert [line.status for line in again.measured] == ["hit"] and "Measured here before: llama: cuda" in str(again)
    assert [line.status for line in accel.warmup(path, dry_run=True).measured] == ["hit"]


def test_what_a_job_newly_names_is_measured_with_the_others(
    folder_of_two: Path, tmp_path: Path, in_process: list[dict[str, Any]], gpu: Gpu
) -> None:
    folder = Path(shutil.copytree(folder_of_two, tmp_path / "job"))
    gpu({"ort-cuda fp16": "open"}, cuda=9.0, ort_cuda=4.0)
    path = write(folder, {**LLAMA, "target": "cuda"})
    (line,) = accel.warmup(path).measured
    assert line.status == "measured" and line.passed_over == {"ort-cuda fp16": "no open today"}
    assert "Not measured: llama ort-cuda fp16: no open today" in line.text()
    assert [line.status for line in accel.warmup(path).measured] == ["hit"]
    gpu(cuda=9.0, ort_cuda=4.0)
    (line,) = accel.warmup(write(folder, LLAMA)).measured
    assert line.status == "measured" and line.chosen == "ort-cuda fp16"


def test_failures_are_told_and_the_others_go_on(
    folder_of_two: Path, tmp_path: Path, in_process: list[dict[str, Any]], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(folder_of_two, tmp_path / "job"))
    gpu({f"{name} fp16": "open" for name in ("cuda", "ort-cuda")}, cuda=9.0, ort_cuda=4.0)
    warm = warming.warm_engine

    def refuse(wanted: Any, variant: str, store: str | None) -> dict[str, float]:
        if wanted.target == "cuda":
            raise EngineUnavailableError("the GPU is sm75")
        return warm(wanted, variant, store)

    monkeypatch.setattr(warming, "warm_engine", refuse)
    report = accel.warmup(write(folder, LLAMA), retries=0)
    assert [line.status for line in report.engines] == ["failed", "hit"] and not report.ok
    assert str(report.engines[0].reason).startswith("It does not run: the GPU is sm75")
    (line,) = report.measured
    assert line.status == "failed" and "could not be measured" in str(line.reason) and "no open today" in line.text()

    report = accel.warmup(write(folder, {**LLAMA, "target": "cuda"}), retries=0)
    assert report.measured[0].status == "skipped" and measuring.FOREIGN in str(report)


def test_what_runs_is_what_is_served(folder_of_two: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(cuda=1.0)
    monkeypatch.setattr(warming, "SHAPES", ((1, 8), (2, 16)))
    monkeypatch.setattr(warming, "TOKENS", 16)
    monkeypatch.setattr(measuring, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(measuring, "NEW_TOKENS", 2)
    jobs = {"jobs": [{**LLAMA, "target": "cuda", "bundle": name, "max_batch": 3} for name in ("llama", "bert")]}
    decoder, encoder = expand(read_jobs(jobs)[0], folder_of_two)
    found = warming.warm_engine(decoder, "fp16", None)
    assert list(found) == [name for rows in (1, 2, 3) for name in (f"prompt {rows}x8", f"token, batch {rows}")]
    assert all(ms > 0 for ms in found.values())
    assert list(warming.warm_engine(encoder, "fp16", None)) == ["forward 1x8", "forward 2x16", "forward 3x16"]


def test_prompts_are_recorded_before_they_are_timed(folder_of_two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one of a size runs plainly, the second is recorded."""
    monkeypatch.setattr(warming, "ROUNDS", 1)
    greedy: list[float] = []

    def generate(ids: Any, do_sample: bool = False, **options: Any) -> list[SimpleNamespace]:
        if not do_sample:
            greedy.append(1.0 if len(greedy) < 2 else 0.001)
        return [SimpleNamespace(timings=SimpleNamespace(first_token=greedy[-1] if greedy else 9.0, total=2.0))]

    model = SimpleNamespace(capacity=64, max_batch=1, generate=generate)
    found = warming._warm_decoder(model, Bundle.open(folder_of_two / "llama"))
    assert next(iter(found.values())) == 1.0, "milliseconds"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes on masked lanes
def test_the_cuda_engine_is_warmed_up(folder_of_two: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    from accel.engines.cuda.device import INTERPRETED

    if not INTERPRETED:
        pytest.skip("there is a GPU: the interpreter stands in for one")
    monkeypatch.setattr("accel.engines.cuda.registry.probe", lambda bundle, variant: None)
    monkeypatch.setattr(warming, "ROUNDS", 1)
    monkeypatch.setattr(measuring, "PROMPT_TOKENS", 2)
    monkeypatch.setattr(measuring, "NEW_TOKENS", 1)
    job = {**LLAMA, "target": "cuda", "capacity": 8, "max_batch": 1}
    (wanted,) = expand(read_jobs({"jobs": [job]})[0], folder_of_two)
    assert list(warming.warm_engine(wanted, "fp16", str(tmp_path))) == ["prompt 1x2", "token, batch 1"]


def test_sizes_are_those_of_bench_where_they_fit() -> None:
    from accel.cli import build_parser

    usual = build_parser().parse_args(["bench", "b"])
    assert decoder_sizes(4096) == decoder_sizes(161) == (usual.prompt_tokens, usual.new_tokens)
    assert usual.rounds == measuring.ROUNDS
    for positions in (3, 8, 64, 160):
        prompt, new = decoder_sizes(positions)
        assert prompt >= 1 and new >= 1 and prompt + new + 1 <= positions
