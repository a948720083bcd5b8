"""Which engines are measured, in which groups, and which one wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel.bench.contest as contest
from accel.bench.bundle import bench_bundle
from accel.bench.cases import Case
from accel.bench.client import WorkerFailure
from accel.bench.contest import TORCH, Arena, Contestant, Outcome, choose, cost_of, find_contestants, rows_of
from accel.bundle import Bundle
from accel.engines import ENGINES, Engine
from accel.errors import DependencyError, EngineUnavailableError
from accel.measurements import Measured
from tests.engines.tiny_llama import draw_weights, write_bundle

ENCODER = (Case("forward 1x8", "encoder", batch=1, seq=8), Case("forward 1x32", "encoder", batch=1, seq=32))
DECODER = (Case("4+10 tokens", "decoder", prompt=4, new=10),)
ORT, TORCH_ENGINE = (next(engine for engine in ENGINES if engine.name == name) for name in ("ort-cpu", "torch"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a second variant, of the same bytes."""
    made = write_bundle(tmp_path_factory.mktemp("contest") / "bundle", draw_weights())
    variants = {"bf16": made.manifest.variants["fp32"], **made.manifest.variants}
    return Bundle(made.path, dataclasses.replace(made.manifest, variants=variants))


class FakeWorker:
    """Answers in the time that its name stands for, and drifts: each group is slower than the one before it."""

    speed: dict[str, float]
    failing: dict[str, str]  # name -> the operation that fails, or "late": at the fourth measurement
    alive: list[str]
    groups: int
    megabytes = 1000.0

    def __init__(self, _: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = TORCH if arguments[0] == TORCH else ""
        self.turns = 0

    def ask(self, op: str, *, limit_s: float = 600.0, **fields: Any) -> dict[str, Any]:
        cls = FakeWorker
        if op == "open":
            self.name = self.name or "{engine} {variant}".format(**fields["selection"])
            cls.groups += not cls.alive
            cls.alive.append(self.name)
        if cls.failing.get(self.name) == op:
            raise WorkerFailure(f"no {op} today")
        if op != "measure":
            return {"rss": self.megabytes}
        self.turns += 1
        if cls.failing.get(self.name) == "late" and self.turns == 4:
            raise WorkerFailure("it died")
        case = Case(**fields["case"])
        return {"times": {metric: [cls.speed[self.name] * cls.groups] for metric in case.metrics}}

    def close(self) -> None:
        if self.name in FakeWorker.alive:
            FakeWorker.alive.remove(self.name)


Hold = Callable[..., Outcome]


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hold:
    """``hold({name: ms}, fitting=..., failing=...)`` runs a contest of fake workers."""

    def run(
        speed: dict[str, float], fitting: int = 100, failing: dict[str, str] | None = None, say: Any = print
    ) -> Outcome:
        FakeWorker.speed, FakeWorker.failing = {**speed, TORCH: 40.0}, failing or {}
        FakeWorker.alive, FakeWorker.groups = [], 0
        monkeypatch.setattr(contest, "WorkerProcess", FakeWorker)
        room = fitting * 1e9 / contest.MEMORY_SHARE + 1e6
        monkeypatch.setattr(contest, "meminfo_bytes", lambda field: room)
        contestants = [Contestant(*name.split(), "ort-cpu") for name in speed]
        outcome = Arena(tmp_path, 1, ENCODER, 3, tmp_path, None, say).run(contestants, with_torch=True)
        assert FakeWorker.alive == [], "every worker is ended"
        return outcome

    return run


def test_all_take_turns_in_one_group(hold: Hold) -> None:
    outcome = hold({"a fp32": 10.0, "b fp32": 8.0, "b bf16": 4.0})
    assert len(outcome.groups) == 1 and set(outcome.groups[0]) == {"a fp32", "b fp32", "b bf16", TORCH}
    assert outcome.medians("b bf16") == {"forward 1x8": 4.0, "forward 1x32": 4.0}
    assert all(len(times) == 3 for metrics in outcome.groups[0].values() for times in metrics.values())


def test_what_does_not_fit_beside_the_others_is_measured_after_them(hold: Hold) -> None:
    outcome = hold({"a fp32": 10.0, "b fp32": 8.0, "c fp32": 4.0, "d fp32": 2.0}, fitting=2)
    groups = [set(group) - {TORCH} for group in outcome.groups]
    assert groups == [{"a fp32", "b fp32", "c fp32"}, {"a fp32", "d fp32"}]
    assert outcome.medians("d fp32")["forward 1x8"] == 2.0, "at the pace of the first group"
    assert outcome.groups[1]["d fp32"]["forward 1x8"] == [4.0] * 3


def test_every_step_is_told(hold: Hold) -> None:
    lines: list[str] = []
    hold({"a fp32": 10.0, "b fp32": 8.0, "c fp32": 1.0}, failing={"c fp32": "open"}, say=lines.append)
    ready = {line.partition(" after")[0] for line in lines[:4]}
    assert ready == {"a fp32: ready", "b fp32: ready", "eager PyTorch: ready", "c fp32: failed: no open today"}
    costs = "a fp32 10 ms, eager PyTorch 40 ms, b fp32 8 ms"
    left = "; about 0 s left"
    assert lines[4:] == [f"round {n} of 3: {costs}{left if n < 3 else ''}" for n in (1, 2, 3)]


@pytest.mark.parametrize("failure", ["open", "late"])
def test_no_round_is_told_of_nobody(hold: Hold, failure: str) -> None:
    lines: list[str] = []
    hold({"a fp32": 10.0}, failing={"a fp32": failure, TORCH: failure}, say=lines.append)
    failed = {line.partition(":")[0] for line in lines if ": failed: " in line}
    assert failed == {"a fp32", "eager PyTorch"} and not [line for line in lines if line.startswith("round")]


@pytest.mark.parametrize("failure", ["open", "measure", "late"])
def test_one_that_fails_is_left_out(hold: Hold, failure: str) -> None:
    outcome = hold({"a fp32": 10.0, "b fp32": 8.0}, failing={"b fp32": failure})
    assert set(outcome.groups[0]) == {"a fp32", TORCH} and set(outcome.failed) == {"b fp32"}


@pytest.mark.parametrize("failure", ["open", "late"])
def test_the_first_may_fail_too(hold: Hold, failure: str) -> None:
    outcome = hold({"a fp32": 10.0, "b fp32": 8.0}, failing={"a fp32": failure, TORCH: failure})
    assert list(outcome.groups[0]) == ["b fp32"] and set(outcome.failed) == {"a fp32", TORCH}
    assert outcome.medians("b fp32").keys() == {"forward 1x8", "forward 1x32"}


def test_nothing_left(hold: Hold) -> None:
    outcome = hold({"a fp32": 10.0}, failing={"a fp32": "late"})
    assert outcome.groups == [] and outcome.failed == {"a fp32": "it died"}


def test_costs() -> None:
    assert cost_of(ENCODER, {"forward 1x8": 2.0, "forward 1x32": 8.0}) == pytest.approx(4.0)
    assert cost_of(DECODER, {DECODER[0].metrics[0]: 20.0, DECODER[0].metrics[1]: 3.0}) == 50.0


def registry(monkeypatch: pytest.MonkeyPatch, *engines: Engine) -> None:
    monkeypatch.setattr(contest, "ENGINES", engines)


def like_ort(name: str, reason: str | None = None, device: str = "cpu", only: str = "") -> Engine:
    def probe(bundle: Bundle, variant: str) -> str | None:
        return reason if only in ("", variant) else None

    return Engine(name, device, probe, ORT.open, target="ort-cpu", pick=ORT.pick)


def test_every_engine_on_every_variant_it_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, like_ort("a"), like_ort("b", "no bf16 here", only="bf16"), like_ort("c", "gone"))
    place, found, passed_over = find_contestants(bundle, "auto")
    assert place == "cpu" and [one.name for one in found] == ["a fp32", "a bf16", "b fp32"], "the usual one first"
    assert passed_over == {"c": "gone"}


