"""CUDA graphs of decode runs: when they are captured, kept, dropped, and made anew."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.engines.tensorrt import graphs
from accel.engines.tensorrt.graphs import BUSY_RUNS, MAX_GRAPHS, MEASURED_RUNS, WARM_RUNS
from tests.engines.tensorrt import double
from tests.engines.tensorrt.double import World
from tests.engines.tensorrt.test_decoder import assert_close, reference
from tests.parity.comparison import draw_rows, run_course

Bundles, Opener = Callable[[str], Bundle], Callable[..., Any]
DECODING = [(9, 4, 0), *[(1, 1, 0)] * 6, (0, 0, 5), *[(1, 1, 1)] * 6, *[(0, 1, 0)] * 5, *[(1, 1, 0)] * 4]


def decode(session: Any, bundle: Bundle) -> None:
    rows = draw_rows()
    assert_close(run_course(session, rows, DECODING), run_course(reference(bundle), rows, DECODING))


def test_requests_hit_what_was_captured_before(tiny_bundle: Bundles, open_tiny: Opener, world: World) -> None:
    """Batches of one, two and three from row 0; the batch of row 1 alone is queued without one, and not captured."""
    world.slow = {"run": 0.004}
    session = open_tiny("llama", max_batch=3)
    session.capture_graphs()
    assert session.graphs == 3
    before = world.gpu.calls.count("cudaGraphLaunch")
    decode(session, tiny_bundle("llama"))
    assert world.gpu.calls.count("cudaGraphLaunch") - before == 6 + 6 + 4
    assert len(world.gpu.graphs) == 3 and BUSY_RUNS > 100


def test_a_run_that_requests_often_bring_is_captured(
    tiny_bundle: Bundles, open_tiny: Opener, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "BUSY_RUNS", 4)
    world.slow = {"run": 0.004}
    session = open_tiny("llama", max_batch=3)
    decode(session, tiny_bundle("llama"))
    assert session.graphs == 3
    launched = world.gpu.calls.count("cudaGraphLaunch") - 3 * MEASURED_RUNS
    assert launched == 2 + 2 + 1 + 4  # what came after each capture


def test_a_slower_graph_is_dropped(
    tiny_bundle: Bundles,
    open_tiny: Opener,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also when requests bring its run often."""
    monkeypatch.setattr(graphs, "BUSY_RUNS", 6)
    world.slow = {"graph": 0.004}
    caplog.set_level(logging.INFO)
    session = open_tiny("llama", max_batch=3)
    session.capture_graphs()
    decode(session, tiny_bundle("llama"))
    assert session.graphs == 0 and len(world.gpu.graphs) == 3
    assert world.gpu.calls.count("cudaGraphLaunch") == 3 * MEASURED_RUNS  # measured once each, never tried again
    assert caplog.text.count("dropped") == 3


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ("capture", "operation not permitted when stream is capturing"),
        ("context", "out of memory"),
        ("capturable", "cannot be captured"),
        ("cudaGraphInstantiate", "cudaErrorInvalidValue"),
        ("cudaStreamEndCapture", "cudaErrorInvalidValue"),
    ],
)
def test_a_failed_capture_is_logged_and_costs_nothing(
    refusal: str, reason: str, tiny_bundle: Bundles, open_tiny: Opener, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.slow = {"run": 0.002}
    session = open_tiny("llama", max_batch=3)
    if refusal.startswith("cuda"):
        world.gpu.fail[refusal] = world.gpu.cudaError_t.cudaErrorInvalidValue
    elif refusal == "capturable":
        world.capturable = False
    else:
        world.refuse.add(refusal)
    session.capture_graphs()
    decode(session, tiny_bundle("llama"))
    assert session.graphs == 0
    assert caplog.text.count("no CUDA graph for") == 3 and reason in caplog.text
    world.gpu.fail.clear()


def test_graphs_follow_the_scratch_memory(
    tiny_bundle: Bundles, open_tiny: Opener, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second engine that needs more moves the memory that all share: graphs are captured anew."""
    world.slow = {"run": 0.004}
    session = open_tiny("llama", max_batch=2)
    session.capture_graphs()
    rows = draw_rows((40, 40))
    first = run_course(session, rows, [(5, 0), *[(1, 0)] * 5])
    before = [context.scratch[0] for context in world.contexts]
    assert session.graphs == 2
    monkeypatch.setattr(double, "SCRATCH", 5 * double.SCRATCH)
    other = open_tiny("qwen2", max_batch=2)
    again = run_course(session, rows, [(5, 0), *[(1, 0)] * 2])
    assert session.graphs == 0 and sum(graph.live for graph in world.gpu.graphs) == 0
    more = run_course(session, rows, [(5, 0), *[(1, 0)] * 5])
    assert session.graphs == 1
    np.testing.assert_array_equal(first[0], more[0])
    np.testing.assert_array_equal(first[0][: len(again[0])], again[0])
    after = {context.scratch[0] for context in world.contexts if context.version and context.profile == 1}
    assert len(after - set(before)) == 1
    other.close()
    run_course(session, rows, [(5, 0), (1, 0)])


def test_there_are_not_endlessly_many(open_tiny: Opener, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_GRAPHS >= 16
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    world.slow = {"run": 0.004}
    monkeypatch.setattr(graphs, "BUSY_RUNS", WARM_RUNS)
    session = open_tiny("llama", max_batch=4)
    rows = draw_rows((30, 30, 30, 30))
    run_course(session, rows, [step for row in np.eye(4, dtype=int) for step in [tuple(row)] * (WARM_RUNS + 1)])
    assert session.graphs == 2


def test_warm_up_captures_every_batch(open_tiny: Opener, world: World, tmp_path: Any) -> None:
    world.slow = {"run": 0.004}
    session = open_tiny("llama", max_batch=4, kernels=tmp_path / "kernels" / "llama")
    session.warm_up()
    assert session.graphs == 3
    assert {shape for profile, shape in world.runs if profile == 1} == {(1, 1), (2, 1), (4, 1)}
    assert {shape for profile, shape in world.runs if profile == 0} == {(1, 16), (1, 24), (1, 32)}
    kept = (tmp_path / "kernels" / "llama").read_bytes()
    assert kept.startswith(b"kernels:") and b"(1, 32)" in kept
