from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.bench.cases import Target
from accel.bench.report import format_figure, judge, markdown, medians, metrics_of, ratios, read_result, write_result

STEADY = list(np.linspace(0.98, 1.02, 15))


def scaled(factor: float) -> list[float]:
    return [factor * value for value in STEADY]


def result_of(*groups: dict[str, dict[str, list[float]]], **failed: str) -> dict[str, Any]:
    peers: dict[str, Any] = {name: {"label": name, "status": "measured"} for group in groups for name in group}
    peers |= {name: {"label": name, "status": "failed", "reason": reason} for name, reason in failed.items()}
    return {
        "schema": 1,
        "suite": "encoder",
        "unit": "ms",
        "date": "2026-11-20",
        "machine": {"cpu": "a CPU"},
        "settings": {"threads": 2, "rounds": 15},
        "peers": peers,
        "groups": list(groups),
        "targets": [],
    }


def test_fastest_is_the_peer_that_the_subject_does_worst_against() -> None:
    result = result_of({"accel": {"m": scaled(9)}, "slow": {"m": scaled(20)}, "quick": {"m": scaled(10)}})
    verdict = judge(result, Target("m", 0.9, "fastest"))
    assert verdict["against"] == "quick"
    assert verdict["ratio"] == pytest.approx(0.9)
    assert verdict["reached"] is True


def test_limit_holds_for_the_upper_bound_not_for_the_median() -> None:
    ours = scaled(9)
    noisy = [time * (1.3 if index % 2 else 0.95) for index, time in enumerate(ours)]
    result = result_of({"accel": {"m": noisy}, "peer": {"m": scaled(9)}})
    verdict = judge(result, Target("m", 1.0, "peer"))
    assert verdict["ratio"] < 1.05 < verdict["upper"]
    assert verdict["reached"] is False


def test_each_ratio_is_taken_in_the_group_that_holds_both() -> None:
    first = {"accel": {"m": scaled(10)}, "near": {"m": scaled(10)}}
    second = {"accel": {"m": scaled(20)}, "far": {"m": scaled(40)}}  # the machine was twice as slow
    result = result_of(first, second)
    found = ratios(result, "m")
    assert found["near"].median == pytest.approx(1.0) and found["far"].median == pytest.approx(0.5)
    assert medians(result, "m") == pytest.approx({"accel": 10, "near": 10, "far": 40})


def test_too_few_rounds_decide_nothing() -> None:
    result = result_of({"accel": {"m": [1.0] * 14}, "peer": {"m": [9.0] * 14}})
    verdict = judge(result, Target("m", 1.0, "peer"))
    assert verdict["reached"] is None and "14 rounds; 15 are needed" in verdict["reason"]


@pytest.mark.parametrize(("limit", "reached"), [(2300.0, True), (2000.0, False)])
def test_absolute_limits(limit: float, reached: bool) -> None:
    result = result_of({"accel": {"rss": [2100.0, 2200.0, 2250.0]}})
    assert judge(result, Target("rss", limit, "absolute"))["reached"] is reached


def test_missing_measurements_leave_a_target_open() -> None:
    target = Target("m", 1.0, "genai")
    assert judge(result_of({"peer": {"m": STEADY}}), target)["reason"] == "accel was not measured"
    assert judge(result_of({"accel": {"m": STEADY}}), target)["reason"] == "no genai peer was measured"
    assert judge(result_of({"accel": {"m": STEADY}}), Target("m", 1.0, "fastest"))["reached"] is None


def test_other_variants_of_accel_are_not_the_fastest_peer() -> None:
    result = result_of({"new": {"m": scaled(9)}, "accel": {"m": scaled(2)}, "peer": {"m": scaled(10)}})
    result["subject"] = "new"
    result["peers"]["accel"]["ours"] = True
    assert judge(result, Target("m", 0.9, "fastest"))["against"] == "peer"
    assert ratios(result, "m")["accel"].median == pytest.approx(4.5)
    assert "in brackets new's time" in markdown(result) and "| **new** |" in markdown(result)


@pytest.mark.parametrize(("figure", "reached"), [(0.998, True), (0.996, False)])
def test_a_figure_beside_the_times_is_held_to_a_limit_from_above(figure: float, reached: bool) -> None:
    result = result_of({"accel": {"m": STEADY}})
    result["peers"]["accel"]["figures"] = {"cosine": figure}
    target = Target("cosine", 0.997, "absolute", at_least=True)
    result["targets"] = [{**asdict(target), **judge(result, target)}]
    verdict = "reached" if reached else "not reached"
    assert f"- cosine: {figure:.4f}, limit at least 0.9970: {verdict}\n" in markdown(result)


def test_a_reference_that_was_not_timed_is_named() -> None:
    result = result_of({"accel": {"m": STEADY}})
    agreement = {"reference": "torch", "m": "cosine 0.9980 (least 0.9950)", "n": "max abs 1e-1"}
    result["peers"]["accel"]["agreement"] = agreement
    text = markdown(result)
    assert "answers against eager PyTorch" in text
    assert "| cosine 0.9980 (least 0.9950), max abs 1e-1 |" in text


def test_markdown_shows_medians_ratios_verdicts_and_failures() -> None:
    result = result_of({"accel": {"m": scaled(5)}, "peer": {"m": scaled(10)}}, broken="it does\nnot install")
    target = Target("m", 0.6, "peer")
    result["targets"] = [{"metric": "m", "limit": 0.6, "reference": "peer", **judge(result, target)}]
    text = markdown(result)
    assert "| **accel** | 5.00 |" in text
    assert "| peer | 10.0 (0.50, 0.50) |" in text
    assert "- m: 0.500 x peer (upper bound 0.500, limit 0.60): reached" in text
    assert "- broken: failed: it does not install" in text


def test_markdown_shows_how_far_the_answers_are_from_the_reference() -> None:
    result = result_of({"accel": {"m": scaled(5)}, "torch": {"m": scaled(10)}, "odd": {"m": scaled(7)}})
    findings = {"accel": ("max abs 2.0e-06", "max abs 1.0e-05"), "torch": ("max abs 0.0e+00",), "odd": ("shape [1]",)}
    for peer, texts in findings.items():
        agreement = {"reference": "torch", **{str(case): text for case, text in enumerate(texts)}}
        result["peers"][peer]["agreement"] = agreement
    text = markdown(result)
    assert "| | m | answers against torch |" in text
    assert "| **accel** | 5.00 | max abs 1.0e-05 |" in text
    assert "| odd | 7.00 (0.71, 0.71) | shape [1] |" in text


def test_results_survive_the_file_and_other_schemas_are_refused(tmp_path: Path) -> None:
    result = result_of({"accel": {"b": [1.0], "a": [2.0]}})
    write_result(result, tmp_path / "new" / "r.json")
    assert read_result(tmp_path / "new" / "r.json") == result
    assert metrics_of(result) == ["b", "a"]
    write_result({**result, "schema": 2}, tmp_path / "r.json")
    with pytest.raises(ValueError, match="schema 2"):
        read_result(tmp_path / "r.json")


def test_figures_keep_three_or_four_digits() -> None:
    assert [format_figure(value) for value in (2.071, 131.26, 3495.4)] == ["2.07", "131.3", "3495"]
