"""The encoder session against NumPy: cut rows, masks with holes, many batches, threads, lifetime; and the reference."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from accel.bundle import Bundle, BundleWriter
from accel.engines import open_session
from accel.engines.ort import encoder as module
from accel.engines.ort.encoder import OrtEncoderSession
from accel.engines.session import SessionOptions
from accel.errors import EngineError, InputError
from accel.manifest import ParameterEntry, Variant
from tests import bundle_samples

RNG = np.random.default_rng(0)
VOCAB, HIDDEN = 50, 8
TABLE = RNG.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
TYPES = RNG.standard_normal((2, HIDDEN)).astype(np.float32)


def graph() -> onnx.ModelProto:
    """One head of attention over the embeddings themselves, and the mean over real tokens."""
    constants = {
        "table": TABLE, "types": TYPES, "one": np.float32(1), "far": np.float32(-1e9),
        "axis1": np.array([1], np.int64), "axis2": np.array([2], np.int64),
    }  # fmt: skip
    lines = [
        ("Gather", "table input_ids", "words", {}), ("Gather", "types token_type_ids", "segments", {}),
        ("Add", "words segments", "x", {}), ("Transpose", "x", "xt", {"perm": [0, 2, 1]}),
        ("MatMul", "x xt", "scores", {}), ("Cast", "attention_mask", "real", {"to": TensorProto.FLOAT}),
        ("Sub", "one real", "unreal", {}), ("Mul", "unreal far", "bias", {}),
        ("Unsqueeze", "bias axis1", "bias3", {}), ("Add", "scores bias3", "masked", {}),
        ("Softmax", "masked", "weights", {"axis": -1}), ("MatMul", "weights x", "last_hidden_state", {}),
        ("Unsqueeze", "real axis2", "real3", {}), ("Mul", "last_hidden_state real3", "kept", {}),
        ("ReduceSum", "kept axis1", "total", {"keepdims": 0}), ("ReduceSum", "real axis1", "count", {"keepdims": 1}),
        ("Div", "total count", "pooled", {}),
    ]  # fmt: skip
    nodes = [helper.make_node(op, i.split(), [o], **attributes) for op, i, o, attributes in lines]
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    outputs = [
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", HIDDEN]),
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", HIDDEN]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    body = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def reference(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    x = TABLE.astype(np.float64)[ids] + TYPES[feeds.get("token_type_ids", np.zeros_like(ids))]
    scores = x @ x.transpose(0, 2, 1) - 1e9 * (1 - mask[:, None])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    hidden = weights / weights.sum(-1, keepdims=True) @ x
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return {"last_hidden_state": hidden, "pooled": pooled}


def batch(lengths: list[int], width: int | None = None) -> dict[str, np.ndarray]:
    width = width or max(lengths)
    ids = RNG.integers(0, VOCAB, (len(lengths), width))
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": RNG.integers(0, 2, ids.shape)}


def check(feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
    expected = reference(feeds)
    real = feeds["attention_mask"].astype(bool)
    assert outputs["last_hidden_state"].shape == expected["last_hidden_state"].shape
    assert np.abs(outputs["last_hidden_state"] - expected["last_hidden_state"])[real].max() < 1e-4
    assert np.abs(outputs["pooled"] - expected["pooled"]).max() < 1e-4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("encoder") / "g.onnx"
    onnx.save(graph(), target)
    return target


@pytest.fixture(params=[1, 2, 3])
def session(path: Path, request: pytest.FixtureRequest) -> Iterator[OrtEncoderSession]:
    opened = OrtEncoderSession(path, "fp32", request.param)
    yield opened
    opened.close()


@pytest.mark.parametrize("lengths", [[7], [7, 7], [7, 3, 1, 7, 5, 5, 5], [600, 600, 600]])
def test_batches_of_any_lengths(session: OrtEncoderSession, lengths: list[int]) -> None:
    feeds = batch(lengths)
    outputs = session.run(feeds)
    check(feeds, outputs)
    padding = feeds["attention_mask"] == 0
    assert not outputs["last_hidden_state"][padding].any()


def test_padding_of_a_whole_batch_is_cut_and_put_back(session: OrtEncoderSession) -> None:
    feeds = batch([4, 4], width=9)
    outputs = session.run(feeds)
    check(feeds, outputs)
    assert not outputs["last_hidden_state"][:, 4:].any()
    check(one := batch([4], width=9), session.run(one))


def test_odd_masks_run_masked(session: OrtEncoderSession) -> None:
    feeds = batch([6, 6, 6, 4])
    feeds["attention_mask"][0] = [0, 0, 1, 1, 1, 1]
    feeds["attention_mask"][1] = [1, 1, 0, 1, 0, 1]
    check(feeds, session.run(feeds))
    alone = {name: array[:1] for name, array in feeds.items()}
    check(alone, session.run(alone))


def test_absent_feeds_get_their_neutral_values(session: OrtEncoderSession) -> None:
    ids = batch([5, 5])["input_ids"]
    check({"input_ids": ids, "attention_mask": np.ones_like(ids)}, session.run({"input_ids": ids}))


def test_many_batches_come_back_in_order(session: OrtEncoderSession) -> None:
    batches = [batch(lengths) for lengths in ([3, 9], [5], [8, 8, 2], [1])]
    for feeds, outputs in zip(batches, session.run_many(batches), strict=True):
        check(feeds, outputs)
    assert session.run_many([]) == []


def test_threads_get_their_own_results(session: OrtEncoderSession) -> None:
    batches = [batch(RNG.integers(1, 12, 1 + i % 5).tolist()) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for feeds, outputs in zip(batches, pool.map(session.run, batches), strict=True):
            check(feeds, outputs)


def test_short_rows_at_once_have_their_own_buffers(session: OrtEncoderSession) -> None:
    """Two calls of one length that are inside the run at the same time."""
    one, other = batch([5]), batch([5])
    session.run(one)  # binds the buffers
    both_inside = threading.Barrier(2, timeout=30)
    opened = session._whole

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(opened, name)

        def run_with_iobinding(self, binding: Any) -> None:
            both_inside.wait()
            opened.run_with_iobinding(binding)
            both_inside.wait()

        def run(self, *arguments: Any) -> Any:
            both_inside.wait()
            outputs = opened.run(*arguments)
            both_inside.wait()
            return outputs

    session._whole = Slow()
    session._short_rows[5][0]._session = session._whole
    with ThreadPoolExecutor(2) as pool:
        for feeds, outputs in zip((one, other), pool.map(session.run, (one, other)), strict=True):
            check(feeds, outputs)
    session._whole = opened
    assert len(session._short_rows[5]) == 2


def test_large_outputs_are_not_kept(session: OrtEncoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT_ROW_BYTES", 4 * HIDDEN * 6)  # the pooled vector and five tokens
    for length in (5, 6):
        check(feeds := batch([length]), session.run(feeds))
    assert [len(session._short_rows[length]) for length in (5, 6)] == [1, 0]


def test_another_dtype_is_refused_each_time(session: OrtEncoderSession) -> None:
    for _ in range(2):
        with pytest.raises(EngineError):
            session.run({name: array.astype(np.int32) for name, array in batch([4]).items()})
        check(feeds := batch([4]), session.run(feeds))


def runs(path: Path, lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Rows, width and masking of every run that a batch takes, widest first."""
    session = OrtEncoderSession(path, "fp32", threads)
    seen: list[tuple[int, int, bool]] = []
    original = session._run_group

    def note(opened: Any, batches: Any, group: module.RowGroup) -> Any:
        seen.append((len(group.rows), group.length or 0, group.ragged))
        return original(opened, batches, group)

    monkeypatch.setattr(session, "_run_group", note)
    check(feeds := batch(lengths), session.run(feeds))
    session.close()
    return sorted(seen, key=lambda run: (-run[1], -run[0]))


