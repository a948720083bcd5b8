"""The proof: green for what the lowering makes, and every known silent drop of the parser caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from accel.builder.network import NetworkView
from accel.builder.parse import ParsedNetwork, parse
from accel.builder.proof import Proof, check, prove
from accel.builder.proof_table import ProofTable
from accel.builder.repair import repair
from accel.builder.source import GraphSource
from accel.engines.tensorrt.adapter import load_flavour
from accel.errors import EngineBuildError, EngineProofError
from accel.schema import from_dict, to_dict
from accel.spec import ArchSpec
from tests.builder import graphs

pytest.importorskip("tensorrt_rtx")
ATTENTION = "layers.0.attention"


def parsed(proto: Any, folder: Path) -> ParsedNetwork:
    decoder = any(value.name == "write_index" for value in proto.graph.input)
    return parse(load_flavour("rtx"), GraphSource(graphs.save(proto, folder), 64 if decoder else None))


def proven(proto: Any, arch: ArchSpec, folder: Path, dtype: str | None = None) -> ProofTable:
    made = parsed(proto, folder)
    view = NetworkView(made.flavour, made.network)
    return prove(Proof(view, made.source, arch, dtype), repair(view))


def failed(table: ProofTable) -> set[str]:
    return {row.check for row in table.failures}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_decoder_is_proven(tmp_path: Path, dtype: str) -> None:
    table = proven(graphs.decoder(dtype, (None, 8, None)), graphs.arch((None, 8, None)), tmp_path, dtype)
    assert table.ok, table.text()
    check(table)
    products = [text for text in table.repairs if "bypassed" in text]
    assert len(products) == 6  # query and key of three layers
    assert sum("decomposable" in text for text in table.repairs) == (3 if dtype == "float32" else 0)
    checks = {(row.layer, row.check) for row in table.rows}
    for layer in range(3):
        assert {(layer, "scale"), (layer, "mask"), (layer, "causality"), (layer, "key attended")} <= checks


@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_encoder_is_proven(tmp_path: Path, dtype: str, float_mask: bool) -> None:
    arch = graphs.arch((None, None), "encoder")
    assert proven(graphs.encoder(dtype, 2, float_mask), arch, tmp_path, dtype).ok


def test_repair_reaches_past_the_products(tmp_path: Path) -> None:
    made = parsed(graphs.decoder(), tmp_path)
    view = NetworkView(made.flavour, made.network)
    (inlet,) = view.of_type("ATTENTION_INPUT")
    before = [view.producer(inlet.get_input(place)).type.name for place in range(3)]
    assert before == ["ELEMENTWISE", "ELEMENTWISE", "KV_CACHE_UPDATE"]  # the whole cache would be multiplied
    repair(view)
    assert [inlet.get_input(place).name for place in range(3)] == [
        "layers.0.scaled",
        "present.0.key",
        "present.0.value",
    ]
    assert repair(view) == []  # nothing is left to do


def test_without_its_repair_a_network_fails(tmp_path: Path) -> None:
    made = parsed(graphs.decoder(), tmp_path)
    table = prove(Proof(NetworkView(made.flavour, made.network), made.source, graphs.arch()), [])
    assert {"query", "key", "key attended", "scale"} <= failed(table)


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda node: node.attribute.append(helper.make_attribute(name, value))


def without(name: str) -> Callable[[Any], None]:
    def edit(node: Any) -> None:
        kept = [item for item in node.attribute if item.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)

    return edit


def test_dropped_lengths_are_caught(tmp_path: Path) -> None:
    """Attention-24's nonpad_kv_seqlen: parses, and the input is dropped."""
    proto = graphs.change(graphs.decoder(), ATTENTION, lambda node: node.input.extend(["", "", "lengths"]))
    proto.graph.input.append(graphs.value("lengths", TensorProto.INT64, "B"))
    table = proven(proto, graphs.arch(), tmp_path)
    assert failed(table) == {"attention node", "input consumed"}
    with pytest.raises(EngineProofError, match=r"input 6 = lengths \(2 rows.*at node layers\.0\.attention, layer 0"):
        check(table)


def test_unused_input_of_any_name_is_caught(tmp_path: Path) -> None:
    proto = graphs.encoder()
    proto.graph.input.append(graphs.value("token_type_ids", TensorProto.INT64, "B", "S"))
    table = proven(proto, graphs.arch(kind="encoder"), tmp_path)
    with pytest.raises(EngineProofError, match=r"input consumed should be yes, and is no.*token_type_ids"):
        check(table)


def test_causality_from_the_upper_left_is_caught(tmp_path: Path) -> None:
    """is_causal with a cache: a decode step would see the first slot alone."""
    table = proven(graphs.decoder(causal=True), graphs.arch(), tmp_path)
    assert {"attention node", "mask", "causality"} <= failed(table)
    (row,) = (row for row in table.failures if row.check == "causality")
    assert (row.expected, row.found, row.layer) == ("none", "upper-left", 0)


