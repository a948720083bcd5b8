from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from accel.graph.lowering.ort_cpu import linear
from accel.graph.lowering.ort_cpu.linear import lower_linear, split_head
from accel.spec import ROWS, ArchSpec, AttentionSpec
from tests.graph.small import apply, make, normal, ops, run


@pytest.mark.parametrize("inputs,expected", [("x, w", ["FusedMatMul"]), ("x, w, b", ["FusedMatMul", "Add"])])
def test_transposed(inputs: str, expected: list[str]) -> None:
    text = f"""main (float[B,S,8] x, float[4,8] w, float[4] b) => (float[B,S,4] y) {{
      y = accel.Linear <transposed = 1> ({inputs})
    }}"""
    model = make(text, w=normal(4, 8), b=normal(4))
    assert apply(lower_linear, model, x=normal(2, 3, 8)) == 1
    assert ops(model) == expected and model.graph.outputs[0].name == "y"


def test_square_weight_is_not_turned_by_mistake() -> None:
    text = "main (float[B,8] x, float[8,8] w) => (float[B,8] y) {\ny = accel.Linear <transposed = %d> (x, w)\n}"
    for transposed, op_type in ((0, "MatMul"), (1, "FusedMatMul")):
        model = make(text % transposed, w=normal(8, 8))
        assert apply(lower_linear, model, x=normal(2, 8)) == 1
        assert ops(model) == [op_type]


TIED = """main (int64[T] ids, float[11,8] w, float[11,8] other) => (float[T,11] y) {
  h = Gather (%s, ids)
  y = com.microsoft.FusedMatMul <transB = 1> (h, %s)
}"""


def arch(kind: str) -> ArchSpec:
    layer = AttentionSpec(heads=1, kv_heads=1, head_dim=8, scale=1.0, causal=kind == "decoder")
    return ArchSpec("any", "Any", kind, "text-generation", 8, 11, 16, 88, True, (layer,))  # type: ignore[arg-type]


def test_tied_head_reads_the_embedding_s_bytes_under_its_own_name() -> None:
    model = make(TIED % ("w", "w"), w=normal(11, 8), other=normal(11, 8))
    ids = np.array([3, 0, 10])
    before = run(model, ids=ids)
    assert split_head(model, arch("decoder")) == 1
    head = next(node for node in model.graph if node.op_type == "FusedMatMul").inputs[1]
    assert head is not None and head.metadata_props[ROWS] == "w\n0\n11"
    assert np.array_equal(run(model, ids=ids)[0], before[0])
    assert split_head(model, arch("decoder")) == 0, "once is enough"


@pytest.mark.parametrize("kind,ranges", [("decoder", 2), ("encoder", 1)])
def test_large_tied_head_is_cut_where_logits_are_few(kind: str, ranges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LARGEST_BYTES", 20 * 8 * 4)
    text = TIED.replace("11", "37")
    model = make(text % ("w", "w"), w=normal(37, 8), other=normal(37, 8))
    ids = np.array([3, 36])
    before = run(model, ids=ids)
    decoder = dataclasses.replace(arch(kind), vocab_size=37)
    assert split_head(model, decoder) == 1
    assert ops(model).count("FusedMatMul") == ranges
    found = run(model, ids=ids)[0]
    assert found.shape == (2, 37) and np.allclose(found, before[0], atol=1e-6)


def test_untied_head_of_ordinary_size_is_left_alone() -> None:
    model = make(TIED % ("w", "other"), w=normal(11, 8), other=normal(11, 8))
    assert split_head(model, arch("decoder")) == 0
    assert ops(model) == ["Gather", "FusedMatMul"]
