"""Where ``accel.cpu::Attention`` is used: in variants that store integers, on nodes with neither window nor bias."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.lowering.ort_cpu import lower
from accel.scheme import parse_scheme
from accel.spec import AttentionSpec
from tests.graph.lowering.ort_cpu.own_operators import run_own, store_integers
from tests.graph.lowering.ort_cpu.test_encoder_attention import ARCH, LAYER, MASKS, initializer, model_of
from tests.graph.small import assert_close, count, normal, run

NEAR = 4e-2  # of the largest value: inputs of products are rounded to 8 bits, those of attention perhaps to bfloat16


def lowered_of(model: ir.Model, layer: AttentionSpec = LAYER, variant: str = "w8a8-dyn") -> ir.Model:
    arch = dataclasses.replace(ARCH, layers=(layer,))
    return lower(model, arch, arch.max_positions, scheme=parse_scheme(variant))[0]


def own(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == ("accel.cpu", "Attention")]


def check(model: ir.Model, lowered: ir.Model) -> None:
    for mask in MASKS.values():
        length = mask.shape[1]
        feeds = {"x": normal(2, length, 16) / 4, "attention_mask": mask, "table": normal(1, 2, length, length)}
        feeds["target"] = np.array([2, 2, length, length])
        (before,), (after,) = run(model, **feeds), run_own(lowered, **feeds)
        assert_close([after[mask == 1]], [before[mask == 1]], NEAR)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("variant", ["w8a8-dyn", "w8g32"])
def test_queries_keys_and_values_are_one_product(variant: str, biased: bool) -> None:
    model = model_of(LAYER, biased)
    store_integers(model, "wq", "wk", "wv")
    lowered = lowered_of(model, variant=variant)
    (node,) = own(lowered)
    assert node.name == "layers.0.attention" and count(lowered, "If") == 0
    assert [value is not None for value in node.inputs] == [True, False, False, True]
    assert node.attributes["num_heads"].as_int() == 2 and abs(node.attributes["scale"].as_float() - 0.4) < 1e-6
    product = node.inputs[0].producer()
    assert product is not None and product.op_type == "QuantizedMatMul" and product.attributes["N"].as_int() == 48
    assert count(lowered, "QuantizedMatMul") == 1 and count(lowered, "Add") == int(biased), "the values' bias, after it"
    if biased:
        bias = product.inputs[3].const_value.numpy()
        np.testing.assert_array_equal(bias, np.concatenate([normal(16, seed=0), np.zeros(32, np.float32)]))
    check(model, lowered)


def test_bias_of_the_values_goes_into_the_next_projection() -> None:
    model = model_of(LAYER)
    (relu,) = (node for node in model.graph if node.op_type == "Relu")
    weight, bias = (
        initializer(model.graph, name, normal(*shape, seed=7)) for name, shape in (("wo", (16, 16)), ("bo", (16,)))
    )
    linear = ir.node("Linear", [relu.inputs[0], weight, bias], {"transposed": 1}, domain="accel")
    linear.outputs[0].type, linear.outputs[0].shape = relu.inputs[0].type, relu.inputs[0].shape
    model.graph.insert_before(relu, linear)
    relu.replace_input_with(0, linear.outputs[0])
    store_integers(model, "wq", "wk", "wv", "wo")
    lowered = lowered_of(model)
    assert len(own(lowered)) == 1 and count(lowered, "Add") == 0
    assert "layers.0.carried.bias" in lowered.graph.initializers
    check(model, lowered)


@pytest.mark.parametrize("what", ["floats among them", "another number of bits"])
def test_weights_unlike_each_other_stay_three_products(what: str) -> None:
    model = model_of(LAYER)
    store_integers(model, "wq", "wk")
    if what == "another number of bits":
        store_integers(model, "wv", bits=4)
    lowered = lowered_of(model)
    (node,) = own(lowered)
    assert len([value for value in node.inputs if value is not None]) == 4
    assert count(lowered, "QuantizedMatMul") + count(lowered, "FusedMatMul") == 3
    check(model, lowered)


@pytest.mark.parametrize("variant", ["fp32", "fp32+kv8"])
def test_floats_keep_the_kernels_of_onnx_runtime(variant: str) -> None:
    lowered = lowered_of(model_of(LAYER), variant=variant)
    assert not own(lowered) and count(lowered, "If") == 1
    assert not any(node.domain == "accel.cpu" for node in lowered.graph)


@pytest.mark.parametrize("layer", [dataclasses.replace(LAYER, window=2), LAYER], ids=["window", "bias"])
def test_windows_and_biases_keep_them_too(layer: AttentionSpec) -> None:
    model = model_of(layer, scores="" if layer.window else "1")
    store_integers(model, "wq", "wk", "wv")
    lowered = lowered_of(model, layer)
    assert not own(lowered) and count(lowered, "If") == 1 and count(lowered, "QuantizedMatMul") == 3


def test_heads_too_large_keep_them() -> None:
    model = model_of(LAYER)
    store_integers(model, "wq", "wk", "wv")
    assert not own(lowered_of(model, dataclasses.replace(LAYER, head_dim=257)))


def test_shapes_and_reports() -> None:
    model = model_of(LAYER)
    store_integers(model, "wq", "wk", "wv")
    lowered, reports = lower(model, ARCH, 32, scheme=parse_scheme("w8a8-dyn"))
    assert reports[0].fused == {"accel.cpu::Attention": 1}
    assert own(lowered)[0].outputs[0].shape == ir.Shape(["B", "S", 16])
    assert lowered.opset_imports["accel.cpu"] == 1