def test_a_decoder_without_any_mask_is_caught(tmp_path: Path) -> None:
    proto = graphs.change(graphs.decoder(), ATTENTION, lambda node: node.input.pop())
    assert "mask" in failed(proven(proto, graphs.arch(), tmp_path))


def test_a_mask_that_ignores_positions_is_caught(tmp_path: Path) -> None:
    def edit(node: Any) -> None:
        node.input[1] = "counted"

    proto = graphs.change(graphs.decoder(), "seen", edit)
    spot = next(i for i, node in enumerate(proto.graph.node) if node.name == "seen")
    proto.graph.node.insert(spot, helper.make_node("Unsqueeze", ["write_index", "axes.1.2.3"], ["counted"], "counted"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes.1.2.3"))
    assert "mask made from" in failed(proven(proto, graphs.arch(), tmp_path))


@pytest.mark.parametrize(("name", "value"), [("is_causal", 1), ("scale", 0.5)])
def test_what_trt_attention_ignores_is_caught(tmp_path: Path, name: str, value: Any) -> None:
    def edit(node: Any) -> None:
        node.op_type = "TRT_Attention"
        without(name)(node)
        attribute(name, value)(node)

    table = proven(graphs.change(graphs.decoder(), ATTENTION, edit), graphs.arch(), tmp_path)
    assert "attention node" in failed(table)
    with pytest.raises(EngineProofError, match=f"TRT_Attention.*{name} = {value}"):
        check(table)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_attention_that_scales_the_cache_is_refused(tmp_path: Path, dtype: str) -> None:
    """Another scale than 1 would multiply the whole key cache at every step."""
    proto = graphs.change(graphs.decoder(dtype), ATTENTION, without("scale"))
    graphs.change(proto, ATTENTION, attribute("scale", 0.5))
    with pytest.raises(EngineProofError, match=r"multiplies the query by \[0\.7.*layers\.0\.attention, query"):
        proven(proto, graphs.arch(), tmp_path)


def test_attention_with_the_default_scale_is_caught(tmp_path: Path) -> None:
    """The parser computes 1 / sqrt(D) in the network, and multiplies the cache by its root too."""
    table = proven(graphs.change(graphs.decoder(), ATTENTION, without("scale")), graphs.arch(), tmp_path)
    assert {"attention node", "query", "key", "key attended"} <= failed(table)


def test_a_scale_that_is_not_the_models_is_caught(tmp_path: Path) -> None:
    table = proven(graphs.decoder(scale=0.25), graphs.arch(), tmp_path)
    assert failed(table) == {"scale of the model"}


def test_a_layer_without_its_scale_is_caught(tmp_path: Path) -> None:
    def edit(node: Any) -> None:
        node.input[0] = "layers.0.q.rotated"

    table = proven(graphs.change(graphs.decoder(), ATTENTION, edit), graphs.arch(), tmp_path)
    assert "scale" in failed(table)


def test_wrong_type_is_caught(tmp_path: Path) -> None:
    table = proven(graphs.decoder("bfloat16"), graphs.arch(), tmp_path, "float16")
    assert "query, key, value dtype" in failed(table)


def test_a_norm_in_half_precision_is_caught(tmp_path: Path) -> None:
    proto = graphs.decoder()
    name = "layers.0.input_norm"
    graphs.change(proto, f"{name}.wide", lambda node: setattr(node.attribute[0], "i", TensorProto.FLOAT16))
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name == f"{name}.weight")
    weight.CopyFrom(numpy_helper.from_array(np.ones(graphs.HIDDEN, np.float16), weight.name))
    table = proven(proto, graphs.arch(), tmp_path)
    assert "dtype" in failed(table)
    with pytest.raises(EngineProofError, match=r"dtype should be float32, and is float16.*layer 0.*Cast"):
        check(table)


def test_a_product_left_in_float32_is_caught(tmp_path: Path) -> None:
    """It parses, builds and is exact; it only holds its weight at twice the size."""
    proto = graphs.decoder()
    place, node = next((i, n) for i, n in enumerate(proto.graph.node) if n.name == "layers.0.o")
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), weight.name))
    wide = helper.make_node("Cast", [node.input[0]], ["wide"], "wide", to=TensorProto.FLOAT)
    narrow = helper.make_node("Cast", ["product"], [node.output[0]], "narrowed", to=TensorProto.FLOAT16)
    node.input[0], node.output[0] = "wide", "product"
    proto.graph.node.insert(place, wide)
    proto.graph.node.insert(place + 2, narrow)
    table = proven(proto, graphs.arch(), tmp_path, "float16")
    assert failed(table) == {"product dtype"}
    with pytest.raises(EngineProofError, match=r"should be float16, and is float32.*layers\.0\.o, layer 0.*Cast"):
        check(table)


def test_logits_in_half_precision_are_caught(tmp_path: Path) -> None:
    proto = graphs.change(graphs.decoder(), "logits", lambda node: setattr(node.attribute[0], "i", TensorProto.FLOAT16))
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert failed(proven(proto, graphs.arch(), tmp_path)) == {"logits dtype"}


