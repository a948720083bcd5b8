"""The proof can fail: one mutation for each thing that it compares, in the network, and in the graph before parsing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from accel.builder.network import NetworkView
from accel.builder.parse import parse
from accel.builder.proof import Proof, check, prove
from accel.builder.proof_table import ProofTable
from accel.builder.repair import repair
from accel.builder.source import GraphSource
from accel.engines.tensorrt.adapter import load_flavour
from accel.errors import EngineProofError
from accel.spec import ArchSpec
from tests.builder import graphs

trt = pytest.importorskip("tensorrt_rtx")
WINDOWS, SOFTCAP = (None, 8), 20.0
Edit = Callable[[NetworkView], None]
GraphEdit = Callable[[Any], Any]


def split() -> Any:
    """The encoder with its input in two halves that are added."""
    proto = graphs.change(graphs.encoder(), "layers.0.norm", lambda node: node.input.__setitem__(0, "halved"))
    spot = next(i for i, node in enumerate(proto.graph.node) if node.name == "layers.0.norm")
    halves = ["layers.0.half", "layers.0.other"]
    made = [
        helper.make_node("Concat", ["layers.0.wide"] * 2, ["layers.0.double"], "layers.0.double", axis=-1),
        helper.make_node("Split", ["layers.0.double"], halves, "layers.0.halves", axis=-1, num_outputs=2),
        helper.make_node("Add", halves, ["halved"], "halved"),
    ]
    for node in reversed(made):
        proto.graph.node.insert(spot, node)
    return proto


MODELS: dict[str, Callable[[], Any]] = {
    "split": split,
    "decoder": lambda: graphs.decoder(windows=WINDOWS),
    "capped": lambda: graphs.decoder(windows=WINDOWS, softcap=SOFTCAP),
    "square": lambda: graphs.decoder(windows=WINDOWS, hidden=graphs.HEADS * graphs.HEAD_DIM),
    "encoder": graphs.encoder,
    "biased": lambda: graphs.encoder(float_mask=True),
}


def arch_of(model: str) -> ArchSpec:
    if model in ("encoder", "biased", "split"):
        return graphs.arch(kind="encoder")
    arch = graphs.arch(WINDOWS)
    cap = SOFTCAP if model == "capped" else None
    return replace(arch, layers=tuple(replace(layer, softcap=cap) for layer in arch.layers))


def proven(
    model: str, folder: Path, edit: Edit | None = None, proto: Any = None, canonical: Path | None = None
) -> ProofTable:
    arch = arch_of(model)
    path = graphs.save(MODELS[model]() if proto is None else proto, folder)
    made = parse(load_flavour("rtx"), GraphSource(path, 64 if arch.kind == "decoder" else None))
    repairs = repair(NetworkView(made.flavour, made.network))
    if edit is not None:
        edit(NetworkView(made.flavour, made.network))
    return prove(Proof(NetworkView(made.flavour, made.network), made.source, arch, None, canonical), repairs)


@pytest.mark.parametrize("model", MODELS)
def test_unchanged_network_is_proven(tmp_path: Path, model: str) -> None:
    table = proven(model, tmp_path)
    assert table.ok, table.text()
    (row,) = (row for row in table.rows if row.check == "operators proven by presence alone")
    assert row.found == "none"
    assert sum(row.check == "visible keys" for row in table.rows) == len(arch_of(model).layers)


def only(view: NetworkView, node: str, kind: str, place: int = 0) -> Any:
    """One of the layers that a node became."""
    return [layer for layer in view.of_node(node) if layer.type.name == kind][place]


def put(node: str, kind: str, attribute: str, value: Any, place: int = 0) -> Edit:
    def edit(view: NetworkView) -> None:
        layer = only(view, node, kind, place)
        if kind == "ACTIVATION":
            layer.__class__ = trt.IActivationLayer
        setattr(layer, attribute, value)

    return edit


def feed(node: str, kind: str, operand: int, tensor: str) -> Edit:
    return lambda view: only(view, node, kind).set_input(operand, view.tensor(tensor))


def show_all(view: NetworkView) -> None:
    """The second layer's attention gets the mask without the window."""
    view.of_type("ATTENTION_INPUT")[1].attention.mask = view.tensor("seen")


