"""Which engine is tried first: the documented order, or what was measured."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel
import accel.engines as engines
import accel.measurements as measurements
from accel.bundle import Bundle
from accel.engines import FASTEST, Engine, open_session
from accel.engines.choice import fastest_first
from accel.engines.session import Fallback, SessionOptions
from accel.errors import EngineBrokenError, EngineUnavailableError, InputError
from accel.manifest import Manifest
from accel.measurements import Measured, graph_digest, remember
from tests.engines.tiny_llama import draw_weights, write_bundle

OPTIONS = SessionOptions(threads=1, capacity=32, max_batch=2)
ORT = next(engine for engine in engines.ENGINES if engine.name == "ort-cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a second variant, of the same bytes."""
    made = write_bundle(tmp_path_factory.mktemp("choice") / "bundle", draw_weights())
    variants = {**made.manifest.variants, "bf16": made.manifest.variants["fp32"]}
    return Bundle(made.path, dataclasses.replace(made.manifest, variants=variants))


def engine(name: str, device: str = "cpu", reason: str | None = None, target: str = "ort-cpu") -> Engine:
    def open_named(bundle: Bundle, variant: str, options: SessionOptions) -> Any:
        session = ORT.open(bundle, variant, options)
        session.info = dataclasses.replace(session.info, name=name)
        return session

    return Engine(name, device, lambda *_: reason, open_named, target=target, pick=ORT.pick)


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))

    def use(*found: Engine) -> None:
        monkeypatch.setattr(engines, "ENGINES", found)

    use(engine("first"), engine("second"), engine("third"))
    return use


def measure(bundle: Bundle, *rows: tuple[str, str, float], device: Any = "cpu", **more: Any) -> None:
    digest = graph_digest(bundle, "fp32", "ort-cpu") or ""
    kept = [Measured(name, variant, digest, cost, {}) for name, variant, cost in rows]
    remember(bundle, device, 1, kept, cost="a mean", rounds=7, date="2026-11-26", **more)


def opened(bundle: Bundle, **how: Any) -> tuple[str, str, str, dict[str, str]]:
    """Engine, variant, why, and the reasons of the fallbacks by engine."""
    found = open_session(bundle, options=OPTIONS, **how)
    info = found.session.info
    found.session.close()
    assert len({fallback.engine for fallback in found.fallbacks}) == len(found.fallbacks)
    return info.name, info.variant, info.why, {fallback.engine: fallback.reason for fallback in found.fallbacks}


def test_unmeasured_the_documented_order_stands(bundle: Bundle) -> None:
    assert opened(bundle) == ("first", "fp32", "", {})