def test_a_missing_layer_is_caught(tmp_path: Path) -> None:
    table = proven(graphs.decoder(windows=(None,)), graphs.arch((None, None)), tmp_path)
    with pytest.raises(EngineProofError, match=r"1 fused, and is 0 fused.*layers\.1\.attention, layer 1"):
        check(table)


def test_caches_that_change_places_are_caught(tmp_path: Path) -> None:
    proto = graphs.decoder(windows=(None, None))
    for here, there in ((0, 1), (1, 0)):
        graphs.change(proto, f"layers.{here}.key_update", lambda n, i=there: n.input.__setitem__(0, f"past.{i}.key"))
    assert failed(proven(proto, graphs.arch((None, None)), tmp_path)) == {"key cache"}


def test_attention_inside_if_is_named(tmp_path: Path) -> None:
    proto = graphs.encoder()
    spot, node = next((i, n) for i, n in enumerate(proto.graph.node) if n.name == ATTENTION)
    inner = helper.make_node("Attention", list(node.input), ["inner"], name="inner_attention", scale=1.0)
    shape = ["B", graphs.HEADS, "S", graphs.HEAD_DIM]
    then = helper.make_graph([inner], "then", [], [graphs.value("inner", TensorProto.FLOAT16, *shape)])
    other = helper.make_node("Identity", [node.input[0]], ["same"], name="same")
    orelse = helper.make_graph([other], "else", [], [graphs.value("same", TensorProto.FLOAT16, *shape)])
    proto.graph.node.remove(node)
    made = helper.make_node("If", ["long"], list(node.output), name=ATTENTION, then_branch=then, else_branch=orelse)
    proto.graph.node.insert(spot, made)
    proto.graph.input.append(graphs.value("long", TensorProto.BOOL))
    table = proven(proto, graphs.arch(kind="encoder"), tmp_path)
    assert {"attention", "attention node", "subgraphs"} <= failed(table)
    with pytest.raises(EngineProofError, match=r"attention should be 1 fused.*layers\.0\.attention, layer 0"):
        check(table)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (ATTENTION, attribute("softcap", 30.0), "softcap.*node layers.0.attention, layer 0"),
        (ATTENTION, attribute("is_causal", 1), "mask cannot be used together.*layer 0"),
        (ATTENTION, lambda node: node.output.extend(["p.key", "p.value"]), "one output.*layer 0"),
        (ATTENTION, lambda node: node.input.extend(["past.0.key", "past.0.value"]), "past_key.*layer 0"),
        (ATTENTION, attribute("softmax_precision", TensorProto.FLOAT), "softmax precision.*layer 0"),
        ("layers.0.key_update", attribute("mode", "circular"), "TensorScatter.*layers.0.key_update, layer 0"),
    ],
    ids=["softcap", "causal and mask", "presents", "pasts", "softmax precision", "circular cache"],
)
def test_what_the_parser_refuses_is_named(tmp_path: Path, name: str, edit: Callable[[Any], None], message: str) -> None:
    if name.endswith("update"):
        graphs.change(proto := graphs.decoder(), name, without("mode"))
    else:
        proto = graphs.decoder()
    with pytest.raises(EngineBuildError, match=message):
        proven(graphs.change(proto, name, edit), graphs.arch(), tmp_path)


def foreign(op: str, inputs: int, **attributes: Any) -> Any:
    """An encoder whose second layer has an operator of ONNX Runtime's own."""
    proto = graphs.encoder(layers=2)
    node = next(node for node in proto.graph.node if node.name == "layers.1.gelu")
    made = helper.make_node(op, [node.input[0]] * inputs, list(node.output), node.name, domain="com.microsoft")
    made.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    node.CopyFrom(made)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "said_to_be_supported"),
    [
        ("GroupQueryAttention", 7, {"num_heads": 2, "kv_num_heads": 2}, True),
        ("MatMulNBits", 3, {"K": 128, "N": 128, "bits": 4, "block_size": 32}, True),
        ("FastGelu", 1, {}, False),
    ],
)
def test_operators_that_tensorrt_lacks(
    tmp_path: Path, op: str, inputs: int, attributes: dict[str, Any], said_to_be_supported: bool
) -> None:
    flavour = load_flavour("rtx")
    made = parsed(graphs.encoder(), tmp_path)
    assert made.parser.supports_operator(op) == said_to_be_supported  # why nobody asks it
    source = GraphSource(graphs.save(foreign(op, inputs, **attributes), tmp_path))
    with pytest.raises(EngineBuildError, match=rf"operator {op}: .*node layers\.1\.gelu, layer 1.*ort-cpu"):
        parse(flavour, source)


def test_table_is_data_and_text(tmp_path: Path) -> None:
    table = proven(graphs.decoder(windows=(None, None)), graphs.arch((None, None)), tmp_path)
    assert from_dict(ProofTable, json.loads(json.dumps(to_dict(table))), "proof") == table
    lines = table.text().splitlines()
    assert any(line.split()[:2] == ["0-1", "key"] and "present.*.key" in line for line in lines)
    assert all(line.endswith("ok") for line in lines[1:])
