"""Encoders compute real tokens alone, whatever stands beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from accel.engines.cuda import encoder as module
from accel.engines.cuda.buckets import power_of_two, token_bucket
from accel.engines.cuda.device import INTERPRETED, open_device
from accel.engines.cuda.encoder import CudaEncoderSession, per_token_outputs
from accel.engines.cuda.products import rows_of
from accel.engines.cuda.program import Program, load_program
from accel.engines.cuda.unpadded import plan_tokens
from accel.errors import EngineError
from tests.parity.families import build_model
from tests.parity.test_cuda_engine import graph_file

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compares with the interpreter; GPUs run the families' tests")


@pytest.fixture(scope="module")
def graphs(made_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Graph file and description of a family's tiny encoder."""
    import accel
    from tests.parity.families import ALL

    def bundle(name: str) -> Path:
        unchecked = {"parity": {"enabled": False}}
        make = lambda out: accel.export(build_model(name), out, unchecked, task=ALL[name].task)  # noqa: E731
        return made_once(f"unchecked-{name}", make)

    return lambda name: graph_file(name, bundle, tmp_path_factory.mktemp(name))


def batch(lengths: list[int], width: int, seed: int = 0) -> dict[str, np.ndarray]:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": np.random.default_rng(seed).integers(1, 90, mask.shape) * mask, "attention_mask": mask}


