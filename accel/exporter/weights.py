"""Streams a model's parameters into one weight file and makes every graph's initializers point into it.

The file holds PyTorch's own layout under PyTorch's own names, tied parameters once, so that the PyTorch
reference engine reads it too. Nothing is copied in memory but one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx_ir as ir

from accel.errors import ExportError
from accel.manifest import ParameterEntry
from accel.spec import PARTS, ROWS

if TYPE_CHECKING:
    import torch

WRAPPER = "model."  # the traced module wraps the model in an attribute of this name
INLINE_BYTES = 1024  # smaller constants stay in the graph file
PAGE, LINE = 4096, 64  # alignments: tensors of 1 MiB and more can be mapped on their own, others share pages
PAGE_FROM = 1 << 20
CHUNK = 8 << 20


@dataclass(frozen=True)
class Parameters:
    """Parameters and persistent buffers of a PyTorch model, in its own order, tied ones once.

    Attributes:
        tensors: name -> tensor.
        tied: name -> the name in ``tensors`` that it shares storage with.
    """

    tensors: dict[str, torch.Tensor]
    tied: dict[str, str]


@dataclass(frozen=True)
class WrittenWeights:
    """What stands where in the file.

    Attributes:
        parameters: For the manifest.
        tied: For the manifest.
        size: Bytes of the file.
    """

    parameters: dict[str, ParameterEntry]
    tied: dict[str, str]
    size: int


@dataclass
class _Block:
    """Tensors that stand in the file one right behind the other."""

    names: tuple[str, ...]
    offsets: dict[str, int] = field(default_factory=dict)


def collect_parameters(model: torch.nn.Module) -> Parameters:
    """Lists what a rebuilt model needs: parameters and persistent buffers; what shares storage is listed once."""
    tensors: dict[str, Any] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = seen.setdefault(key, name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = first
    return Parameters(tensors, tied)


def name_initializers(model: ir.Model, parameters: Parameters) -> None:
    """Gives initializers their PyTorch names, in place; tied ones become one initializer."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = (value.name or "").removeprefix(WRAPPER)
        name = parameters.tied.get(name, name)
        if name == value.name or name not in parameters.tensors:
            continue
        if name in graph.initializers:
            ir.convenience.replace_all_uses_with(value, graph.initializers[name])
            graph.initializers.pop(value.name or "")
        else:
            value.name = name


