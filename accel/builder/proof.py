"""Proof that a parsed network says what its graph says: nothing dropped, nothing added, types as asked.

Checked of the whole network: inputs are all read, inputs and outputs have the graph's types and shapes, every node
has layers, norms and logits are float32. Of each attention layer: one fused attention that carries the graph's mask
and nothing else (no causality, no lengths), the scale once and on the query, keys and values straight from the
in-place cache update, types of the variant. Of each cache: updated in place from a network input to an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import numpy_helper

from accel.builder.network_view import NetworkView
from accel.builder.parse import ParsedNetwork
from accel.errors import EngineProofError
from accel.spec import ArchSpec

_NORMS = ("LayerNormalization", "RMSNormalization")
# Nodes that may leave no layer: they fold into shapes, or do nothing.
_FOLDS = ("Shape", "Identity", "Squeeze", "Unsqueeze", "Concat", "Cast", "Reshape", "Transpose", "Constant", "Expand")


@dataclass(frozen=True)
class ProofRow:
    """One thing that was checked: where, what, and both sides as text."""

    where: str
    check: str
    expected: str
    found: str

    @property
    def holds(self) -> bool:
        return self.expected == self.found


@dataclass(frozen=True)
class ProofTable:
    """All rows of one network."""

    rows: tuple[ProofRow, ...]

    @property
    def failures(self) -> tuple[ProofRow, ...]:
        return tuple(row for row in self.rows if not row.holds)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Rows for JSON."""
        return [{**asdict(row), "holds": row.holds} for row in self.rows]


def prove(parsed: ParsedNetwork, arch: ArchSpec, dtype: str) -> ProofTable:
    """Compares a (repaired) network with its graph.

    Args:
        parsed: From ``parse_graph``, after ``repair``.
        arch: The model's.
        dtype: The variant's: float32, float16 or bfloat16.

    Raises:
        EngineProofError: A row does not hold; names node, layer and remedy.
    """
    table = ProofTable(tuple(_Proof(parsed, arch, dtype).rows()))
    if table.failures:
        first = table.failures[0]
        more = f", and {len(table.failures) - 1} more" if len(table.failures) > 1 else ""
        raise EngineProofError(
            f"the network is not what the graph says: {first.check} is {first.found} instead of {first.expected}{more}",
            where=first.where,
            remedy=f"{parsed.flavour.title} {parsed.flavour.version} parses this graph wrongly; report the model's "
            "configuration, and run it on another engine (ort-cpu)",
        )
    return table


