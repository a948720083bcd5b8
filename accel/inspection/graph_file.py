"""Reads a graph file's structure; external weights are never touched. The only module here that uses onnx."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import BundleError, DependencyError
from accel.inspection.report import GraphNodes, Rotary
from accel.spec import EMBEDDING

ATTENTION = {"CachedAttention", "Attention", "CrossAttention", "GroupQueryAttention", "MultiHeadAttention"}
PROJECTIONS = {"Linear", "MatMul", "FusedMatMul", "Gemm", "MatMulNBits"}  # where a search for rotary nodes ends
TABLES = {("accel.kernels", "CachedAttention"): slice(7, 9)}  # inputs: cos and sin, where the node itself rotates
WRITTEN_OUT = re.compile(r"layers\.\d+\.attention")  # the second product of attention that no operator does
MAX_SEARCH = 256  # nodes between an attention node and its projections; a crafted graph may have more


@dataclass(frozen=True)
class StoredTensor:
    """Bytes of an external file that an initializer refers to."""

    name: str
    file: str
    offset: int
    size: int  # bytes
    elements: int
    dtype: str


@dataclass(frozen=True)
class AttentionNode:
    """One layer's attention, as found in a graph.

    Attributes:
        kernels: The kernels that it chooses among (usually one): ``domain::type`` and attributes.
        branch: ``domain::type`` of the node that chooses; None: there is no choice.
    """

    kernels: tuple[tuple[str, dict[str, int | float]], ...]
    branch: str | None
    rotary: Rotary
    packed_qkv: bool

    @property
    def op(self) -> str:
        """The kernels' types."""
        return " / ".join(sorted({op for op, _ in self.kernels}))


@dataclass(frozen=True)
class GraphFile:
    """One graph file's content.

    Attributes:
        attention: By the name of the node in the main graph.
        stored: What its initializers refer to.
        embedding: The parameter whose rows are given to the graph as an input; None: it looks ids up itself.
    """

    nodes: GraphNodes
    attention: dict[str, AttentionNode]
    stored: tuple[StoredTensor, ...]
    embedding: str | None = None


def read_graph(path: Path) -> GraphFile:
    """Reads a graph.

    Raises:
        DependencyError: onnx is not installed.
        BundleError: The file is not an ONNX graph.
    """
    try:
        import onnx
    except ImportError as error:
        remedy = "Install it: pip install onnx"
        raise DependencyError("Reading graph files needs onnx, which is not installed", remedy=remedy) from error
    try:
        data = path.read_bytes()
    except OSError as error:
        remedy = "Check the file's permissions"
        raise BundleError(f"Cannot read the file: {error.strerror}", where=str(path), remedy=remedy) from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # what protobuf raises depends on its implementation
        remedy = "Export the model again, or copy the bundle again from its source"
        raise BundleError("The file is not an ONNX graph", where=str(path), remedy=remedy) from error
    return _Reader(model).read()