def write_weights(
    path: Path, models: Sequence[ir.Model], parameters: Parameters, advance: Callable[[int], None] | None = None
) -> WrittenWeights:
    """Writes the file and points the models' initializers at it.

    Args:
        path: The file; its folder is where the graphs will be saved.
        models: Graphs that share it. Initializers named like a parameter, or made of parameters
            (``accel.parts``), become external; of the rest the large ones follow behind, the small ones stay inline.
        parameters: What ``collect_parameters`` returned.
        advance: Called with the number of bytes of each chunk written.

    Raises:
        ExportError: A graph disagrees with the parameters.
        OSError: Writing failed.
    """
    blocks = _plan_blocks(models, parameters)
    constants = _collect_constants(models, parameters)
    with path.open("wb") as stream:
        writer = _Writer(stream, advance or (lambda _: None))
        for block in blocks:
            writer.align(sum(parameters.tensors[name].nbytes for name in block.names))
            for name in block.names:
                block.offsets[name] = writer.position
                writer.write(parameters.tensors[name].contiguous().numpy())
        starts = {}
        for name, tensor in constants.items():
            writer.align(tensor.nbytes)
            starts[name] = writer.position
            writer.write(np.ascontiguousarray(tensor.numpy()))
    offsets = {name: offset for block in blocks for name, offset in block.offsets.items()}
    _Externaliser(path, parameters, offsets, starts).apply(models)
    entries = {
        name: ParameterEntry(path.name, offsets[name], tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in parameters.tensors.items()
    }
    return WrittenWeights(entries, dict(parameters.tied), writer.position)


def total_bytes(parameters: Parameters) -> int:
    """Bytes of all parameters, for a progress display."""
    return sum(tensor.nbytes for tensor in parameters.tensors.values())


class _Writer:
    """Appends arrays in chunks, with padding for alignment."""

    def __init__(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        self._stream, self._advance, self.position = stream, advance, 0

    def align(self, size: int) -> None:
        """Pads so that a block of ``size`` bytes starts where it may be mapped."""
        step = PAGE if size >= PAGE_FROM else LINE
        padding = -self.position % step
        self._stream.write(b"\0" * padding)
        self.position += padding

    def write(self, array: np.ndarray) -> None:
        if array.size == 0:
            return
        view = array.reshape(-1).data.cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._stream.write(part)
            self._advance(len(part))
        self.position += len(view)


def _initializers(models: Sequence[ir.Model]) -> Iterator[ir.Value]:
    for model in models:
        for graph in model.graphs():
            yield from graph.initializers.values()


def _parts(value: ir.Value) -> tuple[str, ...] | None:
    """The parameters that an initializer is made of; None when it is one or a constant."""
    text = value.metadata_props.get(PARTS)
    return tuple(text.split("\n")) if text else None


def _plan_blocks(models: Sequence[ir.Model], parameters: Parameters) -> list[_Block]:
    """Merged parameters side by side, in the order of their first member; each other one alone."""
    groups: dict[str, tuple[str, ...]] = {}
    for value in _initializers(models):
        parts = _parts(value)
        if parts is None:
            continue
        for name in parts:
            if name not in parameters.tensors:
                raise ExportError(f"The merged weight is made of {name!r}, which is no parameter", where=value.name)
            if groups.setdefault(name, parts) != parts or len(set(parts)) != len(parts):
                raise ExportError(f"Two merged weights share {name!r}", where=value.name)
    blocks = []
    placed: set[str] = set()
    for name in parameters.tensors:
        if name not in placed:
            members = groups.get(name, (name,))
            blocks.append(_Block(members))
            placed.update(members)
    return blocks


def _collect_constants(models: Sequence[ir.Model], parameters: Parameters) -> dict[str, ir.TensorProtocol]:
    """Large initializers that are no parameters (tables), by name, in the models' order."""
    constants: dict[str, ir.TensorProtocol] = {}
    for value in _initializers(models):
        tensor, name = value.const_value, value.name or ""
        refers = name in parameters.tensors or _parts(value) is not None or ROWS in value.metadata_props
        if refers or tensor is None or tensor.nbytes < INLINE_BYTES:
            continue
        other = constants.setdefault(name, tensor)
        if other is not tensor and not np.array_equal(other.numpy(), tensor.numpy()):
            raise ExportError("Two graphs have different constants of one name", where=name)
    return constants


class _Externaliser:
    """Replaces initializers' data by references into the file."""

    def __init__(self, path: Path, parameters: Parameters, offsets: dict[str, int], constants: dict[str, int]) -> None:
        self._path, self._parameters, self._offsets, self._constants = path, parameters, offsets, constants

    def apply(self, models: Sequence[ir.Model]) -> None:
        for value in _initializers(models):
            value.const_value = self._tensor(value)

    def _tensor(self, value: ir.Value) -> ir.TensorProtocol:
        name, parts = value.name or "", _parts(value)
        if ROWS in value.metadata_props:
            return self._rows(value)
        if parts is not None or name in self._parameters.tensors:
            return self._reference(value, self._offsets[parts[0] if parts else name], self._shape(value, parts))
        if value.const_value is None:
            raise ExportError("An initializer has neither data nor a parameter's name", where=name)
        if name in self._constants:
            return self._reference(value, self._constants[name], tuple(value.const_value.shape.numpy()))
        return ir.tensor(np.array(value.const_value.numpy()), name=name)

    def _rows(self, value: ir.Value) -> ir.TensorProtocol:
        """A range of a parameter's rows: the same bytes, a window of them."""
        name, first, last = value.metadata_props[ROWS].split("\n")
        start, stop = int(first), int(last)
        if name not in self._parameters.tensors:
            raise ExportError(f"The range of rows is of {name!r}, which is no parameter", where=value.name)
        tensor = self._parameters.tensors[name]
        row_bytes = tensor.nbytes // tensor.shape[0]
        return self._reference(value, self._offsets[name] + start * row_bytes, (stop - start, *tensor.shape[1:]))

    def _shape(self, value: ir.Value, parts: tuple[str, ...] | None) -> tuple[int, ...]:
        shapes = [tuple(self._parameters.tensors[name].shape) for name in parts or (value.name or "",)]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ExportError(f"Merged parameters differ in width: {shapes}", where=value.name)
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if parts else shapes[0]
        if value.shape is not None and tuple(value.shape) != shape:
            raise ExportError(f"The graph's weight is {tuple(value.shape)}, its parameter {shape}", where=value.name)
        return shape

    def _reference(self, value: ir.Value, offset: int, shape: tuple[int, ...]) -> ir.ExternalTensor:
        dtype = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
        assert dtype is not None, f"{value.name} has no dtype"
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return ir.ExternalTensor(
            self._path.name, offset, int(length), dtype, shape=ir.Shape(shape), name=value.name or "",
            base_dir=self._path.parent,
        )  # fmt: skip


__all__ = ["Parameters", "WrittenWeights", "collect_parameters", "name_initializers", "total_bytes", "write_weights"]
