"""Quantised weights spelled out: ``accel::QuantizedLinear`` and ``accel::QuantizedGather`` over integer initializers.

A graph whose initializers know their integers (``accel.graph.quantized``) computes in float32. Spelled out, the
integers and scales are initializers of their own, and products round their inputs where the scheme says so: that is
the graph to save, to run anywhere by the ops' function bodies, and to measure a scheme's quality on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.edit import remove_dead, substitute
from accel.graph.quantized import QuantizedWeight, quantized_of
from accel.quantized_tensor import QuantizedTensor
from accel.scheme import Activations

DOMAIN = "accel"
Rounding = Activations | Literal["grouped"]


def spell_quantized(
    model: ir.Model, activations: Rounding = "none", input_scales: Mapping[str, float] | None = None
) -> int:
    """Rewrites in place; returns how many nodes read integers now.

    Cases:
        1. ``accel::Linear`` with a quantised weight -> ``accel::QuantizedLinear(x, weight, scale, bias, x_scale)``,
           weight INT8 or INT4 [N, K] (an output's row after the other, whichever way the node had it), scale
           FLOAT [N, G], bias and x_scale left out where there are none. Attributes: ``block_size`` (inputs that share
           a scale, 0: the whole row) and ``activation``.
        2. ``Gather`` of rows of one -> ``accel::QuantizedGather(weight, scale, ids)`` with ``block_size``.
    Refused: any other reader of a quantised weight.

    Args:
        model: Canonical, with quantised weights.
        activations: Of all products: ``dynamic`` rounds each row of x (the last axis) to 255 steps of its own largest
            magnitude, ``static`` with a given step. ``grouped``, for evaluation alone: as kernels do that leave the
            input of grouped weights to themselves, each group of a row by itself.
        input_scales: For ``static``: the step of each product's input, by the weight's name.

    Raises:
        FusionError: Another reader, or a product without a step.
    """
    made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    count = 0
    for node in list(model.graph):
        for place, value in enumerate(node.inputs):
            quantized = quantized_of(value)
            if value is None or quantized is None:
                continue
            if value not in made:
                made[value] = _initializers(model.graph, value.name or "", quantized)
            if (node.domain, node.op_type, place) == (DOMAIN, "Linear", 1):
                step = (input_scales or {}).get(value.name or "") if activations == "static" else None
                new = _linear(node, *made[value], quantized, activations, step)
            elif (node.domain, node.op_type, place) == ("", "Gather", 0) and node.attributes.get_int("axis", 0) == 0:
                inputs = [*made[value], node.inputs[1]]
                new = ir.node("QuantizedGather", inputs, {"block_size": quantized.group}, domain=DOMAIN)
            else:
                raise FusionError(f"a {node.op_type} node reads the quantised {value.name}", where=node.name)
            new.name, new.outputs[0].name = node.name, node.outputs[0].name
            substitute(node, [new], [new.outputs[0]])
            count += 1
    remove_dead(model)
    return count


def _initializers(graph: ir.Graph, name: str, quantized: QuantizedTensor) -> tuple[ir.Value, ir.Value]:
    integers = quantized.values if quantized.bits == 8 else quantized.values.astype(ml_dtypes.int4)
    pair = (f"{name}.q{quantized.bits}", integers), (f"{name}.scale", quantized.scales)
    values = [_initializer(graph, new, array) for new, array in pair]
    return values[0], values[1]


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _linear(
    node: ir.Node,
    weight: ir.Value,
    scale: ir.Value,
    quantized: QuantizedTensor,
    activations: Rounding,
    step: float | None,
) -> ir.Node:
    inputs = [node.inputs[0], weight, scale, *node.inputs[2:]]
    if activations == "static":
        if step is None:
            raise FusionError(f"no step is known for the input of {weight.name}", where=node.name)
        assert node.graph is not None
        name = f"{weight.name}.x_scale"
        known = node.graph.initializers.get(name)
        inputs += [None] * (4 - len(inputs))
        inputs.append(known or _initializer(node.graph, name, np.array(step, np.float32)))
    attributes = {"block_size": quantized.group, "activation": activations}
    return ir.node("QuantizedLinear", inputs, attributes, domain=DOMAIN)


__all__ = ["QuantizedWeight", "spell_quantized"]
