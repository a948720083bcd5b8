"""Rows of the proof about the graph's nodes: each became the layers that it should, with its operation, its attributes
and its operands.

What a node should become is a program in words, a line for each layer. ``LessOrEqual`` of a and b is

    LESS(a, b); EQUAL(a, b); OR(#0, #1)

where ``#0`` is what the first line makes. The network's layers are put into the same words and compared. The words
are those of the parser in TensorRT-RTX 1.7. Layers without metadata are the parser's own (it changes shapes to
broadcast): operands are followed through them. Nodes whose operator has no program here are proven to be there, no
more; the table names them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from accel.builder.network import PASSES_ON, NetworkView
from accel.builder.proof_table import ProofRow
from accel.builder.quantized_proof import ROUNDINGS, rounding_head, rounding_line
from accel.builder.source import GraphSource
from accel.errors import EngineProofError

Program = list[str]
_ELEMENTWISE = {
    "Add": "SUM",
    "Sub": "SUB",
    "Mul": "PROD",
    "Div": "DIV",
    "Pow": "POW",
    "Max": "MAX",
    "Min": "MIN",
    "And": "AND",
    "Or": "OR",
    "Xor": "XOR",
    "Equal": "EQUAL",
    "Greater": "GREATER",
    "Less": "LESS",
}
_UNARY = {
    "Abs": "ABS",
    "Neg": "NEG",
    "Not": "NOT",
    "Sqrt": "SQRT",
    "Reciprocal": "RECIP",
    "Exp": "EXP",
    "Log": "LOG",
    "Sin": "SIN",
    "Cos": "COS",
    "Erf": "ERF",
    "Floor": "FLOOR",
    "Ceil": "CEIL",
    "Round": "ROUND",
    "Sign": "SIGN",
}
_ACTIVATIONS = {"Relu": "RELU", "Sigmoid": "SIGMOID", "Tanh": "TANH"}
_REDUCTIONS = {"ReduceMean": "AVG", "ReduceSum": "SUM", "ReduceMax": "MAX", "ReduceMin": "MIN", "ReduceProd": "PROD"}
# Their further operands are shapes that the parser computes in its own way.
_DATA_OPERANDS = {"SHUFFLE": 1, "SLICE": 1, "FILL": 0}


def operation_rows(view: NetworkView, source: GraphSource) -> Iterator[ProofRow]:
    """One row for each operator that is right everywhere, and one for each node that is not.

    Raises:
        EngineProofError: The network's shapes do not fit together, or a value is not in it.
    """
    words, folded = _Words(view, source), source.folded()
    right: dict[str, int] = defaultdict(int)
    unknown: set[str] = set()
    for node in source.needed():
        layers = view.of_node(node.name)
        if node.op_type in ("Constant", "Attention") or (not layers and all(name in folded for name in node.output)):
            continue  # attention has rows of its own
        expected = _program(node, words)
        if expected is None:
            unknown.add(node.op_type)
            continue
        found = words.program(layers, node)
        if expected == found:
            right[node.op_type] += 1
        else:
            texts = ("; ".join(expected), "; ".join(found) or "no layer")
            yield ProofRow(source.layer_index(node.name), node.name, f"{node.op_type} layers", *texts, False)
    for op, count in sorted(right.items()):
        yield ProofRow(None, "", f"{op} nodes", f"{count} as they say", f"{count} as they say", True)
    names = ", ".join(sorted(unknown)) or "none"
    yield ProofRow(None, "", "operators proven by presence alone", names, names, True)


class _Words:
    """Layers and tensors of a network in the words of its graph."""

    def __init__(self, view: NetworkView, source: GraphSource) -> None:
        self.view, self.source = view, source
        self._values = {name for node in source.proto.graph.node for name in node.output}
        self._values.update(spec.name for spec in source.inputs)

    def program(self, layers: Sequence[Any], node: Any) -> Program:
        """What a node's layers compute; further lines where the last of them do not become the node's outputs."""
        own = {layer.name: f"#{place}" for place, layer in enumerate(layers)}
        lines = [f"{self._head(layer)}({', '.join(self._operands(layer, own))})" for layer in layers]
        if node.op_type == "Slice":  # where it begins may be a tensor as well
            lines = [re.sub(r" from \[[^\]]*\]", "", line) for line in lines]
        for place, output in enumerate(node.output if layers else (), len(layers) - len(node.output)):
            made = self.view.tensor(output)
            maker = "nothing" if made is None else self._said(made, own, through={output})
            lines += [] if maker == f"#{place}" else [f"{output} = {maker}"]
        return lines

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value, -1 where it varies.

        Raises:
            EngineProofError: The network has no such value.
        """
        tensor = self.view.tensor(name)
        if tensor is not None:
            return self.view.shape(tensor)
        stored = self.source.shape_of(name)
        if stored is not None:
            return stored
        constant = self.source.constant(name)
        if constant is None:
            remedy = "Lower the node that makes it so that the parser keeps it"
            raise EngineProofError(f"The network has lost the value {name}", remedy=remedy)
        return constant.shape

    def rank(self, name: str) -> int:
        """Of a value; raises as ``shape``."""
        return len(self.shape(name))

    def _operands(self, layer: Any, own: dict[str, str]) -> list[str]:
        tensors = self.view.operands(layer)
        return [self._said(tensor, own) for tensor in tensors[: _DATA_OPERANDS.get(layer.type.name)]]

    def _said(self, tensor: Any, own: dict[str, str], through: set[str] = frozenset()) -> str:  # type: ignore[assignment]
        """A value's name, ``#n`` for a layer of the same node, or a number."""
        while True:
            maker = self.view.producer(tensor)
            if maker is not None and maker.name in own:
                return own[maker.name]
            if maker is None or (tensor.name in self._values and tensor.name not in through):
                return str(tensor.name)
            if maker.type.name == "CONSTANT":
                return self._constant(maker)
            if maker.metadata or maker.type.name not in PASSES_ON:
                return str(tensor.name)
            tensor = maker.get_input(0)

    def _constant(self, layer: Any) -> str:
        if self.source.is_constant(layer.name):
            return str(layer.name)
        weights = layer.weights if isinstance(layer.weights, np.ndarray) else np.array([])
        values = np.unique(weights.astype(np.float32))
        return _number(values[0]) if values.size == 1 else f"constant {layer.name}"

    def _head(self, layer: Any) -> str:
        read = _HEADS.get(layer.type.name)
        return str(layer.type.name) if read is None else read(self.view, layer)


