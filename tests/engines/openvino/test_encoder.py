"""The encoder session on OpenVINO: cut padding, threads, faults, lifetime."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import accel
from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import SessionOptions
from accel.errors import EngineError, EngineUnavailableError, InputError, ParityError
from accel.inspection import inspect
from accel.variants import LIMITS, add_variant
from tests.engines.openvino.needs import needs_bfloat16, needs_openvino

pytestmark = needs_openvino
Feeds = dict[str, NDArray]
LIMIT = 1e-4


@pytest.fixture(scope="module")
def bundle(minilm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(minilm_bundle, tmp_path_factory.mktemp("openvino") / "bundle")
    return add_variant(folder, "fp32", target="openvino")


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Iterator[Any]:
    session = open_session(bundle, engine="ort-cpu", options=SessionOptions(1)).session
    yield session
    session.close()


@pytest.fixture
def session(bundle: Bundle) -> Iterator[Any]:
    opened = open_session(bundle, engine="openvino", options=SessionOptions(2)).session
    yield opened
    opened.close()


def batch(*lengths: int, width: int | None = None) -> Feeds:
    real = np.arange(width or max(lengths)) < np.array(lengths)[:, None]
    ids = np.random.default_rng(len(lengths)).integers(1000, 20000, real.shape)
    return {"input_ids": np.where(real, ids, 0), "attention_mask": real.astype(np.int64)}


def check(session: Any, reference: Any, feeds: Feeds) -> None:
    found, expected = session.run(feeds), reference.run(feeds)
    assert found.keys() == expected.keys()
    real = feeds.get("attention_mask", np.ones_like(feeds["input_ids"])) == 1
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype
        assert np.abs(found[name] - array)[real].max() < LIMIT


def test_what_it_says_of_itself(session: Any) -> None:
    info = session.info
    assert (info.name, info.device, info.variant, info.threads) == ("openvino", "cpu", "fp32", 2)
    assert info.version[:2] == "20"


@pytest.mark.parametrize("lengths", [(7,), (1,), (5, 12, 3), (300, 2)])
def test_it_computes_what_onnx_runtime_does(session: Any, reference: Any, lengths: tuple[int, ...]) -> None:
    check(session, reference, batch(*lengths))


def test_holes_and_left_padding(session: Any, reference: Any) -> None:
    feeds = batch(9, 9)
    feeds["attention_mask"][0, 3] = 0
    feeds["attention_mask"][1, :4] = 0
    check(session, reference, feeds)


def test_rows_run_at_their_own_length(session: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, call = [], session._call
    monkeypatch.setattr(session, "_call", lambda e, feeds: seen.append((e, feeds["input_ids"].shape)) or call(e, feeds))
    feeds = batch(4, 60, width=90)
    check(session, reference, feeds)
    assert {shape for _, shape in seen} == {(1, 4), (1, 60)}
    assert {engine for engine, _ in seen} == {session._single} and session._single is not session._whole
    assert not session.run(feeds)["last_hidden_state"][0, 4:].any()
    seen.clear()
    session.run(batch(30))
    assert seen == [(session._whole, (1, 30))], "one row has all threads"


def test_many_batches(session: Any, reference: Any) -> None:
    batches = [batch(*lengths) for lengths in ((3, 9), (5,), (8, 8, 2), (1,))]
    for feeds, found in zip(batches, session.run_many(batches)):
        expected = reference.run(feeds)["last_hidden_state"]
        assert np.abs(found["last_hidden_state"] - expected)[feeds["attention_mask"] == 1].max() < LIMIT


def test_without_mask_and_with_types(session: Any, reference: Any) -> None:
    ids = batch(11)["input_ids"]
    check(session, reference, {"input_ids": ids})
    types = np.tile([0, 1], 6)[None, :11]
    check(session, reference, {"input_ids": ids, "token_type_ids": np.ascontiguousarray(types)})
    with pytest.raises(InputError, match="takes no position_ids"):
        session.run({"input_ids": ids, "position_ids": ids})


def test_what_was_returned_stays(session: Any) -> None:
    first = session.run(batch(6))["last_hidden_state"]
    kept = first.copy()
    session.run({"input_ids": np.full((1, 6), 2000)})
    np.testing.assert_array_equal(first, kept)


def test_threads_at_once(session: Any) -> None:
    feeds = [batch(*range(2, 3 + count)) for count in range(8)]
    alone = [session.run(one)["last_hidden_state"] for one in feeds]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for expected, found in zip(alone, pool.map(session.run, feeds)):
                np.testing.assert_allclose(found["last_hidden_state"], expected, atol=1e-5)
    assert 1 <= len(session._single._spare) <= 8, "requests are used again"


def test_an_error_of_openvino_is_ours(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"OpenVINO failed: .*encoder batch \[1, 600\]"):
        session.run({"input_ids": np.full((1, 600), 2000)})  # longer than the positions
    session.run(batch(5))

    def no_memory(engine: Any, feeds: Feeds) -> Feeds:
        raise RuntimeError("Exception from src/inference: std::bad_alloc")

    monkeypatch.setattr(session, "_call", no_memory)
    with pytest.raises(EngineError, match="out of memory.*smaller batch"):
        session.run(batch(5))


def test_closed(session: Any) -> None:
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(batch(5))


def _in_child(session: Any, folder: Path, answers: Any) -> None:
    try:
        session.run(batch(5))
        answers.put("it ran")
    except EngineError as error:
        answers.put(str(error))
    with accel.load(folder, engine="openvino", threads=1) as encoder:
        answers.put(float(encoder(**batch(5)).last_hidden_state.sum()))


def test_a_forked_child_loads_anew(session: Any, bundle: Bundle) -> None:
    expected = float(session.run(batch(5))["last_hidden_state"].sum())
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(session, bundle.path, answers))
    child.start()
    assert "opened before a fork" in answers.get(timeout=60)
    assert answers.get(timeout=60) == pytest.approx(expected, rel=1e-4)
    child.join(60)
    assert child.exitcode == 0


def test_a_graph_that_openvino_refuses(bundle: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    graph = folder / bundle.graph("fp32", "openvino").file
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(EngineUnavailableError, match="OpenVINO failed"):
        open_session(Bundle.open(folder), engine="openvino")


def test_the_graph_has_no_weights_of_its_own(bundle: Bundle, minilm_bundle: Path) -> None:
    entry = bundle.graph("fp32", "openvino")
    assert entry.weights == ("fp32.weights",) and bundle.variant("fp32").weights == ("fp32.weights",)
    added = set(bundle.manifest.files) - set(Bundle.open(minilm_bundle).manifest.files)
    assert added == {"fp32.openvino.onnx"} and bundle.manifest.files["fp32.openvino.onnx"].size < 100_000
    parity = bundle.manifest.parity["fp32/openvino"]
    assert parity.reference == "ort-cpu fp32" and 0 < parity.max_rel_error < LIMITS["fp32"]


@needs_bfloat16
def test_bfloat16_is_a_variant_of_its_own(bundle: Bundle, reference: Any, tmp_path: Path) -> None:
    both = add_variant(shutil.copytree(bundle.path, tmp_path / "both"), "bf16", target="openvino")
    assert both.variant("bf16").weights == () and both.graph("bf16", "openvino").weights == ("fp32.weights",)
    found = inspect(both)
    assert found.warnings == () and [item.files for item in found.weights] == [("fp32.weights",)] * 2
    parity = both.manifest.parity["bf16/openvino"]
    assert LIMITS["fp32"] < parity.max_rel_error < LIMITS["bf16"]
    feeds = batch(20, 9)
    expected = reference.run(feeds)["last_hidden_state"][feeds["attention_mask"] == 1]
    with accel.load(both.path, engine="openvino") as exact, accel.load(both.path, variant="bf16") as rounded:
        assert (exact.engine.variant, rounded.engine.variant) == ("fp32", "bf16")
        assert rounded.engine.name == "openvino" and [f.engine for f in rounded.fallbacks] == ["ort-cpu"]
        for model, least, most in ((exact, 0.0, LIMIT), (rounded, LIMIT, 1e-1)):
            found = model(**feeds).last_hidden_state[feeds["attention_mask"] == 1]
            assert least < np.abs(found - expected).max() < most
        vectors = rounded.embed(["A man is eating.", "Someone has a meal."])
        assert np.abs((vectors * exact.embed(["A man is eating.", "Someone has a meal."])).sum(-1) - 1).max() < 1e-3


def test_a_wrong_graph_is_not_added(
    minilm_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accel.graph.lowering.openvino import attention

    monkeypatch.setattr(attention, "HIDDEN", 0.0)  # padding is seen
    folder = Path(shutil.copytree(minilm_bundle, tmp_path / "bundle"))
    with pytest.raises(ParityError, match="The fp32 graph"):
        add_variant(folder, "fp32", target="openvino")
    assert "openvino" not in Bundle.open(folder).variant("fp32").graphs
