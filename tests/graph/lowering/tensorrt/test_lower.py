from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from accel.errors import ExportError, FusionError
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.tensorrt import lower
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import make

LAYER = AttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=0.4)
ARCH = ArchSpec("bert", "BertModel", "encoder", "feature-extraction", 16, 11, 32, 100, False, (LAYER,))
ENCODER = """main (float[B,S,16] x, int64[B,S] attention_mask, float[16] g, float[16,16] w) => (float[B,S,16] y)
    <float[B,S,16] a, float[B,S,16] n, float[B,S,16] p> {
  n = LayerNormalization <axis = -1> (x, g)
  p = accel.Linear <transposed = 1> (n, w)
  a = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4%s> (p, n, n, attention_mask)
  y = Add (a, x)
}"""
LOW = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}


def encoder(window: str = "", scale: float = 1.0) -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {"g": np.ones(16, np.float32), "w": (scale * rng.standard_normal((16, 16))).astype(np.float32)}
    return make(ENCODER % window, **weights)


def feeds(lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    size = max(*lengths, 1)
    real = np.arange(size) < np.array(lengths)[:, None]
    x = np.random.default_rng(1).standard_normal((len(lengths), size, 16)).astype(np.float32)
    return {"x": x, "attention_mask": real.astype(np.int64)}


def types(model: ir.Model, op_type: str) -> set[tuple[ir.DataType | None, ...]]:
    """The types of the floating inputs of all nodes of one kind."""
    return {
        tuple(v.dtype for v in node.inputs if v is not None and v.dtype is not None and v.dtype.is_floating_point())
        for node in model.graph
        if node.op_type == op_type
    }


@pytest.mark.parametrize("window", ["", ", window = 1"], ids=["", "window"])
def test_a_row_of_padding_stays_finite_and_changes_nobody(window: str) -> None:
    layer = dataclasses.replace(LAYER, window=1 if window else None)
    run = TorchGraph(lower(encoder(window), dataclasses.replace(ARCH, layers=(layer,)), 32)[0]).run
    given = feeds((5, 0, 3))
    output = run(given)["y"]
    assert np.isfinite(output).all()
    alone = run({name: array[2:, :3] for name, array in given.items()})["y"]
    np.testing.assert_allclose(output[2, :3], alone[0], atol=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_islands(dtype: ir.DataType) -> None:
    model, _ = lower(encoder(), ARCH, 32, dtype)
    wide = ir.DataType.FLOAT
    assert types(model, "LayerNormalization") == {(wide, wide)}
    assert types(model, "Attention") == {(dtype, dtype, dtype)}
    assert types(model, "MatMul") == {(dtype, dtype)}
    assert types(model, "Add") == {(wide, wide)}, "the residual stream"
    assert [value.dtype for value in model.graph.outputs] == [wide]
    stored = {name: value.dtype for name, value in model.graph.initializers.items() if name[0] in "gw"}
    assert stored == {"g": wide, f"w.{dtype.name.lower()}": dtype}


def test_casts_are_made_once() -> None:
    model, _ = lower(encoder(), ARCH, 32, ir.DataType.FLOAT16)
    casts = [(node.inputs[0], node.attributes["to"].as_int()) for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == len(set(casts)) > 0


def test_fp32_has_no_casts_and_keeps_the_weights() -> None:
    source = encoder()
    model, reports = lower(source, ARCH, 32)
    assert not any(node.op_type == "Cast" for node in model.graph)
    assert {"g", "w"} <= set(model.graph.initializers)
    names = ["attention", "tokens", "unit_batch", "linear", "columns", "clean", "precision"]
    assert [report.name for report in reports] == names
    assert {node.domain for node in source.graph} == {"", "accel"}, "the canonical graph stays as it is"


def test_a_weight_beyond_fp16() -> None:
    model, _ = lower(encoder(scale=1e5), ARCH, 32, ir.DataType.FLOAT16)
    with pytest.raises(ExportError, match=r"beyond float16 \(at w\.float16\).*bf16"):
        model.graph.initializers["w.float16"].const_value.numpy()  # type: ignore[union-attr]
    lower(encoder(scale=1e5), ARCH, 32, ir.DataType.BFLOAT16)[0].graph.initializers["w.bfloat16"].const_value.numpy()  # type: ignore[union-attr]


def test_softcap_in_an_encoder() -> None:
    capped = dataclasses.replace(ARCH, layers=(dataclasses.replace(LAYER, softcap=3.0),))
    with pytest.raises(FusionError, match=r"no softcap \(at layer 0, tensorrt\)"):
        lower(encoder(), capped, 32)


def test_private_node_without_a_lowering() -> None:
    text = ENCODER.replace("y = Add (a, x)", "y = accel.Unheard (a, x)") % ""
    model = make(text, g=np.ones(16, np.float32), w=np.ones((16, 16), np.float32))
    with pytest.raises(FusionError, match=r"nodes without a lowering: accel::Unheard \(at tensorrt\)"):
        lower(model, ARCH, 32)


def test_names_say_layer_and_part() -> None:
    model, _ = lower(encoder(), ARCH, 32)
    names = [node.name or "" for node in model.graph]
    assert len(names) == len(set(names)) and {"layers.0.scale", "layers.0.attention"} <= set(names)
    attention = next(node for node in model.graph if node.name == "layers.0.attention")
    assert attention.attributes["scale"].as_float() == 1.0 and "is_causal" not in attention.attributes


def test_the_same_graph_twice() -> None:
    first, second = (ir.to_proto(lower(encoder(), ARCH, 32, ir.DataType.FLOAT16)[0]) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