def test_the_fastest_comes_first_and_says_why(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    measure(bundle, ("first", "fp32", 9.9), ("second", "fp32", 8.1), passed_over={"third": "it is absent"})
    with caplog.at_level(logging.WARNING):
        name, variant, why, fallbacks = opened(bundle)
    assert (name, variant) == ("second", "fp32")
    assert why == "measured: 8.1 ms against 9.9 ms of first"
    assert fallbacks == {"first": "measured: 9.9 ms against 8.1 ms of second"}
    assert caplog.text == "", "a choice is no failure"


def test_the_engine_that_comes_first_anyway_says_it_too(bundle: Bundle) -> None:
    measure(bundle, ("first", "fp32", 120.4), ("second", "fp32", 812.2))
    assert opened(bundle) == ("first", "fp32", "measured: 120 ms against 812 ms of second", {})


def test_engines_without_figures_come_after_those_with(bundle: Bundle) -> None:
    measure(bundle, ("third", "fp32", 8.1), passed_over={"first": "its driver is old"})
    name, _, why, fallbacks = opened(bundle)
    assert (name, why) == ("third", "measured: 8.1 ms; no other engine was")
    assert fallbacks["first"] == "not measured: its driver is old"
    assert fallbacks["second"] == "not measured, and third was: accel bench measures again"


def test_auto_changes_the_engine_and_never_the_precision(bundle: Bundle) -> None:
    measure(bundle, ("first", "fp32", 9.0), ("second", "bf16", 1.0), ("second", "fp32", 9.5))
    assert opened(bundle)[:2] == ("first", "fp32")
    assert opened(bundle, variant="bf16")[:2] == ("second", "bf16")


def test_fastest_takes_the_precision_too(bundle: Bundle) -> None:
    measure(bundle, ("first", "fp32", 9.0), ("second", "bf16", 1.0), ("second", "fp32", 7.0))
    name, variant, why, fallbacks = opened(bundle, variant=FASTEST)
    assert (name, variant, why) == ("second", "bf16", "measured: 1 ms against 7 ms of second in fp32")
    assert fallbacks == {"first": "measured: 9 ms against 1 ms of second"}
    assert opened(bundle, variant=FASTEST, engine="first")[:2] == ("first", "fp32")
    assert opened(bundle, variant=FASTEST, engine="second")[:2] == ("second", "bf16")


def test_fastest_of_nothing_measured_says_so(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    name, variant, _, fallbacks = opened(bundle, variant=FASTEST)
    assert (name, variant) == ("first", "fp32") and "accel bench" in fallbacks[FASTEST]
    assert "nothing was measured" in caplog.text


def test_a_named_engine_is_not_replaced(bundle: Bundle) -> None:
    measure(bundle, ("first", "fp32", 9.9), ("second", "fp32", 8.1))
    assert opened(bundle, engine="first") == ("first", "fp32", "", {})


def test_other_threads_were_not_measured(bundle: Bundle) -> None:
    measure(bundle, ("second", "fp32", 8.1))
    found = open_session(bundle, options=dataclasses.replace(OPTIONS, threads=2))
    assert found.session.info.name == "first"
    found.session.close()


def test_a_changed_bundle_was_not_measured(bundle: Bundle) -> None:
    measure(bundle, ("second", "fp32", 8.1))
    manifest: Manifest = bundle.manifest
    files = {name: dataclasses.replace(entry, sha256="e" * 64) for name, entry in manifest.files.items()}
    assert opened(Bundle(bundle.path, dataclasses.replace(manifest, files=files)))[0] == "first"


def test_fastest_of_other_threads_says_with_how_many_it_was_measured(bundle: Bundle) -> None:
    kept = [Measured("second", "fp32", graph_digest(bundle, "fp32", "ort-cpu") or "", 8.1, {})]
    for threads in (2, 12):
        remember(bundle, "cpu", threads, kept, cost="a mean", rounds=7, date="2026-11-26")
    *_, fallbacks = opened(bundle, variant="fastest")
    said = "this bundle was measured with 2 and 12 threads here, not with 1: accel bench "
    assert fallbacks["fastest"].startswith(said)
    assert fallbacks["fastest"].endswith(" --threads 1 does it")
    remember(bundle, "cpu", 2, [dataclasses.replace(kept[0], graph="gone")], cost="", rounds=7, date="2026-11-26")
    remember(bundle, "cpu", 12, [dataclasses.replace(kept[0], graph="gone")], cost="", rounds=7, date="2026-11-26")
    assert opened(bundle, variant="fastest")[-1]["fastest"].startswith("nothing was measured of this bundle here")


def test_what_was_fastest_and_fails_is_passed_over(
    bundle: Bundle, registry: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    registry(engine("first"), engine("second", reason="it is gone"), engine("third"))
    measure(bundle, ("first", "fp32", 9.9), ("second", "fp32", 8.1))
    name, _, _, fallbacks = opened(bundle)
    assert (name, fallbacks) == ("first", {"second": "it is gone"})
    assert "first runs because second cannot: it is gone" in caplog.text
    with pytest.raises(EngineUnavailableError, match="first engine cannot.*second: it is gone"):
        opened(bundle, strict=True)


def test_what_was_slower_takes_over_from_what_breaks(bundle: Bundle) -> None:
    measure(bundle, ("first", "fp32", 9.9), ("second", "fp32", 8.1))
    found = open_session(bundle, options=OPTIONS)
    found.session.close()
    following = found.open_next(EngineBrokenError("it broke"))
    assert following.session.info.name == "first"
    assert following.fallbacks == (Fallback("second", "it broke"),)
    following.session.close()
    last = following.open_next(EngineBrokenError("so did this"))
    assert {f.engine: f.reason for f in last.fallbacks} == {"second": "it broke", "first": "so did this"}
    last.session.close()
    with pytest.raises(EngineUnavailableError) as caught:
        last.open_next(EngineBrokenError("and this"))
    assert str(caught.value).count("first:") == 1


def test_a_gpu_comes_before_the_cpu_whatever_was_measured(
    bundle: Bundle, registry: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry(engine("gpu-a", "cuda"), engine("gpu-b", "cuda"), engine("cpu-a"), engine("cpu-b"))
    monkeypatch.setattr(engines, "has_nvidia_device", lambda: True)
    monkeypatch.setattr(engines, "hidden_gpu", lambda: None)
    monkeypatch.setattr(measurements, "gpu_models", lambda: (("L4",), "580.1"))
    measure(bundle, ("cpu-b", "fp32", 1.0), ("cpu-a", "fp32", 2.0))
    assert opened(bundle)[0] == "gpu-a" and opened(bundle, device="cpu")[0] == "cpu-b"
    measure(bundle, ("gpu-b", "fp32", 5.0), ("gpu-a", "fp32", 6.0), device="cuda")
    assert opened(bundle)[0] == "gpu-b"


def test_hardly_faster_is_not_faster() -> None:
    rows = [Measured(name, "fp32", "", cost, {}) for name, cost in (("a", 10.0), ("b", 9.9), ("c", 9.0), ("d", 8.9))]
    assert [row.engine for row in fastest_first(rows)] == ["c", "d", "a", "b"]
    assert fastest_first([]) == []


def test_through_accel_load(bundle: Bundle) -> None:
    measure(bundle, ("second", "fp32", 8.1))
    with accel.load(bundle.path, threads=1, capacity=32) as lm:
        assert lm.engine.name == "second" and lm.engine.why.startswith("measured: 8.1 ms")
        assert [fallback.engine for fallback in lm.fallbacks] == ["first"]
    with pytest.raises(InputError, match="was not measured"):
        accel.load(bundle.path, engine="rtx", variant=FASTEST, build="allow")
