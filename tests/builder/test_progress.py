"""What a build reports, how its end is estimated, and how it is stopped. The builds are real."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from accel.builder import progress
from accel.builder.build import BuildSettings, BuiltPlan, build_plan
from accel.builder.profiles import default_profiles
from accel.builder.progress import BuildMonitor, ProgressBars, ProgressEvent
from accel.errors import EngineBuildError
from tests.builder import graphs

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.save(graphs.decoder(), tmp_path_factory.mktemp("graph"))


def build(graph: Path, monitor: BuildMonitor) -> BuiltPlan:
    settings = BuildSettings("rtx", ("sm86",), default_profiles(graphs.arch(), 2, 64), 64)
    return build_plan(graph, graphs.arch(), settings, monitor=monitor)


def test_phases_nest_and_end(graph: Path) -> None:
    events: list[ProgressEvent] = []
    plan = build(graph, monitor := BuildMonitor(events.append))
    running: list[str] = []
    for event in events:
        if event.kind == "start":
            assert event.parent is None or event.parent in running
            running.append(event.phase)
        elif event.kind == "finish":
            running.remove(event.phase)
        else:
            assert event.phase in running and 0 < event.step <= event.steps
    assert not running and {event.phase for event in events} > {"Reading the graph", "Building engine"}
    assert "Reading the graph" in monitor.seconds and "Building engine" not in monitor.seconds  # its parts are
    assert plan.facts.phases == monitor.seconds and sum(monitor.seconds.values()) <= plan.facts.seconds
    assert all(event.seconds_left is None for event in events)


def test_time_left_comes_from_history_alone(graph: Path) -> None:
    build(graph, first := BuildMonitor())
    events: list[ProgressEvent] = []
    history = {name: 100 * seconds for name, seconds in first.seconds.items()}
    build(graph, BuildMonitor(events.append, history))
    left = [event.seconds_left for event in events]
    assert all(seconds is not None for seconds in left)
    assert left[0] == pytest.approx(sum(history.values()), rel=0.05) and left[-1] == 0
    assert left == sorted(left, key=lambda seconds: -(seconds or 0.0))


@pytest.mark.parametrize("phase", ["Building engine", "Optimizing graph"])
def test_ctrl_c_stops_the_build_and_is_raised_afterwards(graph: Path, phase: str) -> None:
    seen: list[ProgressEvent] = []

    def press(event: ProgressEvent) -> None:
        seen.append(event)
        if (event.kind, event.phase) == ("start", phase):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(graph, BuildMonitor(press))
    assert signal.getsignal(signal.SIGINT) is handler
    assert sum(event.phase == "Timing graph nodes" for event in seen) == 0  # it did not go on to the end
    assert build(graph, BuildMonitor()).plan.nbytes > 0  # and the library is sound


def test_ctrl_c_is_heard_on_any_thread() -> None:
    """TensorRT may call the monitor from a thread of its own while the main thread is inside the library."""
    monitor, answers = BuildMonitor(), list[bool]()

    def call() -> None:
        monitor.start("phase", None, 2, counted=True)
        answers.append(monitor.step("phase", 1))
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 5
        while monitor.step("phase", 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        answers.append(monitor.stopped)

    with monitor.interruptible():
        worker = threading.Thread(target=call)
        worker.start()
        while worker.is_alive():  # join() would take the signal for itself
            time.sleep(0.01)
    assert answers == [True, True]
    with pytest.raises(KeyboardInterrupt):
        monitor.raise_if_stopped()


def test_what_a_callback_raises_is_raised_by_the_build(graph: Path) -> None:
    def fail(event: ProgressEvent) -> None:
        if event.phase == "Optimizing graph":
            raise RuntimeError("the bar is broken")

    with pytest.raises(RuntimeError, match="the bar is broken"):
        build(graph, BuildMonitor(fail))


def test_cancel_from_another_thread_and_builds_in_one(graph: Path) -> None:
    monitor, errors = BuildMonitor(), list[BaseException]()

    def run() -> None:
        try:
            build(graph, monitor)
        except EngineBuildError as error:
            errors.append(error)

    monitor.cancel()
    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    assert "The build was cancelled" in str(errors[0])


def test_bars_nest_and_say_the_time_left(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars("rtx sm86", show=True) as bars:
        shown: list[str] = []
        shares: list[str] = []

        def watch(event: ProgressEvent) -> None:
            bars(event)
            if (event.kind, event.phase) == ("start", "Optimizing graph"):
                shown.extend(task.description for task in bars._bars.tasks)
                shown.append(bars._bars.tasks[0].fields["left"])
                shares.append(bars._bars.tasks[0].fields["done"])

        build(graph, BuildMonitor(watch, {"Building engine from subgraph": 125.0}))
    depth = {text.strip(): len(text) - len(text.lstrip()) for text in shown[:-1]}
    assert depth["rtx sm86"] < depth["Building engine"] < depth["Optimizing graph"]
    assert re.fullmatch(r"about 2 min \d s left", shown[-1])
    assert re.fullmatch(r"\d %", shares[0])
    captured = capsys.readouterr()
    assert "rtx sm86" in captured.err and not captured.out


def test_no_bars_where_there_is_no_terminal(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars("rtx sm86") as bars:
        build(graph, BuildMonitor(bars))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert progress._left(None) == "" and progress._left(59.6) == "about 1 min 0 s left"
    assert progress._left(0.0) == progress._left(0.4) == "nearly done"  # no seconds that never pass


def test_phases_are_logged(graph: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main ones as they begin, and a line now and then about how far they are."""
    monkeypatch.setattr("accel.progress.PAUSE_SECONDS", 0.0)
    with caplog.at_level("INFO", "accel.progress"), ProgressBars("rtx sm86") as bars:
        build(graph, BuildMonitor(bars))
        build(graph, BuildMonitor(bars, {"Building engine from subgraph": 100.0}))
    assert "rtx sm86: Reading the graph" in caplog.messages and "rtx sm86: Building engine" in caplog.messages
    assert any(re.fullmatch(r"rtx sm86: Building engine: .* \d+/\d+", text) for text in caplog.messages)
    assert any(re.search(r"left\): \d+ %, about \d min \d+ s left", text) for text in caplog.messages)
