"""The encoder session against ONNX Runtime's engine: odd batches, masks, threads, profiles."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import accel.engines as engines
from accel.bundle import Bundle
from accel.engines import Engine, OpenedSession, open_session
from accel.engines.kv_cache import bytes_per_token
from accel.engines.session import SessionOptions
from accel.engines.tensorrt import buffers
from accel.engines.tensorrt.buffers import OUTPUT_BYTES, OutputLayout
from accel.engines.tensorrt.memory import DeviceMemoryError
from accel.errors import EngineBrokenError, EngineError, EngineUnavailableError, InputError, UncoveredError
from accel.runtime.encoder import Encoder
from tests.engines.tensorrt.conftest import CAPACITY
from tests.engines.tensorrt.double import SCRATCH, World
from tests.parity.families import ALL

Bundles, Opener = Callable[[str], Bundle], Callable[..., Any]
RNG = np.random.default_rng(1)
FLOAT = ir.DataType.FLOAT


def reference(bundle: Bundle) -> Any:
    return open_session(bundle, engine="ort-cpu", options=SessionOptions(threads=1)).session


def batch(name: str, lengths: list[int], width: int | None = None) -> dict[str, np.ndarray]:
    width = width or max(lengths)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    feeds = {"input_ids": RNG.integers(3, 97, mask.shape) * mask, "attention_mask": mask}
    if name.startswith("bert"):
        feeds["token_type_ids"] = RNG.integers(0, 2, mask.shape)
    return feeds


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], mask: np.ndarray) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].dtype == np.float32
        real = mask.astype(bool) if array.shape[:2] == mask.shape else slice(None)
        assert np.abs(found[name][real] - array[real]).max() <= 1e-4 * np.abs(array).max()
        assert np.isfinite(found[name][real]).all()


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "mpnet", "bert_pairs", "distilbert_answers"])
def test_odd_batches_equal_ort(name: str, tiny_bundle: Bundles, open_tiny: Opener) -> None:
    session, other = open_tiny(name), reference(tiny_bundle(name))
    for lengths in ([1], [5], [9, 9], [7, 3, 1], [24, 2, 13, 24, 5], [3] * 9):
        feeds = batch(name, lengths)
        assert_equal(session.run(feeds), other.run(feeds), feeds["attention_mask"])


def test_missing_feeds_get_their_neutral_values(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    session, ids = open_tiny("bert"), batch("bert", [6, 6, 6])["input_ids"]
    full = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    found, expected = session.run({"input_ids": ids}), reference(tiny_bundle("bert")).run(full)
    assert_equal(found, expected, full["attention_mask"])


def test_masks_with_holes_and_left_padding(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    feeds = batch("bert", [6, 6])
    feeds["attention_mask"][:] = [[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]]
    expected = reference(tiny_bundle("bert")).run(feeds)
    assert_equal(open_tiny("bert").run(feeds), expected, feeds["attention_mask"])


def test_shapes_are_padded_to_the_profile(open_tiny: Opener, world: World) -> None:
    session = open_tiny("bert")
    for lengths in ([3], [9, 9, 9], [20, 1], [24]):
        session.run(batch("bert", lengths))
    assert [shape for _, shape in world.runs] == [(1, 8), (4, 16), (2, 24), (1, 24)]


def test_the_tightest_profile_is_chosen(open_tiny: Opener, world: World) -> None:
    one, many = (((1,), (1,), (1,)), ((1,), (8,), (32,))), (((1,), (4,), (8,)), ((1,), (8,), (16,)))
    session = open_tiny("bert", FLOAT, many, one)
    for lengths in ([30], [5], [5, 5, 5], [16] * 11):
        session.run(batch("bert", lengths))
    assert world.runs == [(1, (1, 32)), (1, (1, 8)), (0, (4, 8)), (0, (8, 16)), (0, (4, 16))]


@pytest.mark.parametrize("name", ["modernbert_mask", "distilbert_answers"])
@pytest.mark.parametrize("budget", [1, 2**12, 2**14, 2**20])
def test_outputs_beyond_the_budget_run_in_parts(
    name: str, budget: int, tiny_bundle: Bundles, open_tiny: Opener, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits to single rows; a row that is larger alone gets memory of its own, which is free again afterwards."""
    monkeypatch.setattr(buffers, "OUTPUT_BYTES", budget)
    monkeypatch.setattr(buffers, "FETCH_BYTES", 1000)  # every output takes several copies, the last one not full
    session, other = open_tiny(name), reference(tiny_bundle(name))
    used = world.gpu.used
    for lengths in ([9, 9, 4], [24, 2, 13, 24, 5], [3]):
        feeds = batch(name, lengths)
        world.runs.clear()
        assert_equal(session.run(feeds), other.run(feeds), feeds["attention_mask"])
        assert world.gpu.used == used
        sizes = [session._layout.size(*shape) for _, shape in world.runs]
        assert all(size <= budget or shape[0] == 1 for size, (_, shape) in zip(sizes, world.runs))
    assert session._reserved <= budget


