from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from accel.bench import SHAPES
from accel.bench.bundle import BenchReport, BenchRow, _elsewhere, cases_of
from accel.bench.contest import Contestant
from accel.bench.limits import Limits
from accel.bench.stats import Ratio
from accel.errors import InputError
from accel.measurements import Measured
from accel.spec import ArchSpec, Kind, Task


def arch_of(kind: Kind, positions: int) -> ArchSpec:
    task: Task = "text-generation" if kind == "decoder" else "feature-extraction"
    return ArchSpec("bert", "BertModel", kind, task, 8, 100, positions, 0, False, ())


def test_encoder_shapes_are_cut_to_the_positions() -> None:
    cases = cases_of(arch_of("encoder", 128), SHAPES, 128, 32)
    assert [(case.batch, case.seq) for case in cases] == [(1, 8), (1, 128), (8, 128)]
    assert {case.role for case in cases} == {"encoder"}


def test_decoder_has_one_case_with_two_metrics() -> None:
    (case,) = cases_of(arch_of("decoder", 161), SHAPES, 128, 32)
    assert case.metrics == ("128+32 tokens: first token", "128+32 tokens: per token")


@pytest.mark.parametrize(
    ("kind", "positions", "arguments"),
    [
        ("decoder", 160, (SHAPES, 128, 32)),
        ("decoder", 160, (SHAPES, 0, 32)),
        ("encoder", 4, (SHAPES, 128, 32)),
        ("encoder", 512, (((0, 8),), 128, 32)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind: Kind, positions: int, arguments: Any) -> None:
    with pytest.raises(InputError, match="fit"):
        cases_of(arch_of(kind, positions), *arguments)


def test_report_as_table_and_as_data() -> None:
    rows = (
        BenchRow("forward 1x8", 2.0, 8.0, Ratio(0.25, 0.26, 7), 1.0),
        BenchRow("forward 1x128", 20.0, None, None, None),
    )
    report = BenchReport("minilm", 7, 2, rows, "torch not installed", Limits(28e9, 215e9), {"cpu": "a CPU"})
    lines = str(report).splitlines()
    assert lines[0] == "minilm on a CPU, 2 threads, medians of 7 rounds"
    assert lines[2].split() == ["forward", "1x8", "2.00", "8.00", "0.250", "50%"]
    assert lines[3].split() == ["forward", "1x128", "20.00", "-", "-", "-"]
    assert "torch not installed" in lines[4]
    assert "28.0 GB/s" in lines[5] and "215 GFLOP/s" in lines[5]
    assert len(lines) == 6
    assert report.to_json()["rows"][0]["ratio"]["upper"] == 0.26


def test_report_of_the_engines() -> None:
    rows = (BenchRow("forward 1x8", 2.0, None, None, None),)
    engines = (
        Measured("ort-cpu", "fp32", "", 3.0, {"forward 1x8": 3.0}),
        Measured("openvino", "fp32", "", 2.0, {"forward 1x8": 2.0}),
    )
    known = BenchReport(
        "minilm", 7, 2, rows, "eager PyTorch", None, {"cpu": "a CPU"},
        engines, "openvino fp32", {"torch": "it is absent"}, True,
    )  # fmt: skip
    lines = str(known).splitlines()
    assert lines[4].startswith("Engines, medians in ms")
    assert [line.split() for line in lines[5:7]] == [["ort-cpu", "fp32", "3.00"], ["openvino", "fp32", "2.00", "<"]]
    assert lines[7:] == ["Not measured: torch: it is absent", "From now on accel.load takes openvino fp32 here"]
    more = dataclasses.replace(known, elsewhere={"fp16+kv8": "cuda"})
    assert "Not measured: fp16+kv8: it has graphs for cuda" in str(more).splitlines()
    unknown = dataclasses.replace(known, remembered=False, unremembered="the disk is full")
    assert str(unknown).splitlines()[-1] == "Not remembered for accel.load: the disk is full"


def test_variants_that_nothing_here_runs_are_named() -> None:
    graphs: dict[str, Any] = {"fp32": ["ort-cpu"], "fp16": ["tensorrt", "cuda"], "w4g32": ["ort-cpu", "cuda"]}
    variants = {name: SimpleNamespace(graphs=dict.fromkeys(targets)) for name, targets in graphs.items()}
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(variants=variants))
    found = [Contestant("torch", "auto", ""), Contestant("ort-cpu", "w4g32", "ort-cpu")]
    assert _elsewhere(bundle, found) == {"fp16": "cuda, tensorrt"}