def test_a_gpu_is_measured_where_one_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "has_nvidia_device", lambda: True)
    registry(monkeypatch, like_ort("gpu", device="cuda"), like_ort("cpu"))
    assert [find_contestants(bundle, device)[0] for device in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    registry(monkeypatch, like_ort("gpu", "no driver", device="cuda"), like_ort("cpu"))
    place, found, passed_over = find_contestants(bundle, "auto")
    assert (place, found[0].engine, passed_over) == ("cpu", "cpu", {"gpu": "no driver"})
    assert find_contestants(bundle, "cuda")[1] == []


def test_a_gpu_that_is_not_there_is_said_in_a_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, like_ort("gpu", "pip install it", device="cuda"), like_ort("cpu"))
    monkeypatch.setattr("accel.engines.hidden_gpu", lambda: None)
    for present, message in ((False, "^There is no NVIDIA GPU here"), (True, "gpu: pip install it")):
        monkeypatch.setattr("accel.engines.has_nvidia_device", lambda present=present: present)
        with pytest.raises(EngineUnavailableError, match=message) as caught:
            bench_bundle(bundle.path, 1, 1, ((1, 8),), 8, 8, False, False, device="cuda")
        assert ("pip" in str(caught.value)) is present


def test_a_probe_that_raises_is_a_reason(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(bundle: Bundle, variant: str) -> str | None:
        raise DependencyError("it is broken")

    registry(monkeypatch, dataclasses.replace(like_ort("a"), probe=probe), like_ort("b"))
    assert find_contestants(bundle, "auto")[2] == {"a": "it is broken"}


def test_the_reference_takes_part_where_nothing_else_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, like_ort("a", "gone"), TORCH_ENGINE)
    _, found, passed_over = find_contestants(bundle, "auto")
    assert [one.engine for one in found] == ["torch"] and passed_over == {"a": "gone"}
    registry(monkeypatch, like_ort("a"), TORCH_ENGINE)
    assert [one.engine for one in find_contestants(bundle, "auto")[1]] == ["a", "a"]


def test_the_winner_is_the_fastest_of_the_usual_precision(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, like_ort("a"), like_ort("b"))
    costs = {"a fp32": 9.0, "a bf16": 2.0, "b fp32": 8.0}
    rows = [Measured(*name.split(), "", cost, {}) for name, cost in costs.items()]
    assert choose(bundle, rows).engine == "b" and choose(bundle, rows[:2]).variant == "fp32"
    assert choose(bundle, rows[1:2]).variant == "bf16", "nothing else ran"


def test_rows_name_the_graph_that_ran(bundle: Bundle, hold: Hold) -> None:
    outcome = hold({"a fp32": 10.0, "gone fp32": 1.0}, failing={"gone fp32": "open"})
    contestants = [Contestant("a", "fp32", "ort-cpu"), Contestant("gone", "fp32", "ort-cpu")]
    (row,) = rows_of(bundle, contestants, outcome, ENCODER)
    assert row.engine == "a" and len(row.graph) == 32 and row.cost == pytest.approx(10.0)