def _shuffle(view: NetworkView, layer: Any) -> str:
    ranks = [len(view.shape(tensor)) for tensor in (layer.get_input(0), layer.get_output(0))]
    orders = [list(layer.first_transpose)[: ranks[0]], list(layer.second_transpose)[: ranks[1]]]
    said = [f" {'first' if place == 0 else 'then'} {order}" for place, order in enumerate(orders) if _moves(order)]
    return "SHUFFLE" + "".join(said)


def _slice(view: NetworkView, layer: Any) -> str:
    # The library warns when it is asked for a start that is a tensor.
    moving = layer.num_inputs > 1 and layer.get_input(1) is not None
    start = [] if moving else list(layer.start)
    return f"SLICE from {start}" if any(start) else "SLICE"


def _moves(order: list[int]) -> bool:
    return order != list(range(len(order)))


_HEADS: dict[str, Callable[[NetworkView, Any], str]] = {
    "ELEMENTWISE": lambda view, layer: layer.op.name,
    "UNARY": lambda view, layer: layer.op.name,
    "ACTIVATION": lambda view, layer: view.flavour.activation_of(layer),
    "MATRIX_MULTIPLY": lambda view, layer: f"MATRIX_MULTIPLY {layer.op0.name}, {layer.op1.name}",
    "NORMALIZATION": lambda view, layer: _normalization(layer.epsilon, layer.axes, layer.num_groups),
    "REDUCE": lambda view, layer: f"REDUCE {layer.op.name} axes {_bits(layer.axes)} keep {bool(layer.keep_dims)}",
    "SOFTMAX": lambda view, layer: f"SOFTMAX axes {_bits(layer.axes)}",
    "GATHER": lambda view, layer: f"GATHER {layer.mode.name} axis {layer.axis}",
    "CONCATENATION": lambda view, layer: f"CONCATENATION axis {layer.axis}",
    "CAST": lambda view, layer: f"CAST {view.flavour.dtype_name(layer.to_type)}",
    "FILL": lambda view, layer: f"FILL {layer.operation.name}",
    "ROTARY_EMBEDDING": lambda view, layer: _rotary(bool(layer.interleaved), layer.rotary_embedding_dim),
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    **dict.fromkeys(("QUANTIZE", "DEQUANTIZE"), rounding_head),
}


