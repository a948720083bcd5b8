"""Products and embeddings with integer weights -> the operators of ``accel_cpu``, ONNX Runtime's custom ones.

The weights are packed as the kernels read them, once, as the file is written: one copy serves prefill and decode, and
a tied embedding reads the rows of the LM head's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import accel_cpu
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.errors import FusionError
from accel.graph.edit import make_constant, producer, replace_value, sole_consumer, substitute
from accel.graph.lowering.fused_linear import DOMAIN as FUSED
from accel.graph.quantized import concatenated, quantized_of
from accel.quantized_tensor import QuantizedTensor
from accel.scheme import Scheme

DOMAIN = accel_cpu.DOMAIN


def mark_quantized(model: ir.Model) -> int:
    """``accel::Linear`` with integer weights -> ``accel.kernels::Linear``, which takes in gates and activations."""
    count = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("accel", "Linear") or quantized_of(node.inputs[1]) is None:
            continue
        attributes = {"weights": 1, "transposed": node.attributes.get_int("transposed", 0)}
        made = ir.node("Linear", list(node.inputs), attributes, domain=FUSED)
        _swap(node, made)
        count += 1
    return count


def lower_quantized(model: ir.Model, scheme: Scheme, static_scales: Mapping[str, float]) -> int:
    """Fused linears and gathers over integer weights -> ``accel.cpu``; returns how many products.

    Args:
        model: After ``mark_quantized`` and the fusions of gates and activations; changed in place.
        scheme: Says how the kernels round their input.
        static_scales: By a weight's name, the calibrated scale of its input; for ``static`` activations.

    Raises:
        FusionError: A static scale is missing.
    """
    graph, packed = model.graph, _Packed(model.graph)
    count = 0
    for node in list(graph):
        if node.domain == FUSED:
            _swap(node, _product(graph, node, packed, scheme, static_scales))
            count += 1
        elif node.op_type == "Gather" and not node.domain and quantized_of(node.inputs[0]) is not None:
            _swap(node, _rows(node, packed))
    if packed.made:
        model.opset_imports[DOMAIN] = 1
    model.opset_imports.pop(FUSED, None)
    return count


def fuse_residuals(model: ir.Model) -> int:
    """product + x -> the product's own last step, where nothing else reads it; returns how many."""
    count = 0
    for node in list(model.graph):
        pair = (node.inputs[0], node.inputs[1]) if node.op_type == "Add" and not node.domain else ()
        for value, other in (pair, pair[::-1]) if pair else ():
            product = producer(value, accel_cpu.MATMUL)
            if product is None or other is None or not _same_shape(value, other):
                continue
            if sole_consumer(value) is not node or len(product.inputs) > _RESIDUAL:
                continue
            _take_residual(product, node, other)
            count += 1
            break
    return count


_RESIDUAL = 5  # index of the input


def _take_residual(product: ir.Node, add: ir.Node, other: ir.Value) -> None:
    """Puts the product where the sum stands: what it adds is known there."""
    graph = add.graph
    assert graph is not None
    made = ir.node(product.op_type, list(product.inputs), dict(product.attributes), domain=DOMAIN)
    made.resize_inputs(_RESIDUAL + 1)
    made.replace_input_with(_RESIDUAL, other)
    made.outputs[0].type, made.outputs[0].shape = add.outputs[0].type, add.outputs[0].shape
    graph.insert_before(add, made)
    replace_value(add.outputs[0], made.outputs[0])
    graph.remove(add, safe=True)
    graph.remove(product, safe=True)


def _same_shape(one: ir.Value | None, other: ir.Value) -> bool:
    return one is not None and one.shape is not None and other.shape is not None and one.shape == other.shape


