from __future__ import annotations

import dataclasses
import itertools

import pytest

from accel.errors import FusionError
from accel.graph.lowering.ort_cpu import lower
from accel.spec import ArchSpec, AttentionSpec
from tests.graph.small import make, ops

LAYER = AttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=0.4)
ARCH = ArchSpec("bert", "BertModel", "encoder", "feature-extraction", 16, 11, 32, 100, False, (LAYER,))
TEXT = """main (float[B,S,16] x, int64[B,S] attention_mask) => (float[B,S,16] y) <float[B,S,16] a> {
  a = accel.Attention <num_heads = 2, kv_num_heads = 2, scale = 0.4> (x, x, x, attention_mask)
  y = %s (a)
}"""


def test_reports() -> None:
    lowered, reports = lower(make(TEXT % "Relu"), ARCH, 32)
    names = [report.name for report in reports]
    assert names[0] == "attention" and reports[0].fused == {"Attention / MultiHeadAttention": 1}
    assert len(set(names)) == len(names)
    assert all(first.nodes_after == second.nodes_before for first, second in itertools.pairwise(reports))
    assert reports[-1].nodes_after == lowered.graph.num_nodes()
    assert "If" in ops(lowered) and not any(node.domain == "accel" for node in lowered.graph)


def test_private_node_without_a_lowering() -> None:
    with pytest.raises(FusionError, match=r"nodes without a lowering: accel::Unheard \(at ort-cpu\)"):
        lower(make(TEXT % "accel.Unheard"), ARCH, 32)


def test_lost_layer() -> None:
    arch = dataclasses.replace(ARCH, layers=(LAYER, LAYER))
    with pytest.raises(FusionError, match=r"1 If and Attention nodes for 2 layers \(at layer 1, ort-cpu\)"):
        lower(make(TEXT % "Relu"), arch, 32)
