from __future__ import annotations

import pytest

from accel.bench.cases import COSINE, EXPORT_RSS, EXPORT_SECONDS, PEAK_RSS, SUITES, Case, Suite
from accel.bench.peers import PEERS, Peer


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_targets_name_metrics_and_peers_of_their_suite(suite: Suite) -> None:
    metrics = {metric for case in suite.cases for metric in case.metrics} | {EXPORT_SECONDS, EXPORT_RSS}
    if suite.isolated:
        metrics |= {f"{case.name}: {PEAK_RSS}" for case in suite.cases}
    if suite.pooled:
        metrics.add(COSINE)
    for target in suite.targets:
        assert target.metric in metrics
        assert target.reference in {"fastest", "absolute", *suite.peers}


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_every_peer_of_a_timed_suite_offers_its_role(suite: Suite) -> None:
    assert suite.peers[0] == suite.subject and PEERS[suite.subject].ours
    for peer in (*suite.peers, *([suite.reference] if suite.reference else [])):
        assert PEERS[peer].name == peer
        for case in suite.cases:
            opener = f"open_{case.role}"
            assert getattr(PEERS[peer], opener) is not getattr(Peer, opener), f"{peer} has no {opener}"


def test_case_survives_json_and_names_its_metrics() -> None:
    case = Case("m", "decoder", prompt=8, new=2)
    assert Case(**case.to_json()) == case
    assert case.metrics == ("m: first token", "m: per token")
    assert Case("m 1x8", "encoder", batch=1, seq=8).metrics == ("m 1x8",)


def test_pooled_vectors_are_compared_with_a_reference() -> None:
    assert all(suite.reference for suite in SUITES.values() if suite.pooled)
