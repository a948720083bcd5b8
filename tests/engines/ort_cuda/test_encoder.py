"""The encoder session's own logic on the CPU provider: masks, cut padding, halves, faults."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.gpu_memory import OutOfMemoryError
from accel.engines.ort_cuda.encoder import OrtCudaEncoderSession
from accel.engines.session import SessionOptions
from accel.errors import BundleError, EngineBrokenError, EngineError, InputError
from accel.variants import add_variant
from tests.engines.captures import DISTURBED
from tests.engines.ort_cuda.stand_in import CPU, fake_gpu, open_encoder

Feeds = dict[str, NDArray]
LIMIT = 1e-4


@pytest.fixture(scope="module")
def bundle(minilm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(minilm_bundle, tmp_path_factory.mktemp("ort_cuda") / "bundle")
    return add_variant(folder, "fp32", target="ort-cuda", check=False)


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Iterator[Any]:
    session = open_session(bundle, engine="ort-cpu", options=SessionOptions(1)).session
    yield session
    session.close()


@pytest.fixture
def session(bundle: Bundle) -> Iterator[OrtCudaEncoderSession]:
    opened = open_encoder(bundle)
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


def test_batches(session: OrtCudaEncoderSession, reference: Any) -> None:
    check(session, reference, batch(12, 5, 9))
    check(session, reference, batch(7))
    check(session, reference, {"input_ids": batch(6, 6)["input_ids"]})
    holes = batch(10, 10)
    holes["attention_mask"][:, 2:5] = 0
    check(session, reference, holes)
    left = batch(10, 10)
    left["attention_mask"][0, :4] = 0
    check(session, reference, left)
    check(session, reference, {**batch(8, 3), "token_type_ids": np.array([[0] * 4 + [1] * 4, [1] * 8])})


def test_padding_that_all_share_is_cut(session: OrtCudaEncoderSession, reference: Any) -> None:
    widths: list[int] = []
    run = session._run_bound
    session._run_bound = lambda feeds: widths.append(feeds["input_ids"].shape[1]) or run(feeds)  # type: ignore
    feeds = batch(5, 9, width=40)
    check(session, reference, feeds)
    assert widths == [9] and not session.run(feeds)["last_hidden_state"][:, 9:].any()
    empty = {name: np.zeros((2, 4), np.int64) for name in ("input_ids", "attention_mask")}
    assert np.isfinite(session.run(empty)["last_hidden_state"]).all()


def test_inputs_that_it_does_not_take(session: OrtCudaEncoderSession) -> None:
    with pytest.raises(InputError, match="takes no pixel_values.*attention_mask, input_ids, token_type_ids"):
        session.run({**batch(3), "pixel_values": np.zeros((1, 3), np.int64)})


def test_threads(session: OrtCudaEncoderSession, reference: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, session, reference, batch(3 + index, 8)) for index in range(8)]:
            done.result()


def test_closed(session: OrtCudaEncoderSession) -> None:
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(batch(3))


def test_a_graph_of_another_target(bundle: Bundle) -> None:
    graph = bundle.file(bundle.graph("fp32", "ort-cpu").file)
    with pytest.raises(BundleError, match="lacks key_mask, key_mask_shape.*accel quantize"):
        OrtCudaEncoderSession(graph, bundle.manifest.arch, "fp32", CPU)


def test_a_batch_that_does_not_fit_runs_in_halves(bundle: Bundle, reference: Any) -> None:
    sizes: list[int] = []
    session = open_encoder(bundle)
    run = session._run_bound

    def limited(feeds: Feeds) -> Feeds:
        sizes.append(len(feeds["input_ids"]))
        if len(feeds["input_ids"]) > 2:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 7")
        return run(feeds)

    session._run_bound = limited  # type: ignore[method-assign]
    check(session, reference, batch(4, 9, 6, 2, 7))
    assert sizes == [5, 5, 2, 3, 3, 1, 2], "what fails might have met a capture"
    session.close()


def test_a_row_that_does_not_fit_fails_alone(bundle: Bundle, reference: Any) -> None:
    full: list[bool] = [True]

    def fail(io: Any, options: Any) -> None:
        if full:
            raise RuntimeError("CUDA failure 2: out of memory")

    session = open_encoder(bundle, fake_gpu(fail))
    with pytest.raises(OutOfMemoryError, match=r"encoder batch \[1, 4\]"):
        session.run(batch(4))
    full.clear()
    check(session, reference, batch(4, 2))
    session.close()


def test_another_threads_capture_costs_a_second_try(bundle: Bundle, reference: Any) -> None:
    left = [1]

    def refuse(io: Any, options: Any) -> None:
        if left and left.pop():
            raise RuntimeError(DISTURBED["onnxruntime"])

    session = open_encoder(bundle, fake_gpu(refuse))
    check(session, reference, batch(4, 2))
    assert not left
    session.close()


def test_a_cuda_error_breaks_the_session(bundle: Bundle) -> None:
    def fail(io: Any, options: Any) -> None:
        raise RuntimeError("CUDA failure 719: unspecified launch failure")

    session = open_encoder(bundle, fake_gpu(fail))
    for _ in range(2):
        with pytest.raises(EngineBrokenError, match="unspecified launch failure"):
            session.run(batch(4))
    session.close()