@dataclass
class _Packed:
    """Packed initializers, one per weight, or per pair of gate and up."""

    graph: ir.Graph
    made: dict[tuple[ir.Value, ...], tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def get(self, weights: tuple[ir.Value, ...], gated: bool) -> tuple[ir.Value, ir.Value]:
        """(packed values uint8 [bytes], scales) of weights one under the other."""
        if weights not in self.made:
            name = "+".join(weight.name or "" for weight in weights)
            tensor = _joined(weights)
            self.made[weights] = self._make(name, tensor, gated)
        return self.made[weights]

    def _make(self, name: str, tensor: QuantizedTensor, gated: bool) -> tuple[ir.Value, ir.Value]:
        scales = accel_cpu.pack_scales(_ordered(tensor.scales, gated), tensor.group)
        outputs = _ordered(np.empty((tensor.shape[0], 0)), gated).shape[0]
        size = accel_cpu.packed_size(outputs, tensor.shape[1], tensor.bits)
        values = self._initializer(
            f"{name}.packed", ir.DataType.UINT8, (size,),
            lambda: accel_cpu.pack(_ordered(tensor.values, gated), tensor.bits),
        )  # fmt: skip
        dtype = ir.DataType.from_numpy(scales.dtype)
        return values, self._initializer(f"{name}.scales", dtype, scales.shape, lambda: scales)

    def _initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make) -> ir.Value:  # type: ignore[no-untyped-def]
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = ir.LazyTensor(
            lambda: ir.tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        self.graph.register_initializer(value)
        return value


def _ordered(rows: NDArray, gated: bool) -> NDArray:
    """Rows of gate and up, one under the other, as the kernel wants them."""
    half = len(rows) // 2
    return accel_cpu.interleave_gated(rows[:half], rows[half:]) if gated else rows


def _joined(weights: Sequence[ir.Value]) -> QuantizedTensor:
    if len(weights) == 1:
        found = quantized_of(weights[0])
    else:
        joined = concatenated([weight.const_value for weight in weights], "")
        found = None if joined is None else joined.quantized
    if found is None:
        raise FusionError("weights of one product in different schemes", where=weights[0].name)
    return found


def _product(
    graph: ir.Graph, node: ir.Node, packed: _Packed, scheme: Scheme, static_scales: Mapping[str, float]
) -> ir.Node:
    count, gated = node.attributes["weights"].as_int(), node.op_type == "GatedLinear"
    x, weights = node.inputs[0], tuple(value for value in node.inputs[1 : 1 + count] if value is not None)
    biases = [value for value in node.inputs[1 + count :] if value is not None]
    tensor = _joined(weights)
    values, scales = packed.get(weights, gated)
    bias = _joined_bias(graph, biases, gated) if biases else None
    inputs: list[ir.Value | None] = [x, values, scales, bias, _static_scale(graph, weights, scheme, static_scales)]
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, int | str] = {
        "N": tensor.shape[0] // (1 + gated), "K": tensor.shape[1], "bits": tensor.bits, "block_size": tensor.group,
        "activation": node.attributes.get_string("activation", "") or "", "gated": int(gated),
    }  # fmt: skip
    return ir.node("QuantizedMatMul", inputs, attributes, domain=DOMAIN)


def _static_scale(
    graph: ir.Graph, weights: Sequence[ir.Value], scheme: Scheme, static_scales: Mapping[str, float]
) -> ir.Value | None:
    if scheme.activations != "static":
        return None
    names = [name for weight in weights for name in _parameters(weight)]
    found = [static_scales[name] for name in names if name in static_scales]
    if not found:
        raise FusionError("no calibrated scale for this product's input", where=names[0])
    return make_constant(graph, f"{names[0]}.x_scale", np.array(max(found), np.float32))


def _parameters(weight: ir.Value) -> list[str]:
    """The parameters that a weight is made of."""
    from accel.spec import PARTS

    return weight.metadata_props.get(PARTS, weight.name or "").split("\n")


def _joined_bias(graph: ir.Graph, biases: Sequence[ir.Value], gated: bool) -> ir.Value:
    if len(biases) == 1 and not gated:
        return biases[0]
    tensors = [bias.const_value for bias in biases]
    assert all(tensor is not None for tensor in tensors)
    data = np.concatenate([tensor.numpy() for tensor in tensors if tensor is not None])
    return make_constant(graph, "+".join(bias.name or "" for bias in biases) + ".joined", _ordered(data, gated))


def _rows(node: ir.Node, packed: _Packed) -> ir.Node:
    table, ids = node.inputs[:2]
    assert table is not None
    tensor = _joined([table])
    values, scales = packed.get((table,), False)
    attributes = {"N": tensor.shape[0], "K": tensor.shape[1], "bits": tensor.bits, "block_size": tensor.group}
    return ir.node("QuantizedGather", [ids, values, scales], attributes, domain=DOMAIN)


def _swap(old: ir.Node, new: ir.Node) -> None:
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    substitute(old, [new], [new.outputs[0]])


__all__ = ["DOMAIN", "fuse_residuals", "lower_quantized", "mark_quantized"]
