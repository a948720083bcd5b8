"""Integer weights as the kernels of ``accel_kernels`` read them: one copy for products and gathered rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.graph.edit import substitute
from accel.graph.lowering.fused_linear import DOMAIN
from accel.graph.quantized import quantized_of
from accel.quantized_tensor import QuantizedTensor


def pack_weights(model: ir.Model) -> int:
    """Gives the nodes that read integer weights their words and scales, in place; returns how many nodes.

    Cases:
        1. ``Linear`` and ``GatedLinear`` of ``accel.kernels``: each weight [N, K] becomes words int32
           [N, K * bits / 32] (see ``accel_kernels.packing``), the scales float16 [N, K / group] follow the weights;
           attributes ``bits``, and ``transposed`` is 1 whatever it was.
        2. ``Gather`` of rows -> ``accel.kernels::Gather(words, scales, ids)`` with ``bits``: float32 rows.
    Weights of one node are quantised alike: ``join_linears`` and ``fuse_gates`` see to that.
    """
    packed, count = _Packed(model.graph), 0
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type in ("Linear", "GatedLinear"):
            made = _linear(node, packed)
        elif node.op_type == "Gather" and not node.domain and quantized_of(node.inputs[0]) is not None:
            made = _gather(node, packed)
        else:
            continue
        if made is not None:
            made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            substitute(node, [made], [made.outputs[0]])
            count += 1
    return count


def _linear(node: ir.Node, packed: _Packed) -> ir.Node | None:
    count = node.attributes["weights"].as_int()
    weights = [value for value in node.inputs[1 : 1 + count] if value is not None]
    tensors = [found for value in weights if (found := quantized_of(value)) is not None]
    if not tensors:
        return None
    assert len(tensors) == count and len({(tensor.bits, tensor.group) for tensor in tensors}) == 1, node.name
    pairs = [packed.get(value, tensor) for value, tensor in zip(weights, tensors, strict=True)]
    words, scales = ([pair[place] for pair in pairs] for place in range(2))
    attributes = {
        **node.attributes,
        "transposed": ir.AttrInt64("transposed", 1),
        "bits": ir.AttrInt64("bits", tensors[0].bits),
    }
    inputs = [node.inputs[0], *words, *scales, *node.inputs[1 + count :]]
    return ir.node(node.op_type, inputs, attributes, domain=DOMAIN)


def _gather(node: ir.Node, packed: _Packed) -> ir.Node:
    table, ids = node.inputs[:2]
    tensor = quantized_of(table)
    assert table is not None and tensor is not None and not node.attributes.get_int("axis", 0), node.name
    return ir.node("Gather", [*packed.get(table, tensor), ids], {"bits": tensor.bits}, domain=DOMAIN)


@dataclass
class _Packed:
    """Words and scales, one pair per weight."""

    graph: ir.Graph
    made: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def get(self, weight: ir.Value, tensor: QuantizedTensor) -> tuple[ir.Value, ir.Value]:
        """(words int32 [N, K * bits / 32], scales float16 [N, K / group])."""
        if weight not in self.made:
            rows, columns = tensor.shape
            shape = ir.Shape([rows, columns * tensor.bits // 32])
            words = ir.Value(name=f"{weight.name}.words{tensor.bits}", shape=shape)
            words.type = ir.TensorType(ir.DataType.INT32)
            words.const_value = ir.LazyTensor(
                lambda: ir.tensor(_words(tensor), name=words.name), dtype=ir.DataType.INT32, shape=shape,
                name=words.name,
            )  # fmt: skip
            scales = ir.Value(name=f"{weight.name}.scales", shape=ir.Shape(tensor.scales.shape))
            scales.type = ir.TensorType(ir.DataType.FLOAT16)
            scales.const_value = ir.tensor(tensor.scales.astype(np.float16), name=scales.name)
            for value in (words, scales):
                self.graph.register_initializer(value)
            self.made[weight] = words, scales
        return self.made[weight]


def _words(tensor: QuantizedTensor) -> NDArray[np.int32]:
    import torch
    from accel_kernels.packing import pack_integers

    words: NDArray[np.int32] = pack_integers(torch.from_numpy(tensor.values), tensor.bits).numpy()
    return words


__all__ = ["pack_weights"]
