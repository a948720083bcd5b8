"""Results as JSON, as Markdown tables, and the verdict on every target."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accel.bench.cases import TOLERANCE, Suite, Target
from accel.bench.machine import describe_machine, today
from accel.bench.peers import PEERS
from accel.bench.runner import Outcome
from accel.bench.stats import MIN_ROUNDS, Ratio, median, paired_ratio

SCHEMA = 1
Result = dict[str, Any]


def build_result(suite: Suite, outcome: Outcome, settings: dict[str, Any]) -> Result:
    """Everything that was measured and what it means, ready for JSON."""
    result: Result = {
        "schema": SCHEMA,
        "suite": suite.name,
        "subject": suite.subject,
        "unit": suite.unit,
        "date": today(),
        "machine": describe_machine(),
        "settings": settings,
        "peers": outcome.peers,
        "groups": outcome.groups,
    }
    result["targets"] = [{**asdict(target), **judge(result, target)} for target in suite.targets]
    return result


def write_result(result: Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {result.get('schema')!r}, this version reads {SCHEMA}")
    return result


def metrics_of(result: Result) -> list[str]:
    """All metrics of a result, in the order they were measured."""
    names: dict[str, None] = {}
    for group in result["groups"]:
        for times in group.values():
            names.update(dict.fromkeys(times))
    return list(names)


def medians(result: Result, metric: str) -> dict[str, float]:
    """Median of a metric per peer; a peer of several groups counts with its first."""
    found: dict[str, float] = {}
    for group in result["groups"]:
        for peer, times in group.items():
            if metric in times:
                found.setdefault(peer, median(times[metric]))
    return found


def subject_of(result: Result) -> str:
    """The peer that the ratios and targets are about; results of before there was a choice are about fp32."""
    return result.get("subject", "accel")


def label_of(result: Result, peer: str) -> str:
    """A peer's name for people; of one that was not measured (a reference) what it is called here."""
    if peer in result["peers"]:
        return result["peers"][peer]["label"]
    return PEERS[peer].label if peer in PEERS else peer


def ratios(result: Result, metric: str) -> dict[str, Ratio]:
    """The subject's time over each other peer's, paired within the rounds of the group that holds both."""
    subject = subject_of(result)
    found: dict[str, Ratio] = {}
    for group in result["groups"]:
        ours = group.get(subject, {}).get(metric)
        for peer, times in group.items():
            if ours and peer != subject and metric in times:
                found.setdefault(peer, paired_ratio(ours, times[metric]))
    return found


def judge(result: Result, target: Target) -> dict[str, Any]:
    """Whether a target is reached: ``reached`` is True, False, or None when it cannot be said, with the reason."""
    subject = subject_of(result)
    figures = result["peers"].get(subject, {}).get("figures", {})
    own = figures.get(target.metric, medians(result, target.metric).get(subject))
    if own is None:
        return {"reached": None, "reason": f"{subject} was not measured"}
    if target.reference == "absolute":
        reached = own >= target.limit if target.at_least else own <= target.limit
        return {"value": own, "reached": reached, "reason": ""}
    against = ratios(result, target.metric)
    if target.reference == "fastest":
        # The fastest peer is the one the subject does worst against: its own group's rounds decide.
        theirs = (name for name in against if not result["peers"][name].get("ours"))
        peer = max(theirs, key=lambda name: against[name].median, default=None)
    else:
        peer = target.reference if target.reference in against else None
    if peer is None:
        return {"reached": None, "reason": f"no {target.reference} peer was measured"}
    ratio = against[peer]
    verdict = {"against": peer, "ratio": ratio.median, "upper": ratio.upper, "rounds": ratio.rounds}
    if ratio.rounds < MIN_ROUNDS:
        return {**verdict, "reached": None, "reason": f"{ratio.rounds} rounds; {MIN_ROUNDS} are needed"}
    return {**verdict, "reached": ratio.upper <= target.limit + TOLERANCE, "reason": ""}


def markdown(result: Result) -> str:
    """A table of medians with accel's ratio to each peer, the targets, and what did not run."""
    lines = [_heading(result), ""]
    names = metrics_of(result)
    reference = next((s["agreement"]["reference"] for s in result["peers"].values() if "agreement" in s), None)
    heads = [*names, *([f"answers against {label_of(result, reference)}"] if reference else [])]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for peer, state in result["peers"].items():
        if state["status"] != "measured":
            continue
        label = f"**{state['label']}**" if peer == subject_of(result) else state["label"]
        cells = [_cell(result, metric, peer) for metric in names] + ([_agreement(state)] if reference else [])
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", *_target_lines(result), *_missing_lines(result)]
    return "\n".join(lines).rstrip() + "\n"


def _heading(result: Result) -> str:
    machine, settings, label = result["machine"], result["settings"], label_of(result, subject_of(result))
    return (
        f"{result['suite']} ({result['unit']}), {result['date']}, {machine['cpu']}, {settings['threads']} threads, "
        f"{settings['rounds']} rounds; medians, in brackets {label}'s time over the peer's (95 % upper bound)"
    )


def _cell(result: Result, metric: str, peer: str) -> str:
    value = medians(result, metric).get(peer)
    if value is None:
        return "-"
    text = format_figure(value)
    ratio = ratios(result, metric).get(peer)
    return f"{text} ({ratio.median:.2f}, {ratio.upper:.2f})" if ratio else text


def format_figure(value: float) -> str:
    """Three or four significant digits, never an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _agreement(state: dict[str, Any]) -> str:
    """The distinct findings of a peer's cases; differences of numbers are summed up by the largest."""
    findings = [text for case, text in state.get("agreement", {}).items() if case != "reference"]
    numbers = [text for text in findings if text.startswith("max abs ")]
    others = [text for text in findings if text not in numbers]
    largest = [max(numbers, key=lambda text: float(text.split()[-1]))] if numbers else []
    return ", ".join(dict.fromkeys([*others, *largest])) or "-"


def _target_lines(result: Result) -> list[str]:
    lines = []
    for target in result["targets"]:
        verdict = {True: "reached", False: "not reached", None: "open"}[target["reached"]]
        if "value" in target:
            digits = 4 if target.get("at_least") else 1
            bound = "at least " if target.get("at_least") else ""
            figure = f"{target['value']:.{digits}f}, limit {bound}{target['limit']:.{digits}f}"
        elif "ratio" in target:
            figure = (
                f"{target['ratio']:.3f} x {result['peers'][target['against']]['label']} "
                f"(upper bound {target['upper']:.3f}, limit {target['limit']:.2f})"
            )
        else:
            figure = f"limit {target['limit']:.2f}"
        reason = f" ({target['reason']})" if target["reason"] else ""
        lines.append(f"- {target['metric']}: {figure}: {verdict}{reason}")
    return lines


def _missing_lines(result: Result) -> list[str]:
    return [
        f"- {state['label']}: {state['status']}: {' '.join(state['reason'].split())}"
        for state in result["peers"].values()
        if state["status"] != "measured"
    ]