def smaller_epsilon(view: NetworkView) -> None:
    """Another constant in the sum of a norm."""
    layer = view.producer(view.origin(only(view, "layers.0.input_norm.norm", "ELEMENTWISE", 1).get_input(1)))
    layer.weights = trt.Weights(np.full((1, 1, 1), 1e-7, np.float32))


def swap(node: str) -> Edit:
    def edit(view: NetworkView) -> None:
        layer = only(view, node, "ELEMENTWISE")
        first, second = layer.get_input(0), layer.get_input(1)
        layer.set_input(0, second)
        layer.set_input(1, first)

    return edit


OPS, UNARY, MATRIX = trt.ElementWiseOperation, trt.UnaryOperation, trt.MatrixOperation
RMS, NORM = "layers.0.input_norm.norm", "layers.0.norm"
NETWORK: dict[str, tuple[str, Edit, str]] = {
    "no window": ("decoder", show_all, "mask"),
    "sum -> difference": ("decoder", put("layers.0.residual", "ELEMENTWISE", "op", OPS.SUB), "Add layers"),
    "product -> quotient": ("decoder", put("layers.0.mixed", "ELEMENTWISE", "op", OPS.DIV), "Mul layers"),
    "and -> or": ("decoder", put("mask.8", "ELEMENTWISE", "op", OPS.OR), "And layers"),
    "later -> earlier": ("decoder", put("near.8", "ELEMENTWISE", "op", OPS.LESS), "Greater layers"),
    "up to -> before": ("decoder", put("seen", "ELEMENTWISE", "op", OPS.AND, 2), "LessOrEqual layers"),
    "operands swapped": ("decoder", swap("edge.8"), "Sub layers"),
    "interleaved": ("decoder", put("layers.0.q.rotated", "ROTARY_EMBEDDING", "interleaved", True), "RotaryEmbedding"),
    "no rotation of the key": ("decoder", feed("layers.0.key_update", "KV_CACHE_UPDATE", 1, "layers.0.k"), "Tensor"),
    "epsilon": ("encoder", put(NORM, "NORMALIZATION", "epsilon", 1e-3), "LayerNormalization layers"),
    "normalized axes": ("encoder", put(NORM, "NORMALIZATION", "axes", 2), "LayerNormalization layers"),
    "epsilon in a sum": ("decoder", smaller_epsilon, "RMSNormalization layers"),
    "axes of a mean": ("decoder", put(RMS, "REDUCE", "axes", 2), "RMSNormalization layers"),
    "mean -> sum": ("decoder", put(RMS, "REDUCE", "op", trt.ReduceOperation.SUM), "RMSNormalization layers"),
    "root -> size": ("decoder", put(RMS, "UNARY", "op", UNARY.ABS), "RMSNormalization layers"),
    "transposed": ("square", put("layers.0.o", "MATRIX_MULTIPLY", "op1", MATRIX.TRANSPOSE), "MatMul layers"),
    "other weight": ("decoder", feed("layers.0.up", "MATRIX_MULTIPLY", 0, "layers.0.residual"), "MatMul layers"),
    "swish": ("decoder", put("layers.0.swish", "ACTIVATION", "type", trt.ActivationType.RELU), "Swish layers"),
    "gelu": ("encoder", put("layers.0.gelu", "ACTIVATION", "type", trt.ActivationType.GELU_TANH), "Gelu layers"),
    "tanh": ("capped", put("layers.0.tanh", "ACTIVATION", "type", trt.ActivationType.SIGMOID), "Tanh layers"),
    "softmax axis": ("capped", put("layers.1.softmax", "SOFTMAX", "axes", 8), "Softmax layers"),
    "hidden -> visible": ("capped", feed("layers.0.masked", "SELECT", 2, "layers.0.capped"), "Where layers"),
    "slice start": ("split", put("layers.0.halves", "SLICE", "start", (0, 0, graphs.HIDDEN), 0), "Split layers"),
    "gather axis": ("decoder", put("picked", "GATHER", "axis", 1), "Gather layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORK)
def test_mutated_network_is_refused(tmp_path: Path, name: str) -> None:
    model, edit, row = NETWORK[name]
    table = proven(model, tmp_path, edit)
    assert any(failed.check.startswith(row) for failed in table.failures), table.text()
    with pytest.raises(EngineProofError, match="The network is not the graph"):
        check(table)


@pytest.mark.parametrize(
    "edit",
    [
        put("layers.0.o", "MATRIX_MULTIPLY", "op1", MATRIX.TRANSPOSE),
        put("layers.1.k.rotated", "ROTARY_EMBEDDING", "rotary_embedding_dim", 16),
        put("layers.0.rows", "SHUFFLE", "first_transpose", trt.Permutation([0, 1, 2, 3])),
    ],
    ids=["transposed", "half a rotation", "order of axes"],
)
def test_network_whose_shapes_break_is_refused(tmp_path: Path, edit: Edit) -> None:
    with pytest.raises(EngineProofError, match="shapes before .* do not fit together"):
        check(proven("decoder", tmp_path, edit))


def node(name: str, edit: Callable[[Any], None]) -> GraphEdit:
    return lambda proto: graphs.change(proto, name, edit)


def operator(name: str, op: str) -> GraphEdit:
    return node(name, lambda found: setattr(found, "op_type", op))


def become(name: str, op: str) -> GraphEdit:
    """Another operator, without the attributes of the old one."""

    def edit(found: Any) -> None:
        found.op_type = op
        found.ClearField("attribute")

    return node(name, edit)


def operand(name: str, place: int, value: str) -> GraphEdit:
    return node(name, lambda found: found.input.__setitem__(place, value))


def attribute(name: str, key: str, value: Any) -> GraphEdit:
    def edit(found: Any) -> None:
        kept = [item for item in found.attribute if item.name != key]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(key, value)])

    return node(name, edit)


