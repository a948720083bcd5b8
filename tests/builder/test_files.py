from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accel.builder.files import History, TimingCaches
from accel.engines.tensorrt.adapter import TensorRT, TensorRTRTX
from accel.errors import StorageError


def flavour(kind: Any, version: str = "11.1.0.106") -> Any:
    return kind(SimpleNamespace(), version)


def test_a_timing_cache_for_each_version_and_sm(tmp_path: Path) -> None:
    caches, trt = TimingCaches(tmp_path / "made"), flavour(TensorRT)
    assert caches.load(trt, ("sm90",)) == b""
    caches.save(trt, ("sm90",), b"timings")
    assert caches.load(trt, ("sm90",)) == b"timings"
    assert caches.load(trt, ("sm89",)) == caches.load(flavour(TensorRT, "11.2.0.1"), ("sm90",)) == b""
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tensorrt-11.1.0.106-sm90.timing"]


def test_rtx_has_no_timing_cache(tmp_path: Path) -> None:
    caches, rtx = TimingCaches(tmp_path / "made"), flavour(TensorRTRTX, "1.7.1.116")
    caches.save(rtx, ("sm86",), rtx.timing_cache_of(None))
    assert caches.load(rtx, ("sm86",)) is None and not (tmp_path / "made").exists()


def test_history_keeps_the_latest_of_each_key(tmp_path: Path) -> None:
    history = History(tmp_path / "history.json")
    assert history.seconds("rtx 30 layers") == {}
    history.record("rtx 30 layers", {"Timing": 2.0})
    history.record("rtx 6 layers", {"Timing": 1.0})
    history.record("rtx 30 layers", {"Timing": 3.00049})
    assert history.seconds("rtx 30 layers") == {"Timing": 3.0} and history.seconds("rtx 6 layers") == {"Timing": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_the_nearest_of_what_is_known(tmp_path: Path) -> None:
    """The first detail that differs decides; of equals the latest."""
    history = History(tmp_path / "history.json")
    history.record("rtx 6", {"a": 1.0}, ("fp16", "level 3", "sm86"))
    history.record("rtx 6", {"a": 2.0}, ("fp16", "level 3", "sm89"))
    history.record("rtx 6", {"a": 3.0}, ("fp32", "level 3", "sm86"))
    assert history.seconds("rtx 6", ("fp16", "level 3", "sm86")) == {"a": 1.0}
    assert history.seconds("rtx 6", ("fp16", "level 3", "sm120")) == {"a": 2.0}
    assert history.seconds("rtx 6", ("fp32", "level 5", "sm89")) == {"a": 3.0}
    assert history.seconds("rtx 6", ("w8a8", "level 3", "sm86")) == {"a": 3.0}
    assert history.seconds("rtx", ("fp16", "level 3", "sm86")) == {}
    history.record("rtx 6", {"a": 4.0}, ("fp16", "level 3", "sm86"))
    assert history.seconds("rtx 6", ("fp16", "level 3", "sm120")) == {"a": 4.0}


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"key": 3}', b"\xff"])
def test_a_damaged_history_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.json"
    path.write_bytes(content)
    assert History(path).seconds("key") == {}
    History(path).record("key", {"Timing": 1.0})
    assert History(path).seconds("key") == {"Timing": 1.0}


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="A part of the path is a file"):
        History(tmp_path / "file" / "history.json").record("key", {})