def _program(node: Any, words: _Words) -> Program | None:
    """The lines for a node; None: nothing is known of its operator."""
    op, operands, attributes = node.op_type, [name for name in node.input if name], _attributes(node)
    listed = f"({', '.join(operands)})"
    if node.domain not in ("", "ai.onnx"):
        return None
    if op in _ELEMENTWISE:
        first, *rest = operands
        return [f"{_ELEMENTWISE[op]}({f'#{i - 1}' if i else first}, {name})" for i, name in enumerate(rest)]
    if op in _UNARY or op in _ACTIVATIONS:
        return [{**_UNARY, **_ACTIVATIONS}[op] + listed]
    if op in _REDUCTIONS:
        return _reduction(op, operands, attributes, words)
    if op in ROUNDINGS:
        return [rounding_line(op, operands, attributes, words.source, words.shape) + listed]
    rule = _RULES.get(op)
    return None if rule is None else rule(operands, attributes, words, listed)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _reduction(op: str, operands: list[str], attributes: dict[str, Any], words: _Words) -> Program:
    axes = words.source.constant(operands[1]) if len(operands) > 1 else attributes.get("axes")
    rank = words.rank(operands[0])
    places = sorted(int(axis) % rank for axis in np.ravel(range(rank) if axes is None else axes))
    return [f"REDUCE {_REDUCTIONS[op]} axes {places} keep {bool(attributes.get('keepdims', 1))}({operands[0]})"]


def _or_equal(op: str) -> Callable[..., Program]:
    return lambda operands, attributes, words, listed: [op + listed, "EQUAL" + listed, "OR(#0, #1)"]


