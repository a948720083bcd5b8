from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from accel.errors import FusionError
from accel.graph.lowering.ort_cpu import lower
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


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_lowered(window: int | None, biased: bool) -> None:
    layer = dataclasses.replace(LAYER, window=window)
    lowered = check(model_of(layer, biased), dataclasses.replace(ARCH, layers=(layer,)))
    (branch,) = (node for node in lowered.graph if node.op_type == "If")
    dense, masked = (branch.attributes[name].as_graph()[0] for name in ("then_branch", "else_branch"))
    assert branch.name == "layers.0.attention" and dense.op_type == masked.op_type == "MultiHeadAttention"
    assert given(dense, 4) == given(dense, 5) == 0, "the branch without padding takes the flash path"
    assert (given(masked, 4), given(masked, 5)) == (1, window is not None)
    assert given(dense, 3) == given(masked, 3) == biased, "the kernel adds the projections' biases"
    assert count(lowered, "Add") == 0


def test_score_bias_is_given_unexpanded() -> None:
    lowered = check(model_of(LAYER, scores="1"), ARCH)
    assert count(lowered, "Expand") == 0
    (branch,) = (node for node in lowered.graph if node.op_type == "If")
    for name in ("then_branch", "else_branch"):
        assert given(branch.attributes[name].as_graph()[0], 5), "relative positions count in both"


def test_one_bias_missing() -> None:
    model = model_of(LAYER)
    key = model.graph[1]
    key.resize_inputs(2)
    lowered = check(model, ARCH)
    assert count(lowered, "Add") == 2, "kept outside the kernel, which wants all three or none"


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