def count_rows(session: CudaEncoderSession, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Rows that products of each token had, as they come."""
    rows, products = set(), session._executor._products
    linear, parts = products.linear, products.parts
    monkeypatch.setattr(products, "linear", lambda x, *a, **k: (rows.add(rows_of(x)), linear(x, *a, **k))[1])
    monkeypatch.setattr(products, "parts", lambda x, *a: (rows.add(rows_of(x)), parts(x, *a))[1])
    return rows


@pytest.mark.parametrize("name", ["bert", "modernbert", "mpnet", "distilbert_answers"])
def test_real_tokens_alone_are_multiplied(name: str, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And results are those of each row alone, which has no padding."""
    path, arch = graphs(name)
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    lengths = [9, 1, 16, 0, 5]
    feeds, rows = batch(lengths, 16), count_rows(session, monkeypatch)
    found = session.run(feeds)
    assert rows == {32}, "31 tokens, of places for 8 x 16"
    for place, length in enumerate(lengths):
        alone = {key: value[place : place + 1, :length] for key, value in feeds.items()}
        for key, value in (session.run(alone) if length else {}).items():
            np.testing.assert_allclose(found[key][place, :length], value[0], rtol=2e-4, atol=2e-4)
    assert all((value[3] == 0).all() and (value[0, 9:] == 0).all() for value in found.values())
    session.close()


def test_what_pools_reads_padded_values(graphs: Any) -> None:
    path, arch = graphs("bert_pairs")
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    feeds = batch([9, 3, 16], 16)
    together = session.run(feeds)["logits"]
    session._plan = None
    np.testing.assert_allclose(together, session.run(feeds)["logits"], rtol=2e-4, atol=2e-4)
    session.close()


def test_a_place_forgets_the_last_batch(graphs: Any) -> None:
    """One recorded run serves batches of other lengths: what they leave over is no token of theirs."""
    path, arch = graphs("bert")
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    first, second = batch([16, 12, 2], 16), batch([3, 13, 10], 16, seed=1)
    expected = session.run(second)["last_hidden_state"]
    session.run(first)
    assert len(session._places) == 1
    four = batch([10, 6, 9, 3], 16, seed=2)
    session.run(four)
    np.testing.assert_array_equal(session.run(second)["last_hidden_state"], expected)
    session.close()


TOKENS = {
    "bert": {"last_hidden_state"},
    "bert_pairs": set(),
    "roberta_tokens": {"logits"},
    "distilbert_answers": {"start_logits", "end_logits"},
    "modernbert_mask": {"logits"},
}


@pytest.mark.parametrize("name", TOKENS)
def test_which_outputs_are_cut_to_the_rows_width(name: str, graphs: Any) -> None:
    path, _ = graphs(name)
    assert per_token_outputs(load_program(path, torch.device("cpu"), torch.float32)) == TOKENS[name]


def test_as_many_labels_as_a_row_has_places(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not cut to the row's tokens."""
    path, arch = graphs("bert_pairs")
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    feeds = batch([3, 2], 3)
    expected = session.run(feeds)["logits"]
    monkeypatch.setattr(module, "_LENGTHS", (5, 8))
    assert session._shape(2, 3, 5) == (2, 5, 8) and expected.shape == (2, 5)
    np.testing.assert_allclose(session.run(feeds)["logits"], expected, rtol=2e-4, atol=2e-4)
    session.close()


def test_full_rows_stay_as_they_are(graphs: Any) -> None:
    """Without padding nothing is moved, nor where products take as long with it."""
    path, arch = graphs("bert")
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    assert session._shape(8, 128, 8 * 128) == (8, 128, None)
    assert session._shape(8, 64, 8 * 64 - 40) == (8, 64, None)
    assert session._shape(1, 37, 37) == (1, 48, None)
    assert session._shape(33, 64, 33 * 64) == (64, 64, 2560)  # 2,112 tokens, of 4,096 places
    assert session._shape(4, 64, 100) == (4, 64, 128)
    assert session._shape(2, 8, 0) == (2, 8, 1)
    session.close()


def test_the_least_recently_used_goes(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, arch = graphs("bert")
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    monkeypatch.setattr(module, "_SHAPES", 2)
    for lengths in ([8], [8, 3], [8], [8, 8, 8]):
        session.run(batch(lengths, 8))
    assert [*session._places] == [(1, 8, None), (4, 8, None)]
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    session._device.pool = "that of both"
    session.run(batch([4] * 5, 8))
    assert [*session._places] == [(8, 8, 32)], "results take memory too"
    assert session._device.pool is None, "a pool that no recording is left in takes none"
    session.close()


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing\nFor debugging"),
    ],
    ids=["full", "disturbed"],
)
def test_memory_that_is_not_to_be_had_is_asked_for_twice(
    error: Exception, graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, arch = graphs("bert")
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    feeds = batch([8, 3], 8)
    expected = session.run(feeds)["last_hidden_state"]
    session.run(batch([8], 8))
    run, tried = session._executor.run, []

    def full(*args: Any) -> Any:
        tried.append(len(session._places))
        if len(tried) < 2:
            raise error
        return run(*args)

    monkeypatch.setattr(session._executor, "run", full)
    np.testing.assert_array_equal(session.run(feeds)["last_hidden_state"], expected)
    assert tried == [2, 1], "the other place went"

    def always(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(session._executor, "run", always)
    with pytest.raises(EngineError, match="memory is full|stream is capturing"):
        session.run(batch([8], 8))
    session.close()


def plan_of(edit: Callable[[Program], None], graphs: Any) -> Any:
    path, _ = graphs("bert")
    program = load_program(path, torch.device("cpu"), torch.float32)
    edit(program)
    return plan_tokens(program), program


def first(program: Program, op_type: str) -> ir.Node:
    return next(node for node in program.nodes if node.op_type == op_type)


def test_what_is_not_known_is_padded(graphs: Any) -> None:
    """A value whose shape nothing says, and a norm over rows: their readers get what they read as it was."""

    def no_shape(program: Program) -> None:
        first(program, "Attention").outputs[0].shape = None

    plan, program = plan_of(no_shape, graphs)
    attention = first(program, "Attention")
    assert attention.outputs[0] not in plan.values
    assert plan.moves[attention] == [attention.inputs[0]]

    def over_rows(program: Program) -> None:
        first(program, "LayerNormalization").attributes["axis"] = ir.AttrInt64("axis", 1)

    plan, program = plan_of(over_rows, graphs)
    assert first(program, "LayerNormalization").outputs[0] not in plan.values

    def over_tokens(program: Program) -> None:  # of a Slice: the last axis alone is each token's own
        norm = first(program, "LayerNormalization")
        cut = ir.Value(name="axes", const_value=ir.tensor([1]))
        slice_ = ir.Node("", "Slice", [norm.inputs[0], cut, cut, cut], name="cut")
        slice_.outputs[0].shape = norm.outputs[0].shape
        program.nodes.insert(program.nodes.index(norm), slice_)

    plan, program = plan_of(over_tokens, graphs)
    assert all(node.outputs[0] not in plan.values for node in program.nodes if node.name == "cut")

    def static_width(program: Program) -> None:
        add = [node for node in program.nodes if node.op_type == "Add"][1]
        add.inputs[1].shape = ir.Shape([1, 7, 64])

    plan, program = plan_of(static_width, graphs)
    assert [node for node in program.nodes if node.op_type == "Add"][1].outputs[0] not in plan.values

    def of_each_place(program: Program) -> None:
        [node for node in program.nodes if node.op_type == "Add"][1].inputs[1].shape = ir.Shape(["S", 64])

    plan, program = plan_of(of_each_place, graphs)
    assert [node for node in program.nodes if node.op_type == "Add"][1].outputs[0] not in plan.values

    def no_ids(program: Program) -> None:
        program.inputs[0].name = "inputs_embeds"

    assert plan_of(no_ids, graphs)[0] is None


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (3, 4), (129, 256), (257, 320), (513, 640), (641, 768), (8192, 8192)]
)
def test_sizes(count: int, size: int) -> None:
    assert token_bucket(count) == size
    assert power_of_two(count) >= size // 2


def test_no_size_wastes_a_quarter() -> None:
    assert all(count <= token_bucket(count) < 1.25 * count for count in range(257, 9000))
    assert all(token_bucket(token_bucket(count)) == token_bucket(count) for count in range(1, 9000))