def number(name: str, value: float) -> GraphEdit:
    def edit(proto: Any) -> Any:
        (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
        old = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.full(old.shape, value, old.dtype), name))
        return proto

    return edit


def padding_seen(proto: Any) -> Any:
    """Everything is visible: the mask is made from attention_mask and ignores it."""
    become("mask", "GreaterOrEqual")(proto)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "nothing"))
    return graphs.change(proto, "mask", lambda found: found.input.append("nothing"))


GRAPH: dict[str, tuple[str, GraphEdit, str]] = {
    "no window": ("decoder", operand("layers.1.attention", 3, "seen"), r"position 8 sees 0"),
    "window on the other layer": ("decoder", operand("layers.0.attention", 3, "mask.8"), "position 8 does not see 0"),
    "window of one less": ("decoder", number("window.8", 7), "position 7 does not see 0"),
    "window of one more": ("decoder", number("window.8", 9), "position 8 sees 0"),
    "and -> or": ("decoder", operator("mask.8", "Or"), "sees"),
    "before itself": ("decoder", operator("seen", "Less"), "position 0 does not see 0"),
    "later slots": ("decoder", operator("seen", "GreaterOrEqual"), "sees"),
    "no window, capped": ("capped", operand("layers.1.mask", 0, "seen"), "position 8 sees 0"),
    "padding": ("encoder", padding_seen, "sees"),
    "padding beside a bias": ("biased", padding_seen, "sees"),
    "hidden scores": ("biased", number("bias.low", -1.0), "not hidden"),
    "softcap": ("capped", number("layers.0.softcap.value", 30.0), "softcap should be 20, and is 30"),
    "softcap of another type": ("capped", operator("layers.1.tanh", "Sigmoid"), "softcap chain"),
    "scale, capped": ("capped", number("layers.1.scale.value", 0.25), "scale of the model should be 0.17"),
    "query without its scale": ("capped", operand("layers.0.grouped", 0, "layers.0.q.rotated"), "scaled query"),
}


