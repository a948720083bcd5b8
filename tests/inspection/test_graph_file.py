from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from accel.errors import BundleError
from accel.inspection.graph_file import read_graph
from tests.inspection import decoder_bundle as made


def branch(name: str, inputs: list[str]) -> Any:
    node = helper.make_node("MultiHeadAttention", inputs, [f"{name}.out"], name, domain="com.microsoft", num_heads=2)
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}.out", 1, None)])


def save(path: Path, nodes: list[Any]) -> Path:
    made.save_graph(path, nodes)
    return path


def test_a_branch_around_the_kernel(tmp_path: Path) -> None:
    choice = helper.make_node(
        "If", ["dense"], ["y"], "layers.0.attention",
        then_branch=branch("a", ["turned", "k", "v"]), else_branch=branch("b", ["turned", "k", "v", "", "mask"]),
    )  # fmt: skip
    turn = helper.make_node("RotaryEmbedding", ["q", "p", "c", "s"], ["turned"])
    found = read_graph(save(tmp_path / "g.onnx", [turn, choice]))
    node = found.attention["layers.0.attention"]
    assert (node.op, node.branch, node.packed_qkv) == ("com.microsoft::MultiHeadAttention", "If", False)
    assert node.rotary == "outside"
    assert (found.nodes.top, found.nodes.inner) == (2, 2)
    assert found.nodes.operators["com.microsoft::MultiHeadAttention"] == 2


def test_attention_that_is_written_out(tmp_path: Path) -> None:
    """As in a graph for TensorRT whose layers have softcaps: the second product carries the layer's name."""
    nodes = [
        helper.make_node("RotaryEmbedding", ["x", "c", "s", "p"], ["turned"]),
        helper.make_node("Mul", ["turned", "scale"], ["q"], "layers.0.scale"),
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Tanh", ["scores"], ["capped"]),
        helper.make_node("Where", ["mask", "capped", "hidden"], ["seen"]),
        helper.make_node("Softmax", ["seen"], ["weights"]),
        helper.make_node("MatMul", ["weights", "v"], ["y"], "layers.0.attention"),
        helper.make_node("MatMul", ["y", "v"], ["z"], "MatMul_7"),
    ]
    scale = helper.make_tensor("scale", 1, [], [0.25])
    graph = helper.make_graph(nodes, "g", [], [], [scale])
    (tmp_path / "g.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    found = read_graph(tmp_path / "g.onnx").attention
    node = found["layers.0.attention"]
    assert list(found) == ["layers.0.attention"]
    assert (node.op, node.rotary, node.packed_qkv) == ("MatMul", "outside", False)
    assert node.kernels == (("MatMul", {"scale": 0.25}),)


def test_the_rotation_in_a_graph_for_the_cuda_engine(tmp_path: Path) -> None:
    """Its node takes the tables as inputs and says nothing by an attribute; narrow caches have scales behind them."""
    common, scales = ["past.0.key", "past.0.value", "past_lengths", "query_lengths"], ["key_scales", "value_scales"]
    cases = (
        (["qkv", "", "", *common, "cos", "sin"], "inside"),
        (["qkv", "", "", *common, "cos", "sin", *scales], "inside"),
        (["qkv", "", "", *common, "", "", *scales], "none"),
        (["qkv", "", "", *common], "none"),
        (["turned", "k", "v", *common], "outside"),
    )
    turn = helper.make_node("RotaryEmbedding", ["q", "c", "s"], ["turned"])
    for number, (inputs, rotary) in enumerate(cases):
        node = helper.make_node("CachedAttention", inputs, ["y"], "layers.0.attention", domain="accel.kernels")
        found = read_graph(save(tmp_path / f"{number}.onnx", [turn, node])).attention["layers.0.attention"]
        assert (found.rotary, found.packed_qkv) == (rotary, not inputs[1])


def test_rotary_of_an_earlier_layer_does_not_count(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RotaryEmbedding", ["x"], ["turned"]),
        helper.make_node("MatMul", ["turned", "w"], ["q"]),
        made.gqa(0, ["q", "k", "v"]),
    ]
    assert read_graph(save(tmp_path / "g.onnx", nodes)).attention["layers.0.attention"].rotary == "none"


def test_cyclic_and_endless_graphs_end(tmp_path: Path) -> None:
    ring = [helper.make_node("Add", ["a", "a"], ["b"]), helper.make_node("Add", ["b", "b"], ["a"])]
    chain = [helper.make_node("Add", [f"n{i}", f"n{i}"], [f"n{i + 1}"]) for i in range(2000)]
    for name, nodes, start in (("ring", ring, "a"), ("chain", chain, "n2000")):
        found = read_graph(save(tmp_path / name, [*nodes, made.gqa(0, [start, "", ""])]))
        assert found.attention["layers.0.attention"].rotary == "none"


def test_what_lies_in_the_weight_file(tmp_path: Path) -> None:
    found = read_graph(save(tmp_path / "g.onnx", made.nodes()))
    stored = {tensor.name: tensor for tensor in found.stored}
    assert len(stored) == len(made.PARAMETERS) + 2 and "shape" not in stored
    merged = stored["layers.0.qkv.weight"]
    assert (merged.file, merged.offset, merged.size, merged.elements, merged.dtype) == (
        "fp32.weights", 1280, 2048, 512, "float32",
    )  # fmt: skip
    assert found.nodes.inline_bytes < 64


def test_external_data_that_makes_no_sense(tmp_path: Path) -> None:
    tensor = made.external("w", 0, (2,))
    tensor.external_data[1].value = "five"
    made.save_graph(tmp_path / "g.onnx", made.nodes(), (tensor,))
    with pytest.raises(BundleError, match="external data of 'w'"):
        read_graph(tmp_path / "g.onnx")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Cannot read"):
        read_graph(tmp_path / "none.onnx")
