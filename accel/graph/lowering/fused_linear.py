"""Linear layers with what their kernels take in: neighbours over the same input, gates and activations."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from accel.graph.edit import ints, operands, producer, replace_value, sole_consumer, substitute
from accel.graph.fusions.rotary import column_range
from accel.graph.quantized import quantized_alike

DOMAIN = "accel.kernels"


def join_linears(graph: ir.Graph, before: ir.Node, outputs: Sequence[ir.Value]) -> ir.Value | None:
    """One Linear that computes all outputs side by side; None unless all are linears of one input, alike.

    Integer weights are alike if they have as many bits and as large groups.
    """
    nodes = [node for value in outputs if (node := producer(value, "Linear")) is not None]
    if len(nodes) != len(outputs) or len({id(node.inputs[0]) for node in nodes}) != 1:
        return None
    first = nodes[0]
    alike = {(len(node.inputs), node.attributes.get_int("transposed", 0)) for node in nodes}
    if len(alike) != 1 or any(node.domain != "accel" for node in nodes):
        return None
    weights = [node.inputs[1] for node in nodes]
    if not quantized_alike(weights):
        return None
    biases = [node.inputs[2] for node in nodes if len(node.inputs) > 2]
    attributes = {"weights": len(nodes), "transposed": first.attributes.get_int("transposed", 0)}
    made = ir.node("Linear", [first.inputs[0], *weights, *biases], attributes, domain=DOMAIN)
    output, like = made.outputs[0], first.outputs[0]
    output.type = like.type
    if like.shape is not None:
        width = sum(value.shape[-1] for value in outputs if value.shape is not None)  # type: ignore[misc]
        output.shape = ir.Shape([*like.shape[:-1], width])
    graph.insert_before(before, made)
    return output


def lower_linear(model: ir.Model) -> int:
    """``accel::Linear`` -> ``accel.kernels::Linear`` of one weight."""
    count = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("accel", "Linear"):
            continue
        attributes = {"weights": 1, "transposed": node.attributes.get_int("transposed", 0)}
        _swap(node, ir.node("Linear", list(node.inputs), attributes, domain=DOMAIN))
        count += 1
    return count


def drop_row_reshapes(model: ir.Model) -> int:
    """Takes out reshapes of [T, W] to [-1, W], which is what it was."""
    count = 0
    for node in list(model.graph):
        source, target = (node.inputs[0], ints(node.inputs[1])) if node.op_type == "Reshape" else (None, None)
        if source is None or source.shape is None or len(source.shape) != 2 or target is None:
            continue
        if target == [-1, source.shape[-1]]:
            replace_value(node.outputs[0], source)
            count += 1
    return count


def fuse_gates(model: ir.Model) -> int:
    """activation(x W_gate) * (x W_up) -> GatedLinear.

    The two products are linears of one input, or the halves of one linear. A gate that something else reads stays, and
    so do linears whose weights are quantised unlike each other.
    """
    count = 0
    for node in list(model.graph):
        pair = operands(node, "Mul")
        for activated, up in () if pair is None else (pair, pair[::-1]):
            gate, kind = _activation(activated)
            made = _gated(gate, up, kind) if gate is not None else None
            if made is not None:
                _swap(node, made)
                count += 1
                break
    return count


def fuse_activations(model: ir.Model) -> int:
    """activation(x W + b) -> one Linear."""
    count = 0
    for node in list(model.graph):
        source, kind = _activation(node.outputs[0]) if len(node.outputs) == 1 else (None, "")
        linear = producer(source, "Linear") if source is not None else None
        if linear is None or linear.domain != DOMAIN or "activation" in linear.attributes or source is None:
            continue
        readers = {use.node for use in source.uses()}
        sigmoid = {item for item in readers if item.op_type == "Sigmoid"}
        if readers - sigmoid != {node} or any(sole_consumer(item.outputs[0]) is not node for item in sigmoid):
            continue
        attributes = {**linear.attributes, "activation": ir.AttrString("activation", kind)}
        _swap(node, ir.node("Linear", list(linear.inputs), attributes, domain=DOMAIN))
        count += 1
    return count


def _activation(value: ir.Value) -> tuple[ir.Value | None, str]:
    """(x, kind) if the value is silu(x) or gelu(x), else (None, "")."""
    node = value.producer()
    if node is None or node.domain:
        return None, ""
    if node.op_type == "Gelu":
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        return node.inputs[0], "gelu_tanh" if tanh else "gelu"
    for x, gate in () if (pair := operands(node, "Mul")) is None else (pair, pair[::-1]):
        sigmoid = producer(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x, "silu"
    return None, ""


def _gated(gate: ir.Value, up: ir.Value, kind: str) -> ir.Node | None:
    linears = [producer(value, "Linear") for value in (gate, up)]
    attributes: dict[str, int | str] = {"activation": kind}
    if all(node is not None and node.domain == DOMAIN for node in linears):
        first, second = (node for node in linears if node is not None)
        same = first.inputs[0] is second.inputs[0] and len(first.inputs) == len(second.inputs)
        plain = all(
            node.attributes.get_int("weights", 1) == 1 and "activation" not in node.attributes
            for node in (first, second)
        )
        turned = {node.attributes.get_int("transposed", 0) for node in (first, second)}
        alike = quantized_alike([first.inputs[1], second.inputs[1]])
        if same and plain and alike and len(turned) == 1 and first is not second:
            inputs = [first.inputs[0], first.inputs[1], second.inputs[1], *first.inputs[2:], *second.inputs[2:]]
            attributes |= {"weights": 2, "transposed": turned.pop()}
            return ir.node("GatedLinear", inputs, attributes, domain=DOMAIN)
        return None
    halves = [column_range(value) for value in (gate, up)]
    if not all(halves):
        return None
    (source, start, middle), (other, begin, stop) = halves  # type: ignore[misc]
    linear = producer(source, "Linear")
    width = source.shape[-1] if source.shape is not None else None
    if linear is None or linear.domain != DOMAIN or other is not source or (start, begin, stop) != (0, middle, width):
        return None
    if middle * 2 != width or "activation" in linear.attributes:
        return None
    attributes |= {"weights": 1, "transposed": linear.attributes.get_int("transposed", 0)}  # type: ignore[dict-item]
    return ir.node("GatedLinear", list(linear.inputs), attributes, domain=DOMAIN)


def _swap(old: ir.Node, new: ir.Node) -> None:
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    substitute(old, [new], [new.outputs[0]])


__all__ = ["DOMAIN", "drop_row_reshapes", "fuse_activations", "fuse_gates", "join_linears", "lower_linear"]
