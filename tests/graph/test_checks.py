from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest

from accel.errors import FusionError
from accel.graph.checks import check_attention
from accel.graph.pipeline import optimize
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import make

LAYER = AttentionSpec(heads=2, kv_heads=2, head_dim=4, scale=0.5)
LAYERS = (LAYER, dataclasses.replace(LAYER, window=3, softcap=5.0), LAYER)
ARCH = ArchSpec("bert", "BertModel", "encoder", "feature-extraction", 8, 11, 16, 100, False, LAYERS)
PLAIN = "num_heads = 2, kv_num_heads = 2, scale = 0.5"


def graph(*attributes: str) -> ir.Model:
    """One attention node per given attribute text, one after the other."""
    names = ["x", *(f"h{i}" for i in range(len(attributes)))]
    nodes = [
        f"{names[i + 1]} = accel.Attention <{text}> ({names[i]}, {names[i]}, {names[i]}, attention_mask)"
        for i, text in enumerate(attributes)
    ]
    lines = "\n".join([*nodes, f"y = Relu ({names[-1]})"])
    return make(f"main (float[B,S,8] x, int64[B,S] attention_mask) => (float[B,S,8] y) {{\n{lines}\n}}")


def test_names_every_layer() -> None:
    model = graph(PLAIN, f"{PLAIN}, window = 3, softcap = 5.0", PLAIN)
    assert check_attention(model, ARCH) == ("layers.0.attention", "layers.1.attention", "layers.2.attention")
    assert [node.name for node in model.graph][:3] == ["layers.0.attention", "layers.1.attention", "layers.2.attention"]


def test_missing_node() -> None:
    with pytest.raises(FusionError, match=r"2 accel::Attention nodes for 3 layers \(at layer 2\)"):
        check_attention(graph(PLAIN, f"{PLAIN}, window = 3, softcap = 5.0"), ARCH)


def test_a_decoder_needs_cached_attention() -> None:
    arch = dataclasses.replace(ARCH, kind="decoder")
    with pytest.raises(FusionError, match=r"0 accel::CachedAttention nodes for 3 layers \(at layer 0\)"):
        check_attention(graph(PLAIN, PLAIN, PLAIN), arch)


@pytest.mark.parametrize(
    "second",
    [
        f"{PLAIN}, softcap = 5.0",
        f"{PLAIN}, window = 4, softcap = 5.0",
        f"{PLAIN}, window = 3",
        f"{PLAIN}, window = 3, softcap = 50.0",
        "num_heads = 2, kv_num_heads = 2, scale = 0.51, window = 3, softcap = 5.0",
        "num_heads = 2, kv_num_heads = 1, scale = 0.5, window = 3, softcap = 5.0",
        "num_heads = 4, kv_num_heads = 2, scale = 0.5, window = 3, softcap = 5.0",
        f"{PLAIN}, window = 3, softcap = 5.0, causal = 1",
    ],
    ids=["no window", "window", "no softcap", "softcap", "scale", "key heads", "heads", "unknown"],
)
def test_other_attributes(second: str) -> None:
    with pytest.raises(FusionError, match=r"\(at layer 1\)"):
        check_attention(graph(PLAIN, second, PLAIN), ARCH)


def test_optimize_checks() -> None:
    """A layer whose result nothing reads is dropped on the way, which must not pass."""
    model = graph(PLAIN, f"{PLAIN}, window = 3, softcap = 5.0", PLAIN)
    nodes = list(model.graph)
    nodes[3].replace_input_with(0, nodes[1].outputs[0])
    with pytest.raises(FusionError, match=r"2 accel::Attention nodes for 3 layers"):
        optimize(model, ARCH)
