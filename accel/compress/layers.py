"""The weights of a canonical graph that can become integers, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from accel.graph.edit import producer
from accel.spec import ArchSpec

Role = Literal["linear", "head", "table", "tied"]
FEW_OUTPUTS = 16
_DOMAIN = "accel"


@dataclass(eq=False)
class Layer:
    """One weight matrix and the nodes that read it.

    Attributes:
        name: Of the weight, as in the checkpoint.
        weight: The initializer: [N, K], or [K, N] where ``transposed`` is 0.
        transposed: As of its ``accel::Linear`` nodes: 1 where rows are outputs.
        role: ``head``: makes the logits over the vocabulary; ``table``: the embedding of the ids; ``tied``: both.
        linears: Its products, in graph order.
        gathers: Its look-ups, in graph order.
    """

    name: str
    weight: ir.Value
    transposed: int = 1
    role: Role = "linear"
    linears: list[ir.Node] = field(default_factory=list)
    gathers: list[ir.Node] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs N, inputs K)."""
        first, second = (int(size) for size in self.weight.shape)  # type: ignore[union-attr]
        return (first, second) if self.transposed else (second, first)

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


def find_layers(model: ir.Model, arch: ArchSpec) -> tuple[list[Layer], dict[str, str]]:
    """The weights that may become integers, in the order of their first use, and the matrices that may not.

    Cases that stay float:
        1. Tables of positions and of token types: small beside the rest, and every token's vector carries their error.
        2. Fewer than 16 outputs, as classifiers have: nothing is gained, and each output is an answer.
        3. A matrix that something else reads, or that two products read in different orientation.

    Args:
        model: Canonical.

    Returns:
        Layers, and {initializer: reason}.
    """
    layers: dict[ir.Value, Layer] = {}
    reasons: dict[str, str] = {}
    for node in model.graph:
        for value in _matrices(node):
            layers.setdefault(value, Layer(value.name or "", value))
    for layer in layers.values():
        reason = _collect(layer, arch)
        if reason:
            reasons[layer.name] = reason
    return [layer for layer in layers.values() if layer.name not in reasons], reasons


def _matrices(node: ir.Node) -> Iterator[ir.Value]:
    place = 1 if node.op_type == "Linear" and node.domain == _DOMAIN else 0 if node.op_type == "Gather" else None
    value = node.inputs[place] if place is not None else None
    if value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT:
        yield from [value] if value.shape is not None and len(value.shape) == 2 else []


def _collect(layer: Layer, arch: ArchSpec) -> str | None:
    """Fills in the layer's nodes and role; why it stays float, if it does."""
    turned = set()
    for use in layer.weight.uses():
        node = use.node
        if node.op_type == "Linear" and node.domain == _DOMAIN and use.idx == 1:
            layer.linears.append(node)
            turned.add(node.attributes["transposed"].as_int())
        elif node.op_type == "Gather" and use.idx == 0 and node.attributes.get_int("axis", 0) == 0:
            if not _of_ids(node.inputs[1]):
                return "a table of positions or token types: small, and its error is in every token's vector"
            layer.gathers.append(node)
        else:
            return f"a {node.op_type} node reads it"
    if layer.gathers:
        turned.add(1)  # a table's rows are tokens, as the head's outputs are
    if len(turned) != 1:
        return "two products read it in different orientation"
    layer.transposed = turned.pop()
    outputs = layer.shape[0]
    if layer.gathers:
        layer.role = "tied" if layer.linears else "table"
    elif outputs == arch.vocab_size:
        layer.role = "head"
    if not layer.gathers and outputs < FEW_OUTPUTS:
        return f"{outputs} outputs: too few to gain anything, and each is an answer"
    return None


def _of_ids(indices: ir.Value | None) -> bool:
    """Whether a look-up's indices are the graph's token ids themselves."""
    while indices is not None:
        if indices.name == "input_ids":
            return indices.is_graph_input()
        node = producer(indices, "Unsqueeze", "Reshape", "Cast", "Identity", "Squeeze")
        indices = node.inputs[0] if node is not None else None
    return False


__all__ = ["Layer", "Role", "find_layers"]