def test_a_row_that_does_not_fit_at_all(open_tiny: Opener, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "OUTPUT_BYTES", 1)
    session = open_tiny("bert")
    world.gpu.memory = world.gpu.used + 1000
    with pytest.raises(DeviceMemoryError, match="the outputs of 1 x 16 tokens takes"):
        session.run(batch("bert", [9]))
    world.gpu.memory = 1 << 30
    assert session.run(batch("bert", [9]))["last_hidden_state"].shape[:2] == (1, 9)  # the session lives on


def test_a_masked_language_model_reserves_little() -> None:
    """BERT-base, 64 rows of 512 tokens: the largest run would put out 4 GB."""
    layout = OutputLayout("fill-mask", {"logits": ("B", "S", 30522)})
    profile = {"input_ids": ((1, 1), (64, 128), (64, 512))}
    assert layout.size(64, 512) > 4e9 and layout.reserved([profile]) == OUTPUT_BYTES <= 1 << 28
    assert layout.size(4, 512) <= OUTPUT_BYTES
    assert OutputLayout("feature-extraction", {"x": ("B", "S", 768)}).reserved([profile]) == 64 * 512 * 768 * 4


@pytest.mark.parametrize("name", ["bert", "distilbert_answers", "bert_pairs", "llama"])
def test_the_manifest_says_what_is_taken(
    name: str, tiny_bundle: Bundles, built_engine: Any, open_tiny: Opener, world: World
) -> None:
    open_tiny(name, **({"max_batch": 4} if name == "llama" else {}))
    arch, built = tiny_bundle(name).manifest.arch, built_engine(name)
    outputs = {tensor.name: tensor.shape for tensor in built.tensors if not tensor.is_input}
    cache = 4 * CAPACITY * bytes_per_token(arch, 4) if name == "llama" else 0
    assert world.gpu.used == SCRATCH + buffers.buffer_bytes(arch, built.profiles, outputs, cache)


@pytest.mark.parametrize("name", ["bert", "bert_pairs", "distilbert_answers", "modernbert_mask"])
@pytest.mark.parametrize("shape", [(None, 16), (4, 16), (2, None)])
def test_fixed_sizes_are_cut_off_again(
    name: str, shape: tuple[int | None, int | None], tiny_bundle: Bundles, open_tiny: Opener, built_engine: Any,
    world: World,
) -> None:  # fmt: skip
    """What all profiles fix stands in the engine's shapes as a number: there is no -1 that says what is a sequence."""
    rows, width = shape
    profile = (((rows or 1,),) * 2 + ((rows or 4,),), ((width or 1,), (width or 8,), (width or 24,)))
    built = built_engine(name, FLOAT, profile)
    tensors = []
    for tensor in built.tensors:
        whole = tensor.is_input or name != "bert_pairs"
        fixed = [size or -1 for size in (shape if whole else shape[:1])]
        tensors.append(replace(tensor, shape=(*fixed, *tensor.shape[len(fixed) :])))
    fixed_engine = replace(built, plan=built.plan + b" fixed", tensors=tuple(tensors))
    world.engines[fixed_engine.plan] = fixed_engine
    session = open_tiny(name, FLOAT, profile, plan=fixed_engine.plan, facts=fixed_engine.facts())
    for lengths in ([9, 3, 4, 16, 2], [5], [16]):
        feeds = batch(name, lengths)
        assert_equal(session.run(feeds), reference(tiny_bundle(name)).run(feeds), feeds["attention_mask"])


def test_outputs_belong_to_the_caller(open_tiny: Opener) -> None:
    session = open_tiny("bert")
    feeds = batch("bert", [5, 4])
    first = session.run(feeds)["last_hidden_state"]
    kept = first.copy()
    session.run(batch("bert", [5, 4]))
    np.testing.assert_array_equal(first, kept)


