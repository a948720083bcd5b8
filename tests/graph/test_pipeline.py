from __future__ import annotations

import numpy as np

from accel.graph.pipeline import CANONICAL_PASSES, optimize, run_passes
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import assert_close, make, normal, ops, run

LAYER = AttentionSpec(heads=2, kv_heads=2, head_dim=4, scale=0.5)
ARCH = ArchSpec("bert", "BertModel", "encoder", "feature-extraction", 8, 11, 16, 100, False, (LAYER,))
TEXT = """main (float[B,S,8] x, int64[B,S] attention_mask, float[8,8] w, float[8] b, float[8] scale,
    float two, float eps, int64[1] axis) => (float[B,S,8] y) <float[B,S,8] a> {
  t = Transpose <perm = [1, 0]> (w)
  m = MatMul (x, t)
  q = Add (m, b)
  a = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.5> (q, q, q, attention_mask)
  square = Pow (a, two)
  mean = ReduceMean (square, axis)
  added = Add (mean, eps)
  root = Sqrt (added)
  inverse = Reciprocal (root)
  normed = Mul (a, inverse)
  y = Mul (normed, scale)
}"""
WEIGHTS = {
    "w": normal(8, 8),
    "b": normal(8),
    "scale": normal(8, seed=1),
    "two": np.float32(2),
    "eps": np.float32(1e-5),
    "axis": np.array([-1]),
}


def test_optimize() -> None:
    model = make(TEXT, **WEIGHTS)
    model.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = "model.py, line 12"
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    before = run(model, x=normal(2, 5, 8), attention_mask=mask)
    reports = optimize(model, ARCH)
    assert_close(run(model, x=normal(2, 5, 8), attention_mask=mask), before)
    assert ops(model) == ["Linear", "Attention", "RMSNormalization"]
    assert [report.name for report in reports] == [name for name, _ in CANONICAL_PASSES]
    applied = {name: number for report in reports for name, number in report.fused.items()}
    assert (applied["linear"], applied["rms_norm"], applied["rotary"]) == (1, 1, 0)
    assert not any(node.metadata_props for node in model.graph)


def test_reports_chain_and_count_nodes() -> None:
    model = make(TEXT, **WEIGHTS)
    first, second = run_passes(model, (("nothing", lambda _: 0), ("linear", dict(CANONICAL_PASSES)["linear"])))
    assert (first.nodes_before, first.nodes_after, first.fused) == (11, 11, {"nothing": 0})
    assert (second.nodes_before, second.nodes_after, second.fused) == (11, 9, {"linear": 1})
