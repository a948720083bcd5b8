"""Opening the next engine after one broke: order, sizes, reasons, and who does not want another."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import onnx
import pytest

import accel.engines as engines
from accel.bundle import Bundle
from accel.engines import Engine, OpenedSession, open_session
from accel.engines.session import Fallback, SessionOptions
from accel.errors import (
    BundleError,
    CapacityError,
    EngineBrokenError,
    EngineError,
    EngineUnavailableError,
    UncoveredError,
)
from tests.engines.tiny_llama import draw_weights, write_bundle

OPTIONS = SessionOptions(threads=1, capacity=32, max_batch=2)
ORT, TORCH = (next(engine for engine in engines.ENGINES if engine.name == name) for name in ("ort-cpu", "torch"))
BROKEN = EngineBrokenError("the device went away", where="device 0")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("next") / "bundle", draw_weights())


@pytest.fixture(autouse=True)
def real_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", (ORT, TORCH))


def raising(name: str, error: Exception, at: str = "open") -> Engine:
    def fail(*_: Any) -> Any:
        raise error

    return Engine(name, "cpu", fail if at == "probe" else lambda *_: None, fail)


def break_it(opened: OpenedSession, error: EngineBrokenError = BROKEN) -> OpenedSession:
    opened.session.close()
    return opened.open_next(error)


def test_the_next_engine_of_the_order(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    first = open_session(bundle, options=OPTIONS)
    with caplog.at_level(logging.WARNING):
        second = break_it(first)
    session: Any = second.session
    assert session.info.name == "torch" and (session.capacity, session.max_batch, session.info.threads) == (32, 2, 1)
    assert second.fallbacks == (Fallback("ort-cpu", "the device went away (at device 0)"),)
    assert [record.getMessage() for record in caplog.records] == [
        "torch runs because ort-cpu cannot: the device went away (at device 0)"
    ]
    with pytest.raises(EngineUnavailableError, match=r"ort-cpu: the device went away.*torch: again") as caught:
        break_it(second, again := EngineBrokenError("again"))
    assert caught.value.__cause__ is again


def test_engines_tried_before_are_skipped(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = raising("absent", EngineError("no driver"))
    damaged = raising("damaged", BundleError("its plan is cut short"))
    odd = raising("odd", RuntimeError("CUDA error 700"), at="probe")
    monkeypatch.setattr(engines, "ENGINES", (absent, ORT, damaged, odd, TORCH))
    first = open_session(bundle, options=OPTIONS)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        second = break_it(first)
    assert [fallback.engine for fallback in second.fallbacks] == ["absent", "ort-cpu", "damaged", "odd"]
    assert second.fallbacks[2].reason == "its plan is cut short"
    assert second.fallbacks[3].reason == "RuntimeError: CUDA error 700"
    assert len(caplog.records) == 3 and "no driver" not in caplog.text, "what was known was logged before"
    assert second.session.info.name == "torch"
    second.session.close()


def test_the_device_stays_the_callers(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Engine("gpu", "cuda", ORT.probe, ORT.open)
    monkeypatch.setattr(engines, "ENGINES", (gpu, TORCH))
    with pytest.raises(EngineUnavailableError, match="torch: it runs on cpu only"):
        break_it(open_session(bundle, device="cuda", options=OPTIONS))


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"engine": "ort-cpu"}])
def test_an_engine_beside_one_that_stays(
    bundle: Bundle, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    opened, error = open_session(bundle, options=OPTIONS, **options), UncoveredError("rows of 5", where="profile a")
    if options:
        with pytest.raises(UncoveredError) as caught:
            opened.open_beside(error)
        assert caught.value is error
        return
    beside = opened.open_beside(error)
    assert beside.session.info.name == "torch"
    assert beside.fallbacks == (Fallback("ort-cpu", "rows of 5 (at profile a)"),)
    assert "torch runs because ort-cpu cannot: rows of 5" in caplog.text
    beside.session.close()
    with pytest.raises(EngineUnavailableError, match="rows of 5.*torch: rows of 6") as caught_last:
        beside.open_beside(last := UncoveredError("rows of 6"))
    assert caught_last.value.__cause__ is last
    opened.session.close()


@pytest.mark.parametrize("options", [{"strict": True}, {"engine": "ort-cpu"}])
def test_whoever_wants_this_engine_alone_gets_the_error(bundle: Bundle, options: dict[str, Any]) -> None:
    opened = open_session(bundle, options=OPTIONS, **options)
    with pytest.raises(EngineBrokenError) as caught:
        break_it(opened)
    assert caught.value is BROKEN


def test_a_session_that_was_not_opened_here_has_no_successor(bundle: Bundle) -> None:
    opened = open_session(bundle, options=OPTIONS)
    with pytest.raises(EngineBrokenError):
        break_it(dataclasses.replace(opened, request=None))


def test_what_does_not_fit_there_is_made_smaller(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def open_small(bundle: Bundle, variant: str, options: SessionOptions) -> Any:
        asked.append(options.capacity)
        if options.capacity is not None:
            raise CapacityError("it does not fit")
        return TORCH.open(bundle, variant, dataclasses.replace(options, capacity=16))

    monkeypatch.setattr(engines, "ENGINES", (ORT, Engine("small", "cpu", TORCH.probe, open_small)))
    second: Any = break_it(open_session(bundle, options=OPTIONS)).session
    assert asked == [32, None] and (second.capacity, second.max_batch) == (16, 2)
    second.close()
    with pytest.raises(CapacityError):  # asked for at the start it stays an error
        open_session(bundle, engine="small", options=OPTIONS)


def test_an_encoder_has_no_cache_to_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engines import test_encoder_sessions as tiny
    from tests.runtime.encoder_samples import write_bundle as write_encoder

    bundle = write_encoder(tmp_path / "bundle")
    onnx.save(tiny.graph(), bundle.path / "g.onnx")
    again = Engine("again", "cpu", ORT.probe, ORT.open)
    monkeypatch.setattr(engines, "ENGINES", (ORT, again))
    second = break_it(open_session(bundle, options=SessionOptions(threads=1)))
    assert second.fallbacks[0].engine == "ort-cpu" and second.session.info.threads == 1
    second.session.close()