def _gemm(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    # Other factors than 1 become products of their own: no line says so, and the row fails.
    sides = ["TRANSPOSE" if attributes.get(name) else "NONE" for name in ("transA", "transB")]
    product = f"MATRIX_MULTIPLY {', '.join(sides)}({', '.join(operands[:2])})"
    return [product, *(f"SUM(#0, {bias})" for bias in operands[2:])]


def _softmax(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    return [f"SOFTMAX axes {[attributes.get('axis', -1) % words.rank(operands[0])]}{listed}"]


def _gather(mode: str) -> Callable[..., Program]:
    def program(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
        return [f"GATHER {mode} axis {attributes.get('axis', 0) % words.rank(operands[0])}{listed}"]

    return program


def _concat(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    return [f"CONCATENATION axis {attributes['axis'] % words.rank(operands[0])}{listed}"]


def _cast(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    from onnx import helper

    return [f"CAST {np.dtype(helper.tensor_dtype_to_np_dtype(attributes['to'])).name}{listed}"]


def _transpose(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    order = list(attributes.get("perm") or reversed(range(words.rank(operands[0]))))
    return [f"SHUFFLE{f' first {order}' if _moves(order) else ''}{listed}"]


def _gelu(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    return [("GELU_TANH" if attributes.get("approximate") == b"tanh" else "GELU_ERF") + listed]


def _swish(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    alpha = _number(attributes.get("alpha", 1.0))
    return [f"PROD({alpha}, {operands[0]})", "SIGMOID(#0)", f"PROD({operands[0]}, #1)"]


def _normalized_axes(operands: list[str], attributes: dict[str, Any], words: _Words) -> list[int]:
    rank = words.rank(operands[0])
    return list(range(attributes.get("axis", -1) % rank, rank))


def _layer_norm(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    mask = sum(1 << axis for axis in _normalized_axes(operands, attributes, words))
    head = _normalization(attributes.get("epsilon", 1e-5), mask, 1)
    return [f"{head}({', '.join([*operands, '0'][:3])})"]  # the parser makes a bias of zeros where there is none


def _rms_norm(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    x, weight = operands
    mean = f"REDUCE AVG axes {_normalized_axes(operands, attributes, words)} keep True(#0)"
    epsilon = _number(attributes.get("epsilon", 1e-5))
    return [f"PROD({x}, {x})", mean, f"SUM(#1, {epsilon})", "SQRT(#2)", f"DIV({x}, #3)", f"PROD(#4, {weight})"]


def _rotate(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    head = _rotary(bool(attributes.get("interleaved", 0)), attributes.get("rotary_embedding_dim", 0))
    if words.rank(operands[0]) == 4:
        return [head + listed]
    heads = f"({', '.join(['#0', *operands[1:]])})"  # [B, S, heads * D]: turned to [B, heads, S, D] and back
    return [f"SHUFFLE then [0, 2, 1, 3]({operands[0]})", head + heads, "SHUFFLE first [0, 2, 1, 3](#1)"]


def _shape(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    start = attributes.get("start", 0)
    part = [f"SLICE from {[start]}(#1)" if start else "SLICE(#1)"] if start or "end" in attributes else []
    return ["SHAPE" + listed, "CAST int64(#0)", *part]


def _split(operands: list[str], attributes: dict[str, Any], words: _Words, listed: str) -> Program:
    """A slice for each part, from where the one before ends."""
    shape = words.shape(operands[0])
    axis = attributes.get("axis", 0) % len(shape)
    sizes = words.source.constant(operands[1]) if len(operands) > 1 else None
    if sizes is None:
        count = attributes.get("num_outputs", 1)
        sizes = np.full(count, -(-shape[axis] // count))  # the last may be smaller
    starts = [[int(at) if place == axis else 0 for place in range(len(shape))] for at in np.cumsum(sizes) - sizes]
    return [f"SLICE{f' from {start}' if any(start) else ''}({operands[0]})" for start in starts]


_RULES: dict[str, Callable[[list[str], dict[str, Any], _Words, str], Program]] = {
    "LessOrEqual": _or_equal("LESS"),
    "GreaterOrEqual": _or_equal("GREATER"),
    "MatMul": lambda operands, attributes, words, listed: [f"MATRIX_MULTIPLY NONE, NONE{listed}"],
    "Gemm": _gemm,
    "Softmax": _softmax,
    "Gather": _gather("DEFAULT"),
    "GatherElements": _gather("ELEMENT"),
    "Concat": _concat,
    "Cast": _cast,
    "Transpose": _transpose,
    "Where": lambda operands, attributes, words, listed: [f"SELECT{listed}"],
    "Gelu": _gelu,
    "Swish": _swish,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotate,
    "Shape": _shape,
    "Range": lambda operands, attributes, words, listed: ["FILL LINSPACE()"],
    "Reshape": lambda operands, attributes, words, listed: [f"SHUFFLE({operands[0]})"],
    "Split": _split,
    "Expand": lambda operands, attributes, words, listed: [f"SLICE({operands[0]})"],
    "Slice": lambda operands, attributes, words, listed: [f"SLICE({operands[0]})"],
    "CumSum": lambda operands, attributes, words, listed: [f"CUMULATIVE{listed}"],
    "Squeeze": lambda operands, attributes, words, listed: [f"SQUEEZE{listed}"],
    "Unsqueeze": lambda operands, attributes, words, listed: [f"UNSQUEEZE{listed}"],
    "TensorScatter": lambda operands, attributes, words, listed: [f"KV_CACHE_UPDATE{listed}"],
}


def _normalization(epsilon: float, axes: int, groups: int) -> str:
    return f"NORMALIZATION epsilon {_number(epsilon)} axes {_bits(axes)} groups {groups}"


def _rotary(interleaved: bool, dim: int) -> str:
    return f"ROTARY_EMBEDDING interleaved {interleaved} dim {dim}"


def _bits(mask: int) -> list[int]:
    return [place for place in range(mask.bit_length()) if mask >> place & 1]


def _number(value: Any) -> str:
    return f"{float(np.float32(value)):.6g}"


__all__ = ["operation_rows"]