@pytest.mark.parametrize(
    ("lengths", "threads", "expected"),
    [
        ([7, 3, 3, 3, 3], 2, [(2, 7, True), (3, 3, False)]),  # 4 tokens of padding beside a run saved
        ([20, 3, 3, 3, 3], 2, [(1, 20, False), (4, 3, False)]),  # 17 would be too many
        ([8] * 9, 2, [(5, 8, False), (4, 8, False)]),  # one share for each thread
        ([8] * 9, 1, [(9, 8, False)]),
        ([100, 99, 98, 100], 1, [(2, 100, False), (1, 99, False), (1, 98, False)]),  # long rows are never padded
        ([20, 19, 18, 17, 16], 1, [(4, 20, True), (1, 16, False)]),  # 6 tokens of padding, not 10
        ([300] * 3, 2, [(2, 300, False), (1, 300, False)]),
        ([128] * 4, 2, [(2, 128, False)] * 2),
    ],
)
def test_which_rows_run_together(
    path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], threads: int, expected: list[Any]
) -> None:
    assert runs(path, lengths, threads, monkeypatch) == expected


def test_errors_in_a_worker_reach_the_caller(session: OrtEncoderSession) -> None:
    feeds = batch([4, 3, 2, 1])
    feeds["input_ids"][3, 0] = VOCAB
    with pytest.raises(EngineError, match="ONNX Runtime failed"):
        session.run(feeds)
    check(fine := batch([4, 3]), session.run(fine))
    with pytest.raises(InputError, match="takes no position_ids"):
        session.run({**fine, "position_ids": fine["input_ids"]})


