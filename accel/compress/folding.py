"""Places where a factor per channel can be moved from one layer into another without changing the model.

A product's input channels times s, and what makes that input divided by s, is the same model: quantisation alone sees
a difference. AWQ and SmoothQuant choose s; this module knows where it may go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.compress.layers import Layer
from accel.graph.edit import producer

Kind = Literal["norm", "gate", "value"]
_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True)
class Site:
    """One tensor that products read, and what can take the inverse of their factor.

    Attributes:
        kind: ``norm``: a norm's weight and bias; ``gate``: the rows of the layer whose output is multiplied by the gate
            (``up`` for ``down``); ``value``: the rows of the values' layer for the layer behind attention.
        layers: Whose products read it; their columns take the factor.
        products: These products, in graph order.
        producer: Norm node, or the ``accel::Linear`` whose rows take the inverse.
        shared: Consecutive runs of input channels that must have equal factors, as (heads, heads that share a value
            head, size of a head); None: every channel has its own.
    """

    kind: Kind
    layers: tuple[Layer, ...]
    products: tuple[ir.Node, ...]
    producer: ir.Node
    shared: tuple[int, int, int] | None = None

    def share(self, factor: NDArray[np.float32]) -> NDArray[np.float32]:
        """The factor [K] with equal numbers (their geometric mean) where channels come from the same value row."""
        if self.shared is None:
            return factor
        heads, group, dim = self.shared
        logs = np.log(factor).reshape(heads // group, group, dim)
        return np.exp(np.broadcast_to(logs.mean(1, keepdims=True), logs.shape)).reshape(-1).astype(np.float32)


def find_sites(model: ir.Model, layers: Sequence[Layer]) -> list[Site]:
    """The sites of a canonical graph, in graph order.

    Cases:
        1. Norm -> products: every reader of the norm's output is a product of a quantised layer, and the norm's weight
           (and bias) has no other reader. Through a choice of positions (``Gather``) too, as in front of a head.
        2. (activation(gate) * up) -> product: ``up`` is a product's output that nothing else reads.
        3. Attention -> product, when its values come from a product of their own that nothing else reads. With grouped
           heads the factor is one for all heads that share a value head.
    Refused: a layer that is tied to the table (its rows are looked up too), one with several products, and everything
    else that reads such a tensor.
    """
    by_product = {
        node: layer for layer in layers if layer.role != "tied" and len(layer.linears) == 1 for node in layer.linears
    }
    sites, seen = [], set[ir.Value]()
    for node in model.graph:
        value = node.inputs[0] if node in by_product else None
        if value is None or value in seen:
            continue
        seen.add(value)
        readers = [use.node for use in value.uses()]
        if value.is_graph_output() or not all(reader in by_product for reader in readers):
            continue
        products = tuple(sorted(readers, key=list(by_product).index))
        maker = _maker(value, by_product)
        if maker is not None:
            kind, origin, shared = maker
            sites.append(Site(kind, tuple(by_product[item] for item in products), products, origin, shared))
    return sites


def fold(site: Site, factor: NDArray[np.float32]) -> None:
    """Moves a factor [K] > 0 into the site's layers, its inverse into what makes their input.

    Weights are replaced in the graph; integers that they had are lost.
    """
    for layer in site.layers:
        weight = _array(layer.weight)
        _replace(layer.weight, weight * (factor if layer.transposed else factor[:, None]))
    inverse = _by_row(site, np.float32(1) / factor)
    for place, value in enumerate(site.producer.inputs[1:], 1):
        if value is None:
            continue
        weight = _array(value)
        if site.kind != "norm" and place == 1 and site.producer.attributes["transposed"].as_int():
            _replace(value, weight * inverse[:, None])
        else:  # a vector, or a matrix whose columns are outputs
            _replace(value, weight * inverse)


def _by_row(site: Site, factor: NDArray) -> NDArray:
    """The factor of each output of the producer."""
    if site.shared is None:
        return factor
    heads, group, dim = site.shared
    return factor.reshape(heads // group, group, dim)[:, 0].reshape(-1)


def _maker(
    value: ir.Value, products: Mapping[ir.Node, Layer]
) -> tuple[Kind, ir.Node, tuple[int, int, int] | None] | None:
    source = _through(value, "Gather")
    norm = producer(source, *_NORMS)
    if norm is not None and _owns_parameters(norm) and (source is value or _only_reader(source)):
        return "norm", norm, None
    gated = producer(value, "Mul")
    if gated is not None:
        for operand in gated.inputs:
            linear = producer(operand, "Linear")
            if linear in products and operand is not None and _only_reader(operand):
                return "gate", linear, None
        return None
    source = _through(value, "Reshape")
    attention = producer(source, "Attention", "CachedAttention")
    if attention is None or attention.domain != "accel" or not _reshapes_alone(value, source):
        return None
    return _values(attention, products)


def _values(
    attention: ir.Node, products: Mapping[ir.Node, Layer]
) -> tuple[Kind, ir.Node, tuple[int, int, int] | None] | None:
    values = attention.inputs[2]
    assert values is not None
    source = _through(values, "Reshape")
    linear = producer(source, "Linear")
    if linear not in products or not _reshapes_alone(values, source):
        return None
    heads, kv_heads = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    layer = products[linear]
    return "value", linear, (heads, heads // kv_heads, layer.shape[0] // kv_heads)


def _through(value: ir.Value, op_type: str) -> ir.Value:
    """Below nodes of one type, each of which takes its data first."""
    node = producer(value, op_type)
    below = node.inputs[0] if node is not None else None
    return value if below is None else _through(below, op_type)


def _reshapes_alone(value: ir.Value, source: ir.Value) -> bool:
    """Whether nothing else reads what lies between two values."""
    while value is not source:
        node = value.producer()
        assert node is not None and node.inputs[0] is not None
        value = node.inputs[0]
        if not _only_reader(value):
            return False
    return True


def _only_reader(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _owns_parameters(norm: ir.Node) -> bool:
    parameters: Iterable[ir.Value | None] = norm.inputs[1:]
    return all(value is None or (value.is_initializer() and _only_reader(value)) for value in parameters)


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None, value.name
    return value.const_value.numpy().astype(np.float32)


def _replace(value: ir.Value, array: NDArray) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name)


__all__ = ["Site", "find_sites", "fold"]
