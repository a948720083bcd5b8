from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from accel.errors import FusionError
from accel.graph.lowering.ort_cpu import encoder_attention, lower
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import assert_close, count, make, normal, ops, run

LAYER = AttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=0.4)
ARCH = ArchSpec("bert", "BertModel", "encoder", "feature-extraction", 16, 11, 32, 100, False, (LAYER,))
LENGTH = 9
MASKS = {
    "full": np.ones((2, LENGTH), np.int64),
    "padded": np.array([[1] * LENGTH, [1] * 4 + [0] * (LENGTH - 4)]),
    "short": np.ones((2, 3), np.int64),
}
PARAMETERS = ("wq", "wk", "wv"), ("bq", "bk", "bv")


def model_of(layer: AttentionSpec, biased: bool = True, scores: str = "") -> ir.Model:
    """Three projections and one attention; ``scores``: the batch size of a score bias, by way of an Expand."""
    weights = {name: normal(16, 16, seed=i) for i, name in enumerate(PARAMETERS[0])}
    biases = {name: normal(16, seed=i) for i, name in enumerate(PARAMETERS[1])}
    projections = "\n".join(
        f"{part} = accel.Linear <transposed = 1> (x, w{part}{f', b{part}' if biased else ''})" for part in "qkv"
    )
    extra = f", window = {layer.window}" if layer.window is not None else ""
    extra += f", softcap = {layer.softcap}" if layer.softcap is not None else ""
    expand = "scores = Expand (table, target)" if scores else ""
    names = [f"float[16,16] {name}" for name in weights] + [f"float[16] {name}" for name in biases]
    text = f"""main (float[B,S,16] x, int64[B,S] attention_mask, float[{scores or 1},2,S,S] table, int64[4] target,
      {", ".join(names)}) => (float[B,S,16] y) <float[B,S,16] q, float[B,S,16] k, float[B,S,16] v, float[B,S,16] a> {{
      {projections}
      {expand}
      a = accel.Attention <num_heads = {layer.heads}, kv_num_heads = {layer.kv_heads}, scale = 0.4{extra}>
        (q, k, v, attention_mask{", scores" if scores else ""})
      y = Relu (a)
    }}"""
    return make(text, **weights, **biases)


def check(model: ir.Model, arch: ArchSpec) -> ir.Model:
    """Lowers, and compares on every mask; what padding gives is left out."""
    lowered, _ = lower(model, arch, arch.max_positions)
    for mask in MASKS.values():
        length = mask.shape[1]
        feeds = {
            "x": normal(2, length, 16),
            "attention_mask": mask,
            "table": normal(1, 2, length, length),
            "target": np.array([2, 2, length, length]),
        }
        (before,), (after,) = run(model, **feeds), run(lowered, **feeds)
        assert_close([after[mask == 1]], [before[mask == 1]])
    return lowered


def given(node: ir.Node, index: int) -> bool:
    """Whether an optional input is there: 3 bias, 4 mask, 5 bias of the scores."""
    return len(node.inputs) > index and node.inputs[index] is not None


def kernels(model: ir.Model) -> dict[str, ir.Node]:
    """The three kernels of the only layer: ``short``, ``flash`` and ``masked``."""
    (choice,) = (node for node in model.graph if node.op_type == "If")
    assert choice.name == "layers.0.attention"
    (short,) = choice.attributes["then_branch"].as_graph()
    (rest,) = choice.attributes["else_branch"].as_graph()
    flash, masked = (rest.attributes[name].as_graph()[0] for name in ("then_branch", "else_branch"))
    return {"short": short, "flash": flash, "masked": masked}


@pytest.mark.parametrize("short", [1, 384])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_lowered(window: int | None, biased: bool, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_attention, "SHORT", short)  # 1: what has no padding takes the flash path
    layer = dataclasses.replace(LAYER, window=window)
    lowered = check(model_of(layer, biased), dataclasses.replace(ARCH, layers=(layer,)))
    found = kernels(lowered)
    assert [node.op_type for node in found.values()] == ["Attention", "MultiHeadAttention", "MultiHeadAttention"]
    assert not given(found["short"], 3), "no mask, no bias"
    assert not given(found["flash"], 4) and not given(found["flash"], 5), "else it is no flash path"
    assert given(found["masked"], 4) and given(found["masked"], 5) == (window is not None)
    assert not any(given(node, 3) for node in found.values())
    assert count(lowered, "Add") == 2 * biased, "the queries' bias, and the values' after the attention"


def test_bias_of_the_values_goes_into_the_next_projection() -> None:
    model = model_of(LAYER)
    graph = model.graph
    (relu,) = (node for node in graph if node.op_type == "Relu")
    weight, bias = (
        initializer(graph, name, normal(*shape, seed=7)) for name, shape in (("wo", (16, 16)), ("bo", (16,)))
    )
    linear = ir.node("Linear", [relu.inputs[0], weight, bias], {"transposed": 1}, domain="accel")
    linear.outputs[0].type, linear.outputs[0].shape = relu.inputs[0].type, relu.inputs[0].shape
    graph.insert_before(relu, linear)
    relu.replace_input_with(0, linear.outputs[0])
    lowered = check(model, ARCH)
    assert count(lowered, "Add") == 2, "the queries' bias and the next projection's"
    carried = lowered.graph.initializers["layers.0.carried.bias"].const_value.numpy()
    tensors = {name: value.const_value.numpy() for name, value in graph.initializers.items()}
    np.testing.assert_allclose(carried, tensors["bo"] + tensors["wo"] @ tensors["bv"], rtol=1e-5, atol=1e-6)
    assert "bk" not in lowered.graph.initializers or not lowered.graph.initializers["bk"].uses()


def initializer(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.tensor(data, name=name)
    graph.register_initializer(value)
    return value


def test_score_bias_is_given_unexpanded() -> None:
    lowered = check(model_of(LAYER, scores="1"), ARCH)
    assert count(lowered, "Expand") == 0
    found = kernels(lowered)
    assert given(found["short"], 3) and given(found["flash"], 5) and given(found["masked"], 5)


def test_one_bias_missing() -> None:
    model = model_of(LAYER)
    key = model.graph[1]
    key.resize_inputs(2)
    lowered = check(model, ARCH)
    assert count(lowered, "Add") == 2


@pytest.mark.parametrize(
    "change,scores,message",
    [
        ({"softcap": 4.0}, "", "neither softcap nor grouped heads"),
        ({"kv_heads": 1}, "", "neither softcap nor grouped heads"),
        ({"window": 2}, "1", "a window together with a score bias"),
    ],
)
def test_refused(change: dict[str, float], scores: str, message: str) -> None:
    layer = dataclasses.replace(LAYER, **change)  # type: ignore[arg-type]
    with pytest.raises(FusionError, match=rf"{message} \(at layer 0\)"):
        lower(model_of(layer, scores=scores), dataclasses.replace(ARCH, layers=(layer,)), 32)


def test_the_canonical_model_is_left_as_it_is() -> None:
    model = model_of(LAYER)
    before = ops(model)
    lower(model, ARCH, 32)
    assert ops(model) == before and not any(node.domain == "com.microsoft" for node in model.graph)
