"""The graph file that an engine is built from: its nodes, its weights by memory map, and what the proof asks of it."""

from __future__ import annotations

import mmap
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from accel.errors import EngineBuildError, InputError
from accel.spec import TensorSpec

CAPACITY = "C"  # the symbol of the cache slots in a decoder's shapes
# Names of nodes and parameters that say which layer they belong to, and of parameters that belong to none.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_PARAMETER = re.compile(r"(?:^|\.)(?:weight|bias)(?:\.|$)")


class GraphSource:
    """A lowered graph without its weights, and the maps of the files that hold them.

    Attributes:
        path: The graph file.
        proto: ``onnx.ModelProto`` with the capacity written into its shapes.
        capacity: Cache slots of each row; None: the graph has no caches.
        weight_bytes: Bytes of all weights.
    """

    def __init__(self, path: Path, capacity: int | None = None, weights: Collection[str] | None = None) -> None:
        """Reads the file.

        Args:
            path: An ONNX file; its external data lie beside it.
            capacity: The number that stands for ``C``.
            weights: Names of the only files that its weights may lie in; None: any file in its folder.

        Raises:
            InputError: A capacity is missing, or given to a graph without caches.
            EngineBuildError: The file, or one with its weights, is missing or damaged.
        """
        self.path, self.capacity, self._weights = path, capacity, weights
        self.proto: Any = read_graph(path)
        self._write_capacity()
        graph = self.proto.graph
        self._maps: dict[str, mmap.mmap] = {}
        self._bytes: dict[str, np.ndarray] = {}  # uint8 views of the maps, whose addresses the parser gets
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.weight_bytes = sum(_stored_size(tensor) for tensor in graph.initializer)
        self.inputs = tuple(_spec(value) for value in graph.input if value.name not in self._initializers)
        self.outputs = tuple(_spec(value) for value in graph.output)
        self.nodes: dict[str, Any] = {node.name: node for node in graph.node}
        self._layers: dict[str, int | None] | None = None  # by node, see layer_index
        self._makers = {name: node for node in graph.node for name in node.output}
        self._made = {name: node for name, node in self._makers.items() if node.op_type == "Constant"}

    def external(self) -> Iterator[tuple[str, int, int]]:
        """Name, address and bytes of every weight outside the graph file. The address is good while this lives.

        Raises:
            EngineBuildError: A file is missing, shorter than the graph says, or none of the graph's weights.
        """
        for tensor in self._initializers.values():
            if tensor.data_location == tensor.EXTERNAL:
                view = self._view(tensor)
                yield tensor.name, view.ctypes.data, view.nbytes

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer or of a Constant node; None where the name is neither."""
        from onnx import helper, numpy_helper

        tensor = self._initializers.get(name)
        if tensor is None:
            made = self._made.get(name)
            tensor = next((a.t for a in made.attribute if a.name == "value"), None) if made is not None else None
        if tensor is None:
            return None
        if tensor.data_location == tensor.EXTERNAL:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return np.asarray(self._view(tensor).view(dtype).reshape(tuple(tensor.dims)))
        return np.asarray(numpy_helper.to_array(tensor))

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Of an initializer; None where the name is none's."""
        tensor = self._initializers.get(name)
        return None if tensor is None else tuple(tensor.dims)

    def type_of(self, name: str) -> str | None:
        """NumPy-style name of an initializer's type, such as ``int4``; None where the name is none's."""
        from onnx import helper

        tensor = self._initializers.get(name)
        return None if tensor is None else str(helper.tensor_dtype_to_np_dtype(tensor.data_type).name)

    def maker(self, name: str) -> Any:
        """The node that makes a value, casts left out; None for inputs and initializers."""
        node = self._makers.get(name)
        while node is not None and node.op_type == "Cast":
            node = self._makers.get(node.input[0])
        return node

    def layer_of(self, name: str) -> str:
        """In words, which layer a node belongs to."""
        index = self.layer_index(name)
        return "outside the layers" if index is None else f"layer {index}"

    def layer_index(self, name: str) -> int | None:
        """The layer that a node belongs to, by its own name or its parameters', else by the node before it."""
        if self._layers is None:
            self._layers, index = {}, None
            for node in self.proto.graph.node:
                parameters = [name for name in node.input if name in self._initializers]
                if found := next(filter(None, map(_LAYER.search, (node.name, *parameters))), None):
                    index = int(found[1])
                elif any(map(_PARAMETER.search, parameters)):
                    index = None  # the embedding, the last norm, the head
                self._layers[node.name] = index
        return self._layers.get(name)

    def is_constant(self, name: str) -> bool:
        """Whether a name is an initializer's or a Constant node's."""
        return name in self._initializers or name in self._made

    def is_initializer(self, name: str) -> bool:
        """Whether a name is an initializer's."""
        return name in self._initializers

    def folded(self) -> set[str]:
        """Values computed from constants and shapes alone, which the parser folds or turns into shape arithmetic."""
        known = set(self._initializers)
        for node in self.proto.graph.node:
            if node.op_type in ("Constant", "Shape", "Size") or all(name in known for name in node.input if name):
                known.update(node.output)
        return known

    def needed(self, *names: str) -> list[Any]:
        """The nodes that some values depend on, in the graph's order. No names: the graph's outputs."""
        wanted = set(names) or {value.name for value in self.proto.graph.output}
        kept = []
        for node in reversed(self.proto.graph.node):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        return kept[::-1]

    def drop_pages(self) -> None:
        """Gives pages of the weights back to the system; they are read again when touched.

        The builder reads a weight, copies it, and never returns to it: mapped pages that stay would count as memory.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in list(self._maps.values()):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _view(self, tensor: Any) -> np.ndarray:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location, offset = entries.get("location", ""), int(entries.get("offset", 0))
        length = int(entries.get("length", _expected_size(tensor)))
        whole = self._map(location)
        if length != _expected_size(tensor) or offset + length > whole.nbytes:
            what = f"The weight {tensor.name} does not fit its file: {length} bytes at {offset} of {whole.nbytes}"
            remedy = "The file is truncated or of another graph; export the bundle again"
            raise EngineBuildError(what, where=str(self.path.parent / location), remedy=remedy)
        return whole[offset : offset + length]

    def _map(self, location: str) -> np.ndarray:
        if location not in self._bytes:
            path = self._allowed(location)
            try:
                with path.open("rb") as file:
                    self._maps[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file
                what = f"Cannot read the weights: {error}"
                raise EngineBuildError(what, where=str(path), remedy="Export the bundle again") from error
            self._bytes[location] = np.frombuffer(self._maps[location], np.uint8)
        return self._bytes[location]

    def _allowed(self, location: str) -> Path:
        """A graph may read its own weights alone: what else lies on the machine would end up in an engine."""
        folder = self.path.parent
        if self._weights is None:
            fine = bool(location) and (folder / location).resolve().parent == folder.resolve()
        else:
            fine = location in self._weights
        if not fine:
            what = f"The graph reads {location!r}, which is no weight file of its own"
            remedy = "Do not use this bundle; export it again, or get it from a source that you trust"
            raise EngineBuildError(what, where=str(self.path), remedy=remedy)
        return folder / location

    def _write_capacity(self) -> None:
        graph, found = self.proto.graph, False
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == CAPACITY:
                    found = True
                    if self.capacity is not None:
                        dim.dim_value = self.capacity  # takes the place of dim_param
        if found and (self.capacity is None or self.capacity < 1):
            what = f"A decoder's engine has a fixed number of cache slots, not {self.capacity}"
            raise InputError(what, where="capacity", remedy="Give the positions that a row may hold, e.g. 2048")
        if self.capacity is not None and not found:
            raise InputError(
                f"The graph has no dimension {CAPACITY}", where="capacity", remedy="Leave it out for encoders"
            )


def read_graph(path: Path) -> Any:
    """``onnx.ModelProto`` of a file, without its external data.

    Raises:
        EngineBuildError: It is missing or damaged.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        remedy = "Check the path, or export the bundle again"
        raise EngineBuildError(f"Cannot read the graph: {error}", where=str(path), remedy=remedy) from error


def _stored_size(tensor: Any) -> int:
    return _expected_size(tensor) if tensor.data_location == tensor.EXTERNAL else tensor.ByteSize()


def _expected_size(tensor: Any) -> int:
    from onnx import TensorProto, helper

    count = int(np.prod(tuple(tensor.dims), dtype=np.int64))
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):  # two in a byte
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _spec(value: Any) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape)


__all__ = ["CAPACITY", "GraphSource", "read_graph"]
