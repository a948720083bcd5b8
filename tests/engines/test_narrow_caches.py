"""The CPU session with caches in int8 and int4: numbers, ragged steps, buffers, sizes, and who else runs them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.engines import kv_cache, open_session
from accel.engines.kv_cache import CacheShape, cache_item_bytes, rounded_cache
from accel.engines.ort.decoder import OrtDecoderSession
from accel.engines.session import SessionOptions, StepInputs
from accel.errors import BundleError, CapacityError, EngineUnavailableError
from accel.manifest import GraphEntry
from tests.engines.tiny_llama import ARCH, HEAD_DIM, VOCAB, draw_scales, draw_weights, reference_logits, write_bundle

WEIGHTS = draw_weights()
IDS = np.random.default_rng(1).integers(0, VOCAB, 24).tolist()
ROWS, CAPACITY = 3, 64
LIMIT = 5e-5  # as for float32 caches: the reference rounds keys and values too
SCALES = {bits: draw_scales(bits) for bits in (8, 4)}
LOGITS = {bits: reference_logits(WEIGHTS, IDS, kv) for bits, kv in SCALES.items()}
EXACT = reference_logits(WEIGHTS, IDS)


def name_of(bits: int) -> str:
    return f"fp32+kv{bits}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    caches = {name_of(bits): kv for bits, kv in SCALES.items()}
    return write_bundle(tmp_path_factory.mktemp("integer") / "bundle", WEIGHTS, caches=caches)


@pytest.fixture(params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def session(bundle: Bundle, bits: int) -> Iterator[Any]:
    opened = open_session(bundle, variant=name_of(bits), options=SessionOptions(2, CAPACITY, ROWS)).session
    assert (opened.info.name, opened.info.variant) == ("ort-cpu", name_of(bits))
    yield opened
    opened.close()


def step(session: Any, rows: list[tuple[int, int, int]], wanted: list[int]) -> np.ndarray:
    """Runs IDS[start:stop] in each given row (row, start, stop), with ``start`` tokens in its cache."""
    query, past = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
    positions: list[int] = []
    for row, start, stop in rows:
        query[row], past[row] = stop - start, start
        positions += range(start, stop)
    ids = np.array([IDS[p] for p in positions])
    return np.array(session.step(StepInputs(ids, np.array(positions), query, past, np.array(wanted, np.int64))))


def test_a_whole_prompt(session: Any, bits: int) -> None:
    logits = step(session, [(0, 0, 24)], list(range(24)))
    assert np.abs(logits - LOGITS[bits]).max() < LIMIT
    lost = np.abs(LOGITS[bits] - EXACT).max()
    assert lost > {8: 0.01, 4: 0.3}[bits] > LIMIT, "the reference tells integer caches from float32"


def test_ragged_steps_equal_each_rows_own_run(session: Any, bits: int) -> None:
    """Prefill, chunks and single tokens in one step, against one row alone, one token at a time."""
    alone = np.concatenate([step(session, [(0, at, at + 1)], [0]) for at in range(24)])
    assert np.abs(alone - LOGITS[bits]).max() < LIMIT
    courses = [
        [(0, 0, 3), (1, 0, 12), (2, 0, 9)],
        [(0, 3, 4), (1, 12, 18)],
        [(0, 4, 11), (1, 18, 19), (2, 9, 10)],
        [(0, 11, 12), (1, 19, 20), (2, 10, 11)],
    ]
    for rows in courses:
        places = [position for _, start, stop in rows for position in range(start, stop)]
        assert np.abs(step(session, rows, list(range(len(places)))) - alone[places]).max() < LIMIT


def test_copied_rows_go_their_own_way(session: Any, bits: int) -> None:
    step(session, [(2, 0, 16)], [])
    session.copy_row(2, 0, 10)
    copied, source = session.read_row(0, 10), session.read_row(2, 10)
    assert all((copied[name] == source[name]).all() for name in source)
    logits = step(session, [(0, 10, 14), (2, 16, 17)], [3, 4])
    assert np.abs(logits - LOGITS[bits][[13, 16]]).max() < LIMIT


def test_rows_hold_the_integers_of_what_a_float_cache_holds(bundle: Bundle, session: Any, bits: int) -> None:
    plain: Any = open_session(bundle, variant="fp32", options=SessionOptions(1, CAPACITY, ROWS)).session
    for opened in (plain, session):
        step(opened, [(1, 0, 20)], [])
    floats, integers = plain.read_row(1, 20), session.read_row(1, 20)
    plain.close()
    limit = 1 << bits - 1
    for part, scales in (("key", SCALES[bits].keys[0]), ("value", SCALES[bits].values[0])):
        found = integers[f"0.{part}"]
        assert found.dtype == (np.int8 if bits == 8 else np.uint8) and found.shape == (2, 20, HEAD_DIM * bits // 8)
        if bits == 4:
            found = np.stack([found & 15, found >> 4], -1).reshape(2, 20, HEAD_DIM).astype(np.int8) - 8
        exact = np.clip(floats[f"0.{part}"] / scales[:, None], -limit, limit - 1)
        assert np.abs(found - exact).max() < 0.5 + 1e-4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_over_1000_steps_pointers_stay_and_memory_does_not_grow(bundle: Bundle, bits: int) -> None:
    session: Any = open_session(bundle, variant=name_of(bits), options=SessionOptions(1, 512, ROWS)).session
    before = session.cache_pointers()
    ids = np.random.default_rng(2).integers(0, VOCAB, (1100, ROWS))

    def run(index: int) -> None:
        past = np.full(ROWS, index % 512, np.int32)
        inputs = StepInputs(ids[index], past.astype(np.int64), np.ones(ROWS, np.int32), past, np.arange(ROWS))
        assert np.isfinite(session.step(inputs)).all()

    for index in range(600):  # once around: the cache's pages are committed
        run(index)
    written = session.read_row(0, 512)
    start = resident_bytes()
    for _ in range(2):
        for index in range(100, 600):
            run(index)
    assert resident_bytes() - start < 1 << 20
    assert session.cache_pointers() == before
    assert all(written[name].any() and cache.any(-1).all() for name, cache in session.read_row(0, 512).items())
    session.close()


def test_the_default_capacity_grows_with_smaller_caches(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities = {}
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 2 * ROWS * 2 * 2 * 2 * HEAD_DIM * 4 * 50)
    for variant in ("fp32", name_of(8), name_of(4)):
        opened: Any = open_session(bundle, "cpu", variant=variant, options=SessionOptions(1, None, ROWS)).session
        capacities[variant] = opened.capacity
        opened.close()
    assert capacities == {"fp32": 50, name_of(8): 200, name_of(4): 400}
    with pytest.raises(CapacityError, match="a capacity of at most 100 with max_batch 3"):
        open_session(bundle, "cpu", variant="fp32", options=SessionOptions(1, 400, ROWS))
    open_session(bundle, "cpu", variant=name_of(8), options=SessionOptions(1, 400, ROWS)).session.close()


def test_the_manifest_says_how_wide_a_cache_is(bundle: Bundle) -> None:
    sizes = {name: cache_item_bytes(ARCH, bundle.graph(name, "ort-cpu")) for name in bundle.manifest.variants}
    assert sizes == {"fp32": 4, name_of(8): 1, name_of(4): 0.5}
    kinds = {name: rounded_cache(bundle, name) for name in bundle.manifest.variants}
    assert kinds == {"fp32": None, name_of(8): "int8", name_of(4): "int4"}
    with pytest.raises(BundleError, match="no past.0.key"):
        cache_item_bytes(ARCH, GraphEntry("g.onnx", 23, (), (), ()))


def test_auto_takes_float_caches(bundle: Bundle) -> None:
    opened = open_session(bundle, "cpu", options=SessionOptions(1, CAPACITY, ROWS)).session
    assert opened.info.variant == "fp32"
    opened.close()


@pytest.mark.parametrize("engine", ["torch", "ort-cuda", "cuda", "tensorrt", "rtx"])
def test_other_engines_refuse_integer_caches(bundle: Bundle, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.engines.cuda.registry.missing_gpu", lambda: None)
    said = rf"{engine}: it has no int4 KV cache; 'fp32\+kv4' runs on ort-cpu"
    with pytest.raises(EngineUnavailableError, match=said):
        open_session(bundle, engine=engine, variant=name_of(4), options=SessionOptions(1, CAPACITY, ROWS))
    said = r"cuda: .* no graph of the cuda engine for variant 'fp32\+kv8': accel quantize .* --target cuda adds"
    said = said if engine == "cuda" else rf"{engine}: it has no int8 KV cache; 'fp32\+kv8' runs on ort-cpu"
    with pytest.raises(EngineUnavailableError, match=said):
        open_session(bundle, engine=engine, variant=name_of(8), options=SessionOptions(1, CAPACITY, ROWS))


def test_a_graph_whose_caches_are_of_another_kind_is_refused(bundle: Bundle) -> None:
    layer = dataclasses.replace(ARCH.layers[0], head_dim=2 * HEAD_DIM)
    manifest = dataclasses.replace(bundle.manifest, arch=dataclasses.replace(ARCH, layers=(layer, layer)))
    path = bundle.file(bundle.graph(name_of(8), "ort-cpu").file)
    with pytest.raises(BundleError, match=r"past.0.key is tensor\(int8\).*no cache of 2 heads of 32"):
        OrtDecoderSession(path, manifest, name_of(8), 1, CacheShape(1, 8))
