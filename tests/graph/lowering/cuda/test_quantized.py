"""Integer weights in the cuda engine's dialect."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.cuda.quantized import pack_weights
from accel.graph.lowering.fused_linear import DOMAIN, fuse_activations, fuse_gates, lower_linear
from tests.graph.lowering.integer_weights import decoder

IDS = np.array([3, 39, 0, 3])
LIMIT = 2e-3  # of the largest logit: weights, inputs and results in float16


def lowered(model: ir.Model) -> ir.Model:
    for rewrite in (lower_linear, fuse_gates, fuse_activations, pack_weights):
        rewrite(model)
        ir.passes.common.RemoveUnusedNodesPass()(model)
    model.opset_imports[DOMAIN] = 1
    return model


def fused(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == DOMAIN]


def agrees(model: ir.Model, plain: ir.Model) -> None:
    expected = TorchGraph(plain).run({"input_ids": IDS})["logits"]
    found = TorchGraph(model).run({"input_ids": IDS})["logits"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=LIMIT * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_computes_what_the_integers_mean(bits: int, group: int) -> None:
    model = lowered(decoder(bits, group))
    assert fused(model) == ["Gather", "GatedLinear", "Linear", "Linear"]
    agrees(model, decoder(bits, group))


def test_what_the_kernels_read() -> None:
    model = lowered(decoder())
    gather, gated, down, head = (node for node in model.graph if node.domain == DOMAIN)
    assert gather.inputs[0] is head.inputs[1] and gather.inputs[1] is head.inputs[2], "a tied table is stored once"
    kinds = [(value.dtype, list(value.shape or [])) for value in gated.inputs[1:] if value is not None]
    words, scales = (ir.DataType.INT32, [96, 8]), (ir.DataType.FLOAT16, [96, 2])
    assert kinds == [words, words, scales, scales]
    assert [list(value.shape or []) for value in down.inputs[1:] if value is not None] == [[64, 12], [64, 3], [64]]
    assert {node.attributes["bits"].as_int() for node in (gather, gated, down, head)} == {4}
    assert down.attributes["transposed"].as_int() == 1, "packed with outputs as rows whatever it was"
    names = [value.name for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert names == ["shift"], "no floats of what is packed are written"


def test_weights_in_different_bits_stay_apart() -> None:
    model = lowered(decoder(up_bits=8))
    assert fused(model) == ["Gather", "Linear", "Linear", "Linear", "Linear"]
    bits = [node.attributes["bits"].as_int() for node in model.graph if node.op_type == "Linear"]
    assert sorted(bits) == [4, 4, 4, 8]
    agrees(model, decoder(up_bits=8))