@pytest.mark.parametrize("name", GRAPH)
def test_mutated_graph_is_refused_by_the_architecture(tmp_path: Path, name: str) -> None:
    model, edit, message = GRAPH[name]
    table = proven(model, tmp_path, proto=edit(MODELS[model]()))
    with pytest.raises(EngineProofError, match=message):
        check(table)


def test_heads_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    source = GraphSource(graphs.save(MODELS["decoder"](), tmp_path), 64)
    made = parse(load_flavour("rtx"), source)
    view = NetworkView(made.flavour, made.network)
    arch = arch_of("decoder")
    wrong = replace(arch, layers=tuple(replace(layer, heads=8) for layer in arch.layers))
    assert {row.check for row in prove(Proof(view, source, wrong), repair(view)).failures} == {"heads and their size"}


def product_by_elements(proto: Any) -> Any:
    """The output projection multiplies element by element."""
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == "layers.0.o.weight")
    tensor.CopyFrom(numpy_helper.from_array(np.ones(graphs.HEADS * graphs.HEAD_DIM, np.float16), tensor.name))
    cut = helper.make_node("Slice", ["layers.0.product", "cut.0", "cut.64", "cut.2"], ["layers.0.o"], "layers.0.cut")
    for name, value in (("cut.0", 0), ("cut.64", graphs.HIDDEN), ("cut.2", 2)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    place, made = next((i, n) for i, n in enumerate(proto.graph.node) if n.name == "layers.0.o")
    made.op_type, made.output[0] = "Mul", "layers.0.product"
    proto.graph.node.insert(place + 1, cut)
    return proto


TRACED: dict[str, tuple[str, GraphEdit, str]] = {
    "interleaved": ("decoder", attribute("layers.0.q.rotated", "interleaved", 1), "RotaryEmbedding interleaved"),
    "rotated width": ("decoder", attribute("layers.0.k.rotated", "rotary_embedding_dim", 32), "RotaryEmbedding"),
    "epsilon": ("decoder", attribute("layers.1.post_norm.norm", "epsilon", 1e-3), "RMSNormalization axis -1 epsilon"),
    "layer norm's epsilon": ("encoder", attribute("layers.0.norm", "epsilon", 1e-3), "LayerNormalization axis -1"),
    "gelu": ("encoder", attribute("layers.0.gelu", "approximate", "tanh"), "Gelu approximate"),
    "activation": ("decoder", operator("layers.0.swish", "Sigmoid"), "Sigmoid"),
    "sum -> difference": ("decoder", operator("layers.0.residual", "Sub"), "sums, as traced"),
    "no product": ("decoder", product_by_elements, "products with weights"),
}


@pytest.mark.parametrize("name", TRACED)
def test_mutated_graph_is_refused_by_the_trace(tmp_path: Path, name: str) -> None:
    """What the architecture does not hold: the canonical graph is the witness."""
    model, edit, message = TRACED[name]
    canonical = tmp_path / "canonical.onnx"
    onnx.save(MODELS[model](), canonical)
    assert proven(model, tmp_path, canonical=canonical).ok
    assert proven(model, tmp_path, proto=edit(MODELS[model]())).ok  # nobody else knows
    table = proven(model, tmp_path, proto=edit(MODELS[model]()), canonical=canonical)
    with pytest.raises(EngineProofError, match=message):
        check(table)


def test_an_operator_without_a_program_is_named(tmp_path: Path) -> None:
    proto = graphs.encoder()
    table = proven("encoder", tmp_path, proto=become("layers.0.gelu", "Elu")(proto))
    (row,) = (row for row in table.rows if row.check == "operators proven by presence alone")
    assert table.ok and row.found == "Elu"