def test_threads_get_their_own_results(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    session, other = open_tiny("bert"), reference(tiny_bundle("bert"))
    batches = [batch("bert", RNG.integers(1, 12, 1 + i % 5).tolist()) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        for feeds, found in zip(batches, pool.map(session.run, batches)):
            assert_equal(found, other.run(feeds), feeds["attention_mask"])


def test_accels_encoder_runs_on_it(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    bundle, feeds = tiny_bundle("bert_pairs"), batch("bert", [7, 3, 5])
    own, other = (Encoder(bundle, OpenedSession(one)) for one in (open_tiny("bert_pairs"), reference(bundle)))
    with own, other:
        assert_equal(dict(own(**feeds)), dict(other(**feeds)), feeds["attention_mask"])


def test_a_batch_that_no_profile_covers(open_tiny: Opener) -> None:
    session = open_tiny("bert")
    with pytest.raises(
        UncoveredError, match=r"covers sequence 25 \(at profile0: batch 1 to 4, sequence 1 to 24\)"
    ) as e:
        session.run(batch("bert", [25, 3]))
    assert re.search(
        r"accel build \S+ --target rtx --sm sm86 --precision fp32 --profiles FILE, with encode: "
        r"{batch: {min: 1, opt: 4, max: 4}, sequence: {min: 1, opt: 8, max: \d+}} in FILE",
        str(e.value),
    )
    session.run(batch("bert", [24]))  # the session lives on


@pytest.mark.parametrize("strict", [False, True])
def test_longer_rows_run_on_the_next_engine(
    strict: bool, tiny_bundle: Bundles, open_tiny: Opener, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, other = tiny_bundle("bert"), reference(tiny_bundle("bert"))
    rtx = Engine("rtx", "cpu", lambda *_: None, lambda *_: open_tiny("bert"))
    cpu = [engine for engine in engines.ENGINES if engine.name in ("ort-cpu", "torch")]
    monkeypatch.setattr(engines, "ENGINES", (rtx, *cpu))
    opened = open_session(bundle, options=SessionOptions(threads=1), strict=strict)
    with Encoder(bundle, opened) as encoder:
        for lengths, runs in (([7, 3], 1), ([30, 2], 1), ([24], 2)):
            feeds = batch("bert", lengths)
            if strict and lengths[0] > 24:
                with pytest.raises(UncoveredError, match="sequence 1 to 24.*accel build"):
                    encoder(**feeds)
                continue
            assert_equal(dict(encoder(**feeds)), other.run(feeds), feeds["attention_mask"])
            assert len(world.runs) == runs and encoder.engine.name == "rtx"
        assert [fallback.engine for fallback in encoder.fallbacks] == ([] if strict else ["rtx"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": np.ones((1, 4), np.int64)}, "takes no position_ids.*input_ids, attention_mask"),
        ({"attention_mask": np.ones((1, 3), np.int64)}, r"attention_mask must be int64 \[1, 4\], not int64 \[1, 3\]"),
        ({"attention_mask": np.ones((1, 4), np.int32)}, r"must be int64 \[1, 4\], not int32"),
        ({"input_ids": np.ones((4,), np.int64)}, r"input_ids must be there, of shape \[B, S\]"),
        ({"input_ids": np.ones((0, 4), np.int64)}, "not empty"),
    ],
)
def test_bad_feeds(change: dict[str, np.ndarray], message: str, open_tiny: Opener) -> None:
    feeds = {"input_ids": np.ones((1, 4), np.int64), **change}
    with pytest.raises(InputError, match=message):
        open_tiny("bert").run(feeds)


def test_a_broken_gpu_ends_the_session(open_tiny: Opener, world: World) -> None:
    session = open_tiny("bert")
    world.gpu.fail["cudaStreamSynchronize"] = world.gpu.cudaError_t.cudaErrorIllegalAddress
    before = len(world.gpu.calls)
    with pytest.raises(EngineBrokenError, match="CUDA failed: cudaErrorIllegalAddress"):
        session.run(batch("bert", [4]))
    world.gpu.fail.clear()
    calls = len(world.gpu.calls)
    with pytest.raises(EngineBrokenError):
        session.run(batch("bert", [4]))
    assert before < calls == len(world.gpu.calls), "a broken session must leave the GPU alone"


def test_an_engine_of_another_model(open_tiny: Opener, tiny_bundle: Bundles, built_engine: Any, world: World) -> None:
    other = built_engine("bert")
    world.engines[other.plan] = other
    assert ALL["bert_pairs"].task == "text-classification"
    with pytest.raises(EngineUnavailableError, match="another model: it puts out last_hidden_state"):
        open_tiny("bert_pairs", plan=other.plan, facts=other.facts())
    assert world.gpu.used == 0


def test_warm_up_runs_every_shape(open_tiny: Opener, world: World) -> None:
    open_tiny("bert").warm_up()
    assert {shape for _, shape in world.runs} == {(b, s) for b in (1, 2, 4) for s in (1, 8, 16, 24)}


def test_closed_sessions_refuse(open_tiny: Opener) -> None:
    session = open_tiny("bert")
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(batch("bert", [3]))
