"""Integer weights in ONNX Runtime's own operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.ort_cuda.kernels import check_kernels
from accel.graph.lowering.ort_cuda.lower import KERNELS
from accel.graph.lowering.ort_cuda.quantized import lower_quantized, pack_blocks
from accel.graph.lowering.tensorrt.precision import ISLANDS, PRODUCTS, set_precision
from accel.quantized_tensor import QuantizedTensor
from tests.graph.lowering.integer_weights import decoder
from tests.graph.small import ops

IDS = np.array([3, 39, 0, 3])
LIMIT = 2e-3  # of the largest logit: weights, inputs and results in float16


def lowered(model: ir.Model) -> ir.Model:
    lower_quantized(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    set_precision(model, ir.DataType.FLOAT16, ISLANDS, PRODUCTS | KERNELS)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_computes_what_the_integers_mean(bits: int, group: int) -> None:
    """On PyTorch and on ONNX Runtime's CPU kernels, against the float32 graph over the same integers."""
    expected = TorchGraph(decoder(bits, group)).run({"input_ids": IDS})["logits"]
    model = lowered(decoder(bits, group))
    for node in model.graph:
        node.name = node.name or node.outputs[0].name
    check_kernels(model)
    assert ops(model).count("MatMulNBits") == 4 and ops(model).count("GatherBlockQuantized") == 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for found in (TorchGraph(model).run({"input_ids": IDS})["logits"], session.run(None, {"input_ids": IDS})[0]):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=LIMIT * np.abs(expected).max(), rtol=0)


def test_a_tied_table_is_stored_once() -> None:
    model = lowered(decoder())
    gather = next(node for node in model.graph if node.op_type == "GatherBlockQuantized")
    head = [node for node in model.graph if node.op_type == "MatMulNBits"][-1]
    assert gather.inputs[0] is head.inputs[1]
    large = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.UINT8]
    assert len(large) == 4 and all(list(value.shape or [])[1:] in ([2, 16], [3, 16]) for value in large)
    assert not any(
        value.dtype == ir.DataType.FLOAT and len(value.shape or ()) == 2 for value in model.graph.initializers.values()
    )


def test_the_first_of_two_is_in_the_low_half() -> None:
    values = np.array([[-8, 7, 0, 1] * 8], np.int8)
    blocks = pack_blocks(QuantizedTensor(values, np.ones((1, 1), np.float32), 4, 32))
    assert blocks.shape == (1, 1, 16) and blocks[0, 0, :2].tolist() == [0xF0, 0x98]
    wide = pack_blocks(QuantizedTensor(values, np.ones((1, 1), np.float32), 8, 32))
    assert wide[0, 0, :4].tolist() == [120, 135, 128, 129]