def test_closed_sessions_refuse(session: OrtEncoderSession) -> None:
    session.run(batch([3, 2]))
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(batch([3]))


def _run_in_child(session: Any, queue: Any) -> None:
    try:
        session.run(batch([3, 2]))
        queue.put("ran")
    except EngineError as error:
        queue.put(str(error))


def test_a_forked_child_is_refused(path: Path) -> None:
    session = OrtEncoderSession(path, "fp32", 2)
    session.run(batch([3, 2]))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_in_child, args=(session, queue))
    child.start()
    assert "fork" in queue.get(timeout=30)
    child.join(30)
    check(feeds := batch([3, 2]), session.run(feeds))
    session.close()


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("BertModel", {"model_type": "bert", "num_attention_heads": 2}),
    ("ModernBertModel", {
        "model_type": "modernbert", "num_attention_heads": 2, "local_attention": 4, "global_attn_every_n_layers": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config"), CONFIGS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_reference_engine_equals_transformers(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    """Buffers that no weight file holds (position ids, rotary tables) must have their values too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = {**sizes, **config, "max_position_embeddings": 64}
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    bundle = write_reference_bundle(tmp_path / "bundle", architecture, config, model)
    feeds = batch([9, 9, 4])
    feeds.pop("token_type_ids")
    session: Any = open_session(bundle, engine="torch", options=SessionOptions(threads=1)).session
    outputs = session.run_many([feeds])[0]["last_hidden_state"]
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state.numpy()
    real = feeds["attention_mask"].astype(bool)  # what padding attends to differs between attention implementations
    assert np.abs(outputs - expected)[real].max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(InputError, match="takes no pixels"):
        session.run({**feeds, "pixels": feeds["input_ids"]})
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(feeds)


def write_reference_bundle(out: Path, architecture: str, config: dict[str, Any], model: Any) -> Bundle:
    arch = dataclasses.replace(bundle_samples.ARCH, family=config["model_type"], architecture=architecture)
    with BundleWriter(out) as writer:
        (writer.path / "config.json").write_text(json.dumps(config))
        parameters, offset = {}, 0
        with (writer.path / "fp32.weights").open("wb") as stream:
            for name, value in model.state_dict().items():
                array = value.numpy()
                parameters[name] = ParameterEntry("fp32.weights", offset, array.shape, str(array.dtype))
                offset += stream.write(array.tobytes())
        variants = {"fp32": Variant("float32", ("fp32.weights",), {})}
        manifest = dataclasses.replace(bundle_samples.manifest(), arch=arch, variants=variants, parameters=parameters)
        return writer.commit(manifest)