class _Reader:
    """Walks one ``onnx.ModelProto``."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = list(_walk(model.graph))
        self.producers = {output: node for node in self.nodes for output in node.output if output}
        self.named = {node.name: node for node in model.graph.node}
        self.inline = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data}

    def read(self) -> GraphFile:
        graph = self.model.graph
        operators = Counter(_op(node) for node in self.nodes)
        ordered = dict(sorted(operators.items(), key=lambda item: (-item[1], item[0])))
        initializers = [tensor for inner in _graphs(graph) for tensor in inner.initializer]
        inline = sum(tensor.ByteSize() for tensor in initializers if not tensor.external_data)
        counts = GraphNodes(
            top=len(graph.node),
            inner=len(self.nodes) - len(graph.node),
            functions=len(self.model.functions),
            operators=ordered,
            inline_bytes=inline,
        )
        attention = {node.name: found for node in graph.node if (found := self._attention(node)) is not None}
        stored = tuple(_stored(tensor) for tensor in initializers if tensor.external_data)
        metadata = {entry.key: entry.value for entry in self.model.metadata_props}
        return GraphFile(counts, attention, stored, metadata.get(EMBEDDING))

    def _attention(self, node: Any) -> AttentionNode | None:
        kernels = [inner for graph in _subgraphs(node) for inner in _walk(graph) if inner.op_type in ATTENTION]
        branch = _op(node) if kernels else None
        if node.op_type in ATTENTION:
            kernels = [node]
        written_out = node.op_type == "MatMul" and WRITTEN_OUT.fullmatch(node.name) is not None
        if not kernels and not written_out:
            return None
        found = tuple((_op(kernel), self._with_scale(kernel, node.name)) for kernel in kernels or [node])
        inputs = [*(self._first_product(node).input if written_out else kernels[0].input), "", "", ""][:3]
        packed = bool(inputs[0]) and not inputs[1] and not inputs[2]
        rotates = any(_rotates(kernel) for kernel in kernels)
        return AttentionNode(found, branch, "inside" if rotates else self._rotary(inputs), packed)

    def _with_scale(self, kernel: Any, name: str) -> dict[str, int | float]:
        """The kernel's numbers; a scale that stands before it in a node of its own belongs to them."""
        import onnx

        numbers, node = _numbers(kernel), self.named.get(f"{name.removesuffix('attention')}scale")
        for constant in () if node is None else (self.inline[name] for name in node.input if name in self.inline):
            with suppress(TypeError, ValueError):  # not one number, or damaged
                numbers["scale"] = numbers.get("scale", 1.0) * float(onnx.numpy_helper.to_array(constant).item())
        return numbers

    def _first_product(self, node: Any) -> Any:
        """The product of query and key before this one of weights and value; itself where there is none."""
        first = node
        for _ in range(MAX_SEARCH):
            place = 1 if first.op_type == "Where" else 0  # its condition is the mask
            first = self.producers.get(first.input[place]) if len(first.input) > place else None
            if first is None or first.op_type == "MatMul":
                break
        return first or node

    def _rotary(self, inputs: list[str]) -> Rotary:
        """Whether a node before the kernel rotates."""
        waiting, seen = [name for name in inputs if name], set[str]()
        while waiting and len(seen) < MAX_SEARCH:
            name = waiting.pop(0)
            node = self.producers.get(name)
            if node is None or name in seen or node.op_type in PROJECTIONS or node.op_type in ATTENTION:
                continue
            if node.op_type == "RotaryEmbedding":
                return "outside"
            seen.add(name)
            waiting += node.input
        return "none"


def _rotates(kernel: Any) -> bool:
    """Whether a kernel's node takes the rotation in: says so, or has the tables among its inputs."""
    tables = TABLES.get((kernel.domain, kernel.op_type))
    return bool(_numbers(kernel).get("do_rotary")) or (tables is not None and any(kernel.input[tables]))


def _numbers(node: Any) -> dict[str, int | float]:
    """The node's attributes that are numbers."""
    return {item.name: item.f if item.type == item.FLOAT else item.i for item in node.attribute}


def _op(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graphs(graph: Any) -> Iterator[Any]:
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += [inner for node in current.node for inner in _subgraphs(node)]


def _walk(graph: Any) -> Iterator[Any]:
    for inner in _graphs(graph):
        yield from inner.node


def _stored(tensor: Any) -> StoredTensor:
    import onnx

    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        offset = int(entries.get("offset", "0"))
        elements = math.prod(tensor.dims)
        size = int(entries["length"]) if "length" in entries else elements * dtype.itemsize
    except (KeyError, ValueError) as error:
        what = f"The external data of {tensor.name!r} is not described as ONNX asks"
        raise BundleError(what, where=tensor.name, remedy="Export the model again") from error
    return StoredTensor(tensor.name, entries.get("location", ""), offset, size, elements, dtype.name)


__all__ = ["AttentionNode", "GraphFile", "StoredTensor", "read_graph"]
