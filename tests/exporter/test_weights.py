from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from accel.errors import ExportError
from accel.exporter.weights import Parameters, collect_parameters, name_initializers, write_weights
from accel.spec import PARTS
from tests.exporter.models import make_decoder


def initializer(
    name: str, shape: tuple[int, ...], data: np.ndarray | None = None, parts: str | None = None
) -> ir.Value:
    tensor = None if data is None else ir.tensor(data, name=name)
    dtype = ir.DataType.FLOAT
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    if parts:
        value.metadata_props[PARTS] = parts
    return value


def graph_of(*values: ir.Value) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    for value in values:
        if value.const_value is None:
            value.const_value = ir.LazyTensor(
                lambda: pytest.fail("read a parameter through the graph"),
                dtype=ir.DataType.FLOAT, shape=value.shape, name=value.name,
            )  # fmt: skip
        graph.register_initializer(value)
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (4, 6), "x": (3,), "k": (2, 6), "v": (2, 6), "big": (1 << 9, 1 << 9), "tail": (5,)}
    return Parameters(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, {"head": "big"}
    )


def read(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.fromfile(path, np.float32, int(np.prod(shape)), offset=offset).reshape(shape)


def test_every_parameter_lies_where_the_manifest_says(tmp_path: Path, parameters: Parameters) -> None:
    path = tmp_path / "fp32.weights"
    written = write_weights(path, [], parameters)
    assert written.size == path.stat().st_size
    assert written.tied == {"head": "big"}
    assert list(written.parameters) == list(parameters.tensors)
    for name, entry in written.parameters.items():
        assert entry.dtype == "float32"
        np.testing.assert_array_equal(read(path, entry.offset, entry.shape), parameters.tensors[name].numpy())
        assert entry.offset % (4096 if name == "big" else 64) == 0


def test_merged_parameters_lie_side_by_side(tmp_path: Path, parameters: Parameters) -> None:
    model = graph_of(initializer("qkv", (8, 6), parts="q\nk\nv"), initializer("k", (2, 6)), initializer("x", (3,)))
    path = tmp_path / "fp32.weights"
    written = write_weights(path, [model], parameters)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    expected = torch.cat([parameters.tensors[name] for name in "qkv"]).numpy()
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors.values())
    np.testing.assert_array_equal(tensors["qkv"].numpy(), expected)
    np.testing.assert_array_equal(tensors["k"].numpy(), parameters.tensors["k"].numpy())
    assert written.parameters["k"].offset == written.parameters["q"].offset + 4 * 6 * 4


def test_constants(tmp_path: Path, parameters: Parameters) -> None:
    table, small = np.arange(512, dtype=np.float32), np.arange(4, dtype=np.float32)
    first = graph_of(initializer("table", (512,), table), initializer("small", (4,), small))
    second = graph_of(initializer("table", (512,), table.copy()))
    written = write_weights(tmp_path / "w", [first, second], parameters)
    inline = first.graph.initializers["small"].const_value
    assert isinstance(inline, ir.Tensor)
    for model in (first, second):
        tensor = model.graph.initializers["table"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        np.testing.assert_array_equal(tensor.numpy(), table)
    assert written.size == tensor.offset + 2048  # type: ignore[operator]
    assert "table" not in written.parameters


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([initializer("qkv", (8, 6), parts="q\nnone")], "'none', which is no parameter"),
        ([initializer("a", (6, 6), parts="q\nk"), initializer("b", (4, 6), parts="k\nv")], "share 'k'"),
        ([initializer("bad", (7, 6), parts="q\nx")], "differ in width"),
        ([initializer("q", (6, 4))], r"weight is \(6, 4\), its parameter \(4, 6\)"),
    ],
)
def test_graphs_that_disagree(tmp_path: Path, parameters: Parameters, values: list[ir.Value], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        write_weights(tmp_path / "w", [graph_of(*values)], parameters)


def test_two_constants_of_one_name(tmp_path: Path, parameters: Parameters) -> None:
    models = [graph_of(initializer("t", (512,), np.full(512, value, np.float32))) for value in (0, 1)]
    with pytest.raises(ExportError, match="different constants"):
        write_weights(tmp_path / "w", models, parameters)


def test_progress_adds_up(tmp_path: Path, parameters: Parameters) -> None:
    seen: list[int] = []
    write_weights(tmp_path / "w", [], parameters, seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in parameters.tensors.values())


def test_tied_parameters_are_collected_once() -> None:
    model = make_decoder(tie_word_embeddings=True)
    found = collect_parameters(model)
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in found.tensors
    assert set(found.tensors) | set(found.tied) == set(model.state_dict())


def test_initializers_get_pytorch_names() -> None:
    parameters = Parameters({"model.embed.weight": torch.zeros(2, 2)}, {"lm_head.weight": "model.embed.weight"})
    model = graph_of(
        initializer("model.model.embed.weight", (2, 2)),
        initializer("model.lm_head.weight", (2, 2)),
        initializer("val_1", (1,), np.zeros(1, np.float32)),
    )
    name_initializers(model, parameters)
    assert sorted(model.graph.initializers) == ["model.embed.weight", "val_1"]
