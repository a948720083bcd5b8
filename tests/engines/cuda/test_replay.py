"""Recordings that fail: the run goes on without, gives the same results, and says so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from accel.engines.cuda import staging
from accel.engines.cuda.device import INTERPRETED, Device
from accel.engines.cuda.recording import recording
from accel.engines.cuda.replay import _LATER, Replay
from tests.engines.cuda.steps import inputs

SAID = "a run could not be recorded as a CUDA graph and goes on without"
FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
INVALID = "CUDA error: operation failed due to a previous error during capture\nFor debugging consider more"


class StandIn(Device):
    """Says that it is a GPU."""

    is_gpu = True


class Recorder:
    """``torch.cuda`` without a GPU: what is recorded runs once while it is, and again whenever it is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failure: Exception | None = None
        self.at_end = False  # fails when the recording ends, else when it begins
        self.stream, self.pools, self.replays = "the caller's", iter(range(9)), 0
        self.used: list[int] = []
        self.ended: list[str] = []
        self.open: int | None = None  # the pool that PyTorch takes memory from
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self._record)
        monkeypatch.setattr(torch.cuda, "stream", self._current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(self.pools))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: self.ended.append(f"released {of}"))

    def replay(self) -> None:
        self.replays += 1

    @contextlib.contextmanager
    def _record(self, graph: Any, pool: int, capture_error_mode: str) -> Iterator[None]:
        """As PyTorch's 2.11: where CUDA refuses, its own stream stays current, and memory comes from the pool."""
        assert capture_error_mode == "thread_local", "another model's thread would fail, and end the recording"
        self.used.append(pool)
        self.stream, self.open = "the recording's", pool
        if self.failure is not None and not self.at_end:
            raise self.failure
        try:
            yield
            if self.failure is not None:
                raise self.failure
        except torch.cuda.OutOfMemoryError:
            self.open = None  # CUDA did not refuse the end
            raise
        self.stream, self.open = "the caller's", None

    def _end(self, device: int, pool: int) -> None:
        if self.open != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open = None
        self.ended.append(f"ended {device, pool}")

    @contextlib.contextmanager
    def _current(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture
def gpu() -> Device:
    return StandIn(torch.device("cpu"))


def test_a_recording_is_replayed(recorder: Recorder, gpu: Device) -> None:
    runs: list[int] = []
    replay = Replay(gpu, lambda: runs.append(1))
    for _ in range(4):
        replay.run()
    assert len(runs) == 2 and recorder.replays == 3, "once to compile, once while it is recorded"


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RuntimeError(INVALID), INVALID.splitlines()[0]),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_cannot_be_recorded_runs_without(
    recorder: Recorder, gpu: Device, failure: Exception, said: str, at_end: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.failure, recorder.at_end = failure, at_end
    result = torch.zeros(1)
    replay = Replay(gpu, lambda: result.add_(1) and None)
    for _ in range(4):
        replay.run()
    assert recorder.replays == 0 and result.item() == 4 + at_end, "each call computes; so does this recording"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.endswith(f"for {_LATER[0]} calls, then it is recorded: {said}")
    assert recorder.used == [0], "it is not tried again at once: that takes time"
    assert recorder.stream == "the caller's", "what the caller does next would not wait for the runs"
    recorder.failure = None
    for _ in range(_LATER[0]):
        replay.run()
    assert recorder.used == [0, 1] and recorder.replays > 0, "another thread's call had ended it"


@pytest.mark.parametrize("full", [FULL, RuntimeError("CUDA error: out of memory\nFor debugging consider more")])
def test_what_lacked_memory_is_recorded_later(
    recorder: Recorder, gpu: Device, full: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.failure = full
    runs: list[int] = []
    replay = Replay(gpu, lambda: runs.append(1))
    for _ in range(2):
        replay.run()
    assert runs == [1, 1] and replay.failure is None, "the call that it was to be recorded for computes too"
    pool = gpu.pool
    assert pool == (0 if full is FULL else None), "the driver may have failed amid what PyTorch does for the pool"
    recorder.failure = None
    for _ in range(_LATER[0] - 1):
        replay.run()
    assert recorder.replays == 0 and len(recorder.used) == 1
    replay.run()
    assert recorder.replays == 1 and recorder.used == [0, 0 if full is FULL else 1]
    (record,) = caplog.records
    assert f"goes on without a CUDA graph for {_LATER[0]} calls" in record.message and "\n" not in record.message


@pytest.mark.parametrize("failure", [FULL, RuntimeError(INVALID)])
def test_what_fails_for_long_is_given_up(
    recorder: Recorder, gpu: Device, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.failure = failure
    runs: list[int] = []
    replay, calls = Replay(gpu, lambda: runs.append(1)), sum(_LATER) + 99
    for _ in range(calls):
        replay.run()
    tries = 1 + len(_LATER)
    assert len(runs) == calls and recorder.used == ([0] * tries if failure is FULL else [*range(tries)])
    assert [SAID in record.message for record in caplog.records] == [False] * len(_LATER) + [True]
    assert replay.failure == caplog.records[-1].message.removeprefix(f"{SAID}: ") == str(failure).splitlines()[0]


def test_the_next_recording_takes_memory_of_its_own(recorder: Recorder, gpu: Device) -> None:
    """What was recorded half way holds on to the shared pool."""
    first, second, third = (Replay(gpu, lambda: None, after=0) for _ in range(3))
    recorder.failure = RuntimeError(INVALID)
    first.run()
    recorder.failure = None
    second.run()
    third.run()
    assert recorder.used == [0, 1, 1] and recorder.replays == 2
    assert first._graph is None and second.failure is third.failure is None


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1"])
@pytest.mark.parametrize("at_end", [False, True])
def test_memory_is_free_to_go_after_a_failure(
    recorder: Recorder, at_end: bool, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While PyTorch believes that a recording is under way, it gives nothing back to the driver."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    recorder.failure, recorder.at_end = RuntimeError(INVALID), at_end
    with pytest.raises(RuntimeError, match="previous error"), recording(torch.cuda.CUDAGraph()):
        pass
    assert recorder.open is None and recorder.used == [0]
    assert recorder.ended == ["ended (3, 0)", "released (3, 0)"][: 2 if version < "2.12" else 1]
    recorder.failure, recorder.ended[:] = None, []
    with pytest.raises(torch.cuda.OutOfMemoryError), recording(torch.cuda.CUDAGraph(), 7):
        raise FULL
    assert recorder.used[-1] == 7 and not recorder.ended, "PyTorch did"


def test_one_thread_records_at_a_time(recorder: Recorder, gpu: Device) -> None:
    """PyTorch has one stream for all recordings."""
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slowly() -> None:
        order.append("first begins")
        begun.set()
        go_on.wait(10)
        order.append("first ends")

    first = threading.Thread(target=Replay(gpu, slowly, after=0).record)
    second = threading.Thread(target=Replay(gpu, lambda: order.append("second"), after=0).record)
    first.start()
    assert begun.wait(10)
    second.start()
    second.join(0.2)
    go_on.set()
    for thread in (first, second):
        thread.join(10)
    assert order == ["first begins", "first ends", "second"]


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes on masked lanes
def test_a_decoder_goes_on_without(
    recorder: Recorder, gpu: Device, graph: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    """A prompt's step, one token's and several rows': logits as ONNX Runtime's."""
    monkeypatch.setattr(staging, "Replay", lambda device, run: Replay(gpu, run))
    recorder.failure = RuntimeError(INVALID)
    session = request.getfixturevalue("session")
    for step in (
        inputs({0: [5, 6, 7, 8]}, {}),
        *(inputs({0: [9 + place]}, {0: 4 + place}) for place in range(3)),
        inputs({1: [5, 6, 7, 8]}, {}),
        inputs({0: [12], 1: [13]}, {0: 7, 1: 4}),
    ):
        np.testing.assert_allclose(session.step(step), reference.step(step), atol=1e-4)
    assert len(recorder.used) == 3 and recorder.replays == 0, "prompts', one row's and two rows' were tried"
