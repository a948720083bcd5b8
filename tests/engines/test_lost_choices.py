"""Automatic choices in a bundle that lost files: what is passed over is said, and ``strict`` passes over nothing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel.bench.contest as contest
import accel.engines as engines
from accel.bench.contest import Contestant, find_contestants
from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.engines import FASTEST, Engine, open_session
from accel.engines.choice import lost_choice
from accel.engines.session import Fallback, SessionOptions
from accel.errors import BundleError, EngineUnavailableError
from accel.measurements import Measured, graph_digest, remember
from tests.engines.tiny_llama import draw_weights, write_bundle

OPTIONS = SessionOptions(threads=1, capacity=32, max_batch=2)
ORT = next(engine for engine in engines.ENGINES if engine.name == "ort-cpu")
LOST = "its file fp16.onnx is missing"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """With a second variant, fp16, whose graph is a file of its own."""
    made = write_bundle(tmp_path / "bundle", draw_weights())
    fp32 = made.manifest.variants["fp32"]
    graph = dataclasses.replace(fp32.graphs["ort-cpu"], file="fp16.onnx")
    fp16 = dataclasses.replace(fp32, graphs={"ort-cpu": graph})
    with BundleExtension(made) as extension:
        (extension.path / "fp16.onnx").write_bytes(made.file(fp32.graphs["ort-cpu"].file).read_bytes())
        return extension.commit(dataclasses.replace(made.manifest, variants={"fp32": fp32, "fp16": fp16}))


def lose(bundle: Bundle) -> Bundle:
    bundle.file("fp16.onnx").unlink()
    return Bundle.open(bundle.path)


def like_a_gpu(bundle: Bundle, variant: str) -> str | None:
    """The variant that engines on GPUs pick: fp16 before fp32."""
    names = ("fp16", "fp32") if variant == "auto" else (variant,)
    return next((name for name in names if name in bundle.manifest.variants), None)


def engine(name: str, pick: Callable[[Bundle, str], str | None] = like_a_gpu, reason: str | None = None) -> Engine:
    def open_named(bundle: Bundle, variant: str, options: SessionOptions) -> Any:
        session = ORT.open(bundle, pick(bundle, variant) or variant, options)
        session.info = dataclasses.replace(session.info, name=name)
        return session

    return Engine(name, "cpu", lambda *_: reason, open_named, target="ort-cpu", pick=pick)


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))

    def use(*found: Engine) -> None:
        monkeypatch.setattr(engines, "ENGINES", found)
        monkeypatch.setattr(contest, "ENGINES", found)

    return use


def opened(bundle: Bundle, **how: Any) -> tuple[str, str, dict[str, str]]:
    """Engine, variant, and the reasons of the fallbacks by what was passed over."""
    found = open_session(bundle, options=OPTIONS, **how)
    found.session.close()
    reasons = {fallback.engine: fallback.reason for fallback in found.fallbacks}
    return found.session.info.name, found.session.info.variant, reasons


def measure(bundle: Bundle, *rows: tuple[str, str, float]) -> None:
    digests = {name: graph_digest(bundle, name, "ort-cpu") or "" for name in ("fp32", "fp16")}
    kept = [Measured(name, variant, digests[variant], cost, {}) for name, variant, cost in rows]
    remember(bundle, "cpu", 1, kept, cost="a mean", rounds=7, date="2026-11-26")


def test_another_variant_in_its_place_is_said(
    bundle: Bundle, registry: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    registry(engine("gpu"))
    assert opened(bundle) == ("gpu", "fp16", {})
    damaged = lose(bundle)
    name, variant, fallbacks = opened(damaged)
    assert (name, variant, list(fallbacks)) == ("gpu", "fp32", ["gpu fp16"])
    assert fallbacks["gpu fp16"] == f"{LOST}: accel quantize {bundle.path} --drop fp16 drops it", "no CPU runs fp16"
    assert f"fp32 runs because gpu fp16 cannot: {LOST}" in caplog.text
    with pytest.raises(EngineUnavailableError, match=rf"gpu: fp16: {LOST}"):
        open_session(damaged, options=OPTIONS, strict=True)
    with pytest.raises(BundleError, match=f"'fp16' cannot run for ort-cpu: {LOST}"):
        open_session(damaged, options=OPTIONS, variant="fp16")


def test_an_engine_that_has_nothing_left_is_passed_over(bundle: Bundle, registry: Callable[..., None]) -> None:
    def only_fp16(bundle: Bundle, variant: str) -> str | None:
        return "fp16" if variant in ("auto", "fp16") and "fp16" in bundle.manifest.variants else None

    registry(engine("gpu", only_fp16), engine("cpu", ORT.pick))
    damaged = lose(bundle)
    name, variant, fallbacks = opened(damaged)
    assert (name, variant) == ("cpu", "fp32") and fallbacks["gpu"].startswith(f"fp16: {LOST}")
    with pytest.raises(EngineUnavailableError, match=LOST):
        open_session(damaged, engine="gpu", options=OPTIONS)
    registry(engine("gpu", only_fp16, "it has no driver"), engine("cpu", ORT.pick))
    assert opened(damaged)[2]["gpu"].startswith(f"it has no driver; fp16: {LOST}")


def test_what_runs_anyway_passes_nothing_over(bundle: Bundle, registry: Callable[..., None]) -> None:
    registry(engine("cpu", ORT.pick))
    damaged = lose(bundle)
    assert opened(damaged, strict=True) == ("cpu", "fp32", {})
    assert lost_choice(engine("cpu", ORT.pick), damaged, "auto") is None
    assert lost_choice(engine("gpu"), damaged, "auto") == "fp16" and lost_choice(engine("gpu"), bundle, "auto") is None


@pytest.mark.parametrize("left", [True, False])
def test_the_fastest_that_is_lost_is_said(
    bundle: Bundle, registry: Callable[..., None], left: bool, caplog: pytest.LogCaptureFixture
) -> None:
    registry(engine("one", ORT.pick), engine("two", ORT.pick))
    measure(bundle, ("one", "fp16", 1.0), ("two", "fp16", 9.0), *([("two", "fp32", 2.0)] if left else []))
    assert opened(bundle, variant=FASTEST)[:2] == ("one", "fp16")
    damaged = lose(bundle)
    with caplog.at_level(logging.WARNING):
        name, variant, fallbacks = opened(damaged, variant=FASTEST)
    assert (name, variant) == ("two" if left else "one", "fp32")
    assert fallbacks["one fp16"].startswith(f"measured: 1 ms, but {LOST}")
    assert ("two fp16" in fallbacks) is not left, "what is left is faster than that"
    assert (FASTEST in fallbacks) is not left
    assert f"one fp16, which was measured to be the fastest, cannot run: {LOST}" in caplog.text
    assert "one fp16" not in opened(damaged)[2], "unasked it would not have run"


@pytest.mark.parametrize("left", [True, False])
def test_strict_runs_nothing_in_place_of_the_fastest(
    bundle: Bundle, registry: Callable[..., None], left: bool
) -> None:
    registry(engine("one", ORT.pick), engine("two", ORT.pick))
    measure(bundle, ("one", "fp16", 1.0), ("two", "fp16", 9.0), *([("two", "fp32", 2.0)] if left else []))
    assert opened(bundle, variant=FASTEST, strict=True)[:2] == ("one", "fp16")
    damaged = lose(bundle)
    for name in ("auto", "one"):
        with pytest.raises(EngineUnavailableError, match=rf"one fp16: measured: 1 ms, but {LOST}"):
            open_session(damaged, engine=name, options=OPTIONS, variant=FASTEST, strict=True)
    assert opened(damaged, strict=True)[1] == "fp32", "unasked fp16 would not have run"


def test_strict_runs_no_engine_in_place_of_one_that_was_faster(bundle: Bundle, registry: Callable[..., None]) -> None:
    registry(engine("one"), engine("two", ORT.pick))
    measure(bundle, ("one", "fp16", 1.0), ("two", "fp32", 2.0))
    damaged = lose(bundle)
    assert opened(damaged)[:2] == ("two", "fp32")
    with pytest.raises(EngineUnavailableError, match=rf"one fp16: measured: 1 ms, but {LOST}"):
        open_session(damaged, options=OPTIONS, strict=True)


def test_a_contest_says_what_it_cannot_measure(bundle: Bundle, registry: Callable[..., None]) -> None:
    registry(engine("cpu", ORT.pick))
    assert find_contestants(bundle, "cpu")[1:] == (
        [Contestant("cpu", "fp32", "ort-cpu"), Contestant("cpu", "fp16", "ort-cpu")],
        {},
    )
    _, contestants, passed_over = find_contestants(lose(bundle), "cpu")
    assert contestants == [Contestant("cpu", "fp32", "ort-cpu")]
    assert passed_over["fp16 for ort-cpu"].startswith(f"{LOST}: accel quantize {bundle.path}")


def test_the_next_engine_says_it_too(bundle: Bundle, registry: Callable[..., None]) -> None:
    """After one that broke."""
    registry(engine("gpu"), engine("cpu", ORT.pick))
    found = open_session(lose(bundle), options=OPTIONS)
    found.session.close()
    after = found.open_next(engines.EngineBrokenError("it is gone"))
    after.session.close()
    assert after.session.info.name == "cpu"
    assert [fallback.engine for fallback in after.fallbacks] == ["gpu fp16", "gpu"]
    assert Fallback("gpu", "it is gone") in after.fallbacks
