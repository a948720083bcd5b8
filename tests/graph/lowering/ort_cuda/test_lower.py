from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from accel.errors import FusionError
from accel.graph.evaluation.sessions import MaskedEncoder
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.ort_cuda import lower
from accel.graph.lowering.ort_cuda.lower import _add_token as add_token
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.lowering.tensorrt.test_lower import types
from tests.graph.small import make, ops

LAYER = AttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=0.4)
ARCH = ArchSpec("bert", "BertModel", "encoder", "feature-extraction", 16, 11, 32, 100, False, (LAYER,))
ENCODER = """main (int64[B,S] input_ids, int64[B,S] attention_mask, float[11,16] e, float[16] g, float[16,16] w,
    float[16] b, float[16] c, float[16] d) => (float[B,S,16] y)
    <float[B,S,16] x, float[B,S,16] a, float[B,S,16] q, float[B,S,16] k, float[B,S,16] v, float[B,S,16] s> {
  x = Gather (e, input_ids)
  q = accel.Linear <transposed = 1> (x, w, b)
  k = accel.Linear <transposed = 1> (x, w, c)
  v = accel.Linear <transposed = 1> (x, w, d)
  a = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4%s> (q, k, %s, attention_mask)
  s = Add (a, x)
  y = LayerNormalization <axis = -1> (s, g)
}"""


def encoder(window: str = "", value: str = "v") -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {"e": (11, 16), "w": (16, 16), "b": (16,), "c": (16,), "d": (16,)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    return make(ENCODER % (window, value), **drawn, g=np.ones(16, np.float32))


def feeds(*lengths: int) -> dict[str, np.ndarray]:
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.random.default_rng(1).integers(0, 11, real.shape)
    return {"input_ids": ids, "attention_mask": real.astype(np.int64)}


@pytest.mark.parametrize("window", ["", ", window = 1"], ids=["", "window"])
def test_a_row_of_padding_stays_finite_and_changes_nobody(window: str) -> None:
    layer = dataclasses.replace(LAYER, window=1 if window else None)
    model, _ = lower(encoder(window), dataclasses.replace(ARCH, layers=(layer,)), 32)
    session, given = MaskedEncoder(TorchGraph(model).run), feeds(5, 0, 3)
    output = session.run(given)["y"]
    assert np.isfinite(output).all()
    alone = session.run({name: array[2:, :3] for name, array in given.items()})["y"]
    np.testing.assert_allclose(output[2, :3], alone[0], atol=1e-6)


def test_the_mask_is_the_sessions_choice() -> None:
    model, _ = lower(encoder(), ARCH, 32)
    shapes = {value.name: list(value.shape or []) for value in model.graph.inputs}
    assert shapes == {"input_ids": ["B", "S"], "key_mask": ["M"], "key_mask_shape": ["D"]}


def test_biases_go_into_the_kernel() -> None:
    model, _ = lower(encoder(), ARCH, 32)
    (attention,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    bias = attention.inputs[3]
    assert bias is not None and list(bias.shape or []) == [48] and "Add" not in ops(model)
    given = [encoder().graph.initializers[name].const_value.numpy() for name in "bcd"]  # type: ignore[union-attr]
    np.testing.assert_array_equal(bias.const_value.numpy(), np.concatenate(given))  # type: ignore[union-attr]


def test_biases_stay_where_one_is_missing() -> None:
    model, _ = lower(encoder(value="x"), ARCH, 32)
    (attention,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert attention.inputs[3] is None and ops(model).count("Add") == 2


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_islands(dtype: ir.DataType) -> None:
    model, _ = lower(encoder(), ARCH, 32, dtype)
    wide = ir.DataType.FLOAT
    assert types(model, "SkipLayerNormalization") == {(wide,) * 3}
    assert types(model, "FusedMatMul") == {(dtype, dtype)}
    assert types(model, "MultiHeadAttention") == {(dtype,) * 4}
    assert [value.dtype for value in model.graph.outputs] == [wide]
    assert "layers.0.qkv.bias" not in model.graph.initializers


def test_the_best_token_and_its_logit() -> None:
    """The first of equals; no logit where one of the row is no number, wherever it stands."""
    model = make("main (float[R,4] x) => (float[R,4] logits) { logits = Identity (x) }")
    assert add_token(model) == 1
    assert [value.name for value in model.graph.outputs] == ["logits", "token", "token_logit"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    inf, nan = np.inf, np.nan
    rows = [[1, 7, 7, -2], [-inf, -3, -inf, -4], [5, 1, nan, 2], [1, inf, 0, 0], [inf, -inf, 0, 0], [-inf] * 4]
    _, token, logit = session.run(None, {"x": np.array(rows, np.float32)})
    assert token.dtype == np.int64 and token[:2].tolist() == [1, 1] and token[3] == 1
    np.testing.assert_array_equal(logit, np.array([7, -3, nan, inf, nan, -inf], np.float32))


def test_reports_and_names() -> None:
    source = encoder()
    model, reports = lower(source, ARCH, 32)
    assert reports[0].fused == {"MultiHeadAttention": 1}
    assert {name: report.fused[name] for report in reports for name in ("skip_norms",) if name in report.fused} == {
        "skip_norms": 1
    }
    names = [node.name or "" for node in model.graph]
    assert len(names) == len(set(names)) and "layers.0.attention" in names
    assert "accel" not in model.opset_imports and model.opset_imports[""] == 23
    assert {node.domain for node in source.graph} == {"", "accel"}, "the canonical graph stays as it is"


def test_refused() -> None:
    capped = dataclasses.replace(ARCH, layers=(dataclasses.replace(LAYER, softcap=3.0),))
    with pytest.raises(FusionError, match=r"neither softcap nor grouped heads \(at layer 0, ort-cuda\)"):
        lower(encoder(), capped, 32)
    text = (ENCODER % ("", "v")).replace("s = Add (a, x)", "s = accel.Unheard (a, x)")
    with pytest.raises(FusionError, match=r"nodes without a lowering: accel::Unheard \(at ort-cuda\)"):
        lower(make(text), ARCH, 32)
    text = (ENCODER % ("", "v")).replace("s = Add (a, x)", "s = Celu (a)")
    with pytest.raises(FusionError, match="no CUDA kernel for Celu of float"):
        lower(make(text), ARCH, 32)


def test_the_same_graph_twice() -> None:
    first, second = (ir.to_proto(lower(encoder(), ARCH, 32, ir.DataType.FLOAT16)[0]) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
