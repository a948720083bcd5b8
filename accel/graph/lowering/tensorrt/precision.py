"""fp16 and bf16 with explicit casts, as strongly typed networks want them.

float32 islands: norms, softmax and the other functions of ``ISLANDS``; the residual stream, which the norms read
anyway (in fp16 its sums lose most of what a model loses at all, and overflow in some); angles computed from
positions; and whatever stands between the last matrix product and an output (logits and their softcap). Matrix
products, attention, caches and rotations run in the low type; so do rounding to 8 bits and back, on both sides of
which a product's operands and their scales are in one type. The rest follows its inputs: low as soon as one is.

Logits are float32 but were rounded once: they come out of the last matrix product in the low type (one part in 2048
in fp16, in 256 in bf16, of each logit) and are cast then. There is no product with low operands and a float32 result
in a strongly typed network. Measured with TensorRT-RTX 1.7.1: operands of two types are refused
("IMatrixMultiplyLayer must have same input types"), and neither the layer nor its tensor takes an output type. A head
between casts to float32 and back is recognised and keeps its weights low, but its result is low as well; left in
float32 it makes the builder fold the cast weights, so that the engine holds the head, most of a small model, at twice
the size, and reads twice the bytes for each token.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.errors import ExportError
from accel.graph.edit import operands
from accel.graph.lowering.tensorrt.emit import Emitter
from accel.spec import PARTS

FLOAT = ir.DataType.FLOAT
LOW_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
ISLANDS = frozenset(
    {
        *("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"),
        *("Tanh", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softplus", "Erf"),
        *("ReduceMean", "ReduceSum", "ReduceL2", "Sin", "Cos"),
    }
)
PRODUCTS = frozenset(
    {"MatMul", "Gemm", "Attention", "TensorScatter", "RotaryEmbedding", "QuantizeLinear", "DequantizeLinear"}
)


def set_precision(
    model: ir.Model,
    dtype: ir.DataType,
    islands: frozenset[str] = ISLANDS,
    products: frozenset[str] = PRODUCTS,
) -> int:
    """Rewrites a float32 graph in place so that it computes in ``dtype``; returns how many casts it took.

    Args:
        model: The graph.
        dtype: FLOAT leaves it as it is.
        islands: Op types that stay float32.
        products: Op types that compute in ``dtype`` whatever their inputs are.

    Raises:
        ExportError: A weight exceeds the type's range.
    """
    if dtype == FLOAT:
        return 0
    assert dtype in LOW_TYPES, dtype
    return _Caster(model, dtype, islands, products).run()


class _Caster:
    def __init__(self, model: ir.Model, dtype: ir.DataType, islands: frozenset[str], products: frozenset[str]) -> None:
        self._graph, self._low = model.graph, dtype
        self._islands, self._products = islands, products
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._tail = _tail(model.graph, products)
        self._parameters = {value for value in self._graph.initializers.values() if value.dtype == FLOAT}

    def run(self) -> int:
        for value in self._graph.inputs:
            if value.dtype == FLOAT:
                value.type = ir.TensorType(self._low)
        for node in list(self._graph):
            self._convert(node)
        for node in list(self._graph):
            for output in node.outputs:
                if output.is_graph_output() and output.dtype == self._low and not _is_cache(output):
                    self._restore(node, output)
        return sum(node.op_type == "Cast" for node in self._graph)

    def _convert(self, node: ir.Node) -> None:
        wanted = self._wanted(node)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (FLOAT, *LOW_TYPES) and node.op_type != "Cast":
                node.replace_input_with(index, self._as(value, wanted, node))
        for output in node.outputs:
            if output.dtype == FLOAT and node.op_type != "Cast":
                output.type = ir.TensorType(wanted)

    def _wanted(self, node: ir.Node) -> ir.DataType:
        if node.op_type in self._products:
            return self._low
        if node.op_type in self._islands or node in self._tail or self._is_residual(node):
            return FLOAT
        computed = [value for value in node.inputs if value is not None and value not in self._parameters]
        types = {value.dtype for value in computed if value.dtype in (FLOAT, *LOW_TYPES)}
        return FLOAT if types == {FLOAT} else self._low

    def _is_residual(self, node: ir.Node) -> bool:
        """A sum of two computed tensors of one shape."""
        pair = operands(node, "Add")
        if pair is None or any(value in self._parameters or value.is_initializer() for value in pair):
            return False
        return pair[0].shape is not None and len(pair[0].shape) >= 2 and pair[0].shape == pair[1].shape

    def _as(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            made = self._stored(value) if value in self._parameters else None
            if made is None:
                emit = Emitter(self._graph, reader)
                made = emit("Cast", [value], value.shape or (), dtype, to=dtype)
            self._casts[value, dtype] = made
        return self._casts[value, dtype]

    def _stored(self, value: ir.Value) -> ir.Value:
        """The initializer in the low type, converted when it is written."""
        tensor = value.const_value
        assert tensor is not None and value.name
        name, low = f"{value.name}.{self._low.name.lower()}", self._low
        made = ir.Value(name=name, type=ir.TensorType(low), shape=value.shape)
        made.const_value = ir.LazyTensor(
            lambda: ir.tensor(narrow(tensor, low, name), name=name), dtype=low, shape=tensor.shape, name=name
        )
        parts = value.metadata_props.get(PARTS)
        if parts:  # what lies in it, by the names that the parts have in this type
            made.metadata_props[PARTS] = "\n".join(f"{part}.{low.name.lower()}" for part in parts.split("\n"))
        self._graph.register_initializer(made)
        return made

    def _restore(self, node: ir.Node, output: ir.Value) -> None:
        """A float32 output keeps its name and type; those that read the value inside go on reading the low one."""
        cast = ir.node("Cast", [output], {"to": FLOAT})
        made = cast.outputs[0]
        made.type, made.shape = ir.TensorType(FLOAT), output.shape
        self._graph.insert_after(node, cast)
        self._graph.outputs[self._graph.outputs.index(output)] = made
        made.name, output.name = output.name, f"{output.name}_low"


def _is_cache(value: ir.Value) -> bool:
    return (value.name or "").startswith("present.")


def _tail(graph: ir.Graph, products: frozenset[str]) -> set[ir.Node]:
    """Nodes from which only outputs are reached without another matrix product."""
    found: set[ir.Node] = set()
    for node in reversed(list(graph)):
        if node.op_type in products or any(_is_cache(output) for output in node.outputs):
            continue
        uses = [use.node for output in node.outputs for use in output.uses()]
        ends = any(output.is_graph_output() for output in node.outputs)
        if (uses or ends) and all(reader in found for reader in uses):
            found.add(node)
    return found


def narrow(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> np.ndarray:
    wide = tensor.numpy()
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype.numpy())
    if not np.isfinite(narrow).all() and np.isfinite(wide).all():
        largest = float(np.abs(wide).max())
        what = f"the weight's largest value {largest:g} is beyond {dtype.name.lower()}"
        raise ExportError(what, where=name, remedy="Use bf16, whose range is float32's")
    return narrow


__all__ = ["ISLANDS", "PRODUCTS", "narrow", "set_precision"]