class _Proof:
    def __init__(self, parsed: ParsedNetwork, arch: ArchSpec, dtype: str) -> None:
        self.parsed, self.arch, self.dtype = parsed, arch, dtype
        self.view = NetworkView(parsed)
        self.nodes = {node.name: node for node in parsed.graph.node}
        self.makers = {name: node for node in parsed.graph.node for name in node.output}
        self.initializers = {tensor.name: tensor for tensor in parsed.graph.initializer}
        network = parsed.network
        self.inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
        self.outputs = {t.name: t for t in (network.get_output(i) for i in range(network.num_outputs))}

    def rows(self) -> Iterator[ProofRow]:
        yield from self._interface()
        yield from self._all_nodes()
        yield from self._norms()
        for index, layer in enumerate(self.arch.layers):
            if layer.softcap is None:
                yield from self._attention(index)
            if self.arch.kind == "decoder":
                yield from self._caches(index)
        fused = sum(layer.softcap is None for layer in self.arch.layers)
        yield _row("network", "attention layers", fused, len(self.view.of_type("ATTENTION_INPUT")))
        caches = 2 * len(self.arch.layers) if self.arch.kind == "decoder" else 0
        yield _row("network", "cache updates", caches, len(self.view.of_type("KV_CACHE_UPDATE")))

    def _interface(self) -> Iterator[ProofRow]:
        graph = self.parsed.graph
        weights = set(self.initializers)
        for kind, values, tensors in (("input", graph.input, self.inputs), ("output", graph.output, self.outputs)):
            for value in values:
                if value.name in weights:
                    continue
                where, tensor = f"{kind} {value.name}", tensors.get(value.name)
                yield _row(where, "presence", "there", "there" if tensor is not None else "missing")
                if tensor is None:
                    continue
                expected = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
                yield _row(where, "type", expected, self.view.dtype(tensor))
                yield _row(where, "shape", _dims(value), [size if size >= 0 else "?" for size in tensor.shape])
                if kind == "input":
                    read = "read" if self.view.readers.get(value.name) else "dropped"
                    yield _row(where, "use", "read", read)
        extra = sorted({*self.inputs, *self.outputs} - {value.name for value in [*graph.input, *graph.output]})
        yield _row("network", "inputs and outputs of its own", [], extra)

    def _all_nodes(self) -> Iterator[ProofRow]:
        for name, node in self.nodes.items():
            if node.op_type in _FOLDS or self._is_shape_arithmetic(node):
                continue
            if name not in self.view.by_node:
                yield _row(f"node {name} ({node.op_type})", "presence", "a layer", "none")
        yield _row("network", "nodes with layers", "all", "all")

    def _is_shape_arithmetic(self, node: onnx.NodeProto) -> bool:
        """Gather, Slice, ... over a Shape, which become a dimension."""
        sources = [self.makers[name] for name in node.input if name in self.makers]
        known = all(name in self.makers or name in self.initializers for name in node.input)
        return known and all(item.op_type == "Shape" or self._is_shape_arithmetic(item) for item in sources)

    def _norms(self) -> Iterator[ProofRow]:
        for name, node in self.nodes.items():
            if node.op_type not in _NORMS:
                continue
            types = {
                self.view.dtype(layer.get_input(place))
                for layer in self.view.by_node.get(name, [])
                for place in range(layer.num_inputs)
                if layer.get_input(place) is not None
            }
            yield _row(f"node {name} ({node.op_type})", "computed in", ["float32"], sorted(types))

    def _attention(self, index: int) -> Iterator[ProofRow]:
        name = f"layers.{index}.attention"
        where = f"node {name} (Attention), layer {index}"
        layers = [layer for layer in self.view.of_type("ATTENTION_INPUT") if layer.attention.name == name]
        yield _row(where, "fused attention", 1, len(layers))
        if len(layers) != 1:
            return
        layer, node, flavour = layers[0], self.nodes[name], self.parsed.flavour
        attention = layer.attention
        query, key, value = (layer.get_input(place) for place in range(3))
        yield _row(where, "causality of its own", "none", flavour.causal_kind(attention))
        lengths = ["given" for tensor in flavour.lengths(attention) if tensor is not None]
        yield _row(where, "lengths of its own", [], lengths)
        mask = node.input[3] if len(node.input) > 3 else None
        yield _row(where, "mask", mask, attention.mask.name if attention.mask is not None else None)
        yield _row(where, "softmax", "SOFTMAX", attention.norm_op.name)
        yield _row(where, "written out", self.dtype == "float32", bool(attention.decomposable))
        yield _row(where, "types", [self.dtype] * 3, [self.view.dtype(tensor) for tensor in (query, key, value)])
        yield _row(where, "query", node.input[0], query.name)
        yield from self._scale(index, where, query)
        if self.arch.kind == "decoder":
            names = [f"present.{index}.{part}" for part in ("key", "value")]
            yield _row(where, "keys and values", names, [key.name, value.name])
        else:
            yield _row(where, "keys and values", list(node.input[1:3]), [key.name, value.name])

    def _scale(self, index: int, where: str, query: Any) -> Iterator[ProofRow]:
        """The product that makes the query, by the graph's own constant."""
        name = f"layers.{index}.scale"
        node, product = self.nodes.get(name), self.view.maker(query, "ELEMENTWISE")
        origin = bool(product is not None and product in self.view.by_node.get(name, []))
        yield _row(where, "scale", "a product by the layer's constant", "a product by the layer's constant" if origin
                   else "none")  # fmt: skip
        if node is None or product is None:
            return
        yield _row(where, "operation of the scale", "PROD", product.op.name)
        constant = self.view.constant(product.get_input(1))
        yield _row(where, "constant of the scale", node.input[1], None if constant is None else constant.name)
        tensor = self.initializers.get(node.input[1])
        held, found = None if tensor is None else float(_array(tensor)), self.view.number(product.get_input(1))
        if found is not None:  # NumPy reads no bfloat16; there the constant's name must do
            yield _row(where, "value of the scale", held, found)
        asked = self.arch.layers[index].scale
        close = held is not None and abs(held - asked) <= 2**-7 * abs(asked)  # rounded to bfloat16 at worst
        yield _row(where, "scale of the architecture", asked, asked if close else held)

    def _caches(self, index: int) -> Iterator[ProofRow]:
        for part in ("key", "value"):
            name = f"layers.{index}.{part}_update"
            where = f"node {name} (TensorScatter), layer {index}"
            layers = [layer for layer in self.view.by_node.get(name, []) if layer.type.name == "KV_CACHE_UPDATE"]
            yield _row(where, "cache update", 1, len(layers))
            if len(layers) != 1:
                continue
            past, present = f"past.{index}.{part}", f"present.{index}.{part}"
            names = [layers[0].get_input(0).name, layers[0].get_output(0).name]
            yield _row(where, "from input to output", [past, present], names)
            ends = ["in" if past in self.inputs else "no input", "out" if present in self.outputs else "no output"]
            yield _row(where, "network input and output", ["in", "out"], ends)
            yield _row(where, "type", self.dtype, self.view.dtype(layers[0].get_output(0)))


def _array(tensor: onnx.TensorProto) -> Any:
    return numpy_helper.to_array(tensor).astype("float64").reshape(())


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else "?" for dim in value.type.tensor_type.shape.dim]


def _row(where: str, check: str, expected: object, found: object) -> ProofRow:
    return ProofRow(where, check, str(expected), str(found))


__all__ = ["ProofRow", "ProofTable", "prove"]
