"""Writes initializers to a weight file, one at a time, and finds those that lie in one already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from accel.spec import PARTS

INLINE_BYTES = 1024  # smaller constants stay in the graph file
PAGE, LINE = 4096, 64  # alignments: tensors of 1 MiB and more can be mapped on their own, others share pages
PAGE_FROM = 1 << 20
LACKING = 64  # one byte of so many may lie elsewhere: the scales of a cache


class StoredTensors:
    """The tensors in the weight files of graphs that were written before.

    Args:
        graphs: Their files; the weight files lie beside them.
    """

    def __init__(self, graphs: Iterable[Path]) -> None:
        self._whole: dict[str, list[ir.ExternalTensor]] = {}
        self._merged: dict[str, tuple[ir.ExternalTensor, list[str]]] = {}  # by each of the parts
        for path in graphs:
            for value in ir.load(path).graph.initializers.values():
                tensor, parts = value.const_value, value.metadata_props.get(PARTS, "")
                if isinstance(tensor, ir.ExternalTensor):
                    self._whole.setdefault(value.name or "", []).append(tensor)
                    self._merged |= dict.fromkeys(parts.split("\n"), (tensor, parts.split("\n"))) if parts else {}

    def find(self, value: ir.Value, raw: np.ndarray) -> ir.ExternalTensor | None:
        """Where an initializer's bytes lie: under its name, as a part of a merged one, or as its parts side by side.

        Args:
            value: The initializer, in its graph.
            raw: Its bytes, uint8 [n]. What merely has its name, type and shape is not taken for it.
        """
        candidates = [*self._whole.get(value.name or "", ()), self._part(value), self._joined(value)]
        for tensor in candidates:
            if tensor is None or tensor.dtype != value.dtype or tensor.length != raw.nbytes:
                continue
            there = _window(tensor, tensor.offset or 0, value)
            if np.array_equal(_bytes(there), raw):
                return _window(tensor, tensor.offset or 0, value)  # the other one keeps its file mapped
        return None

    def _part(self, value: ir.Value) -> ir.ExternalTensor | None:
        merged, parts = self._merged.get(value.name or "", (None, []))
        sizes = [_size(value, name) for name in parts]
        if merged is None or sum(sizes) != merged.length or merged.dtype != value.dtype:
            return None
        return _window(merged, (merged.offset or 0) + sum(sizes[: parts.index(value.name or "")]), value)

    def _joined(self, value: ir.Value) -> ir.ExternalTensor | None:
        names = value.metadata_props.get(PARTS, "").split("\n")
        found = [next(iter(self._whole.get(name, ())), None) for name in names]
        parts = [tensor for tensor in found if tensor is not None]
        if len(parts) < len(names):
            return None
        first, end = parts[0], parts[0].offset or 0
        for tensor in parts:
            if (tensor.path, tensor.offset, tensor.dtype) != (first.path, end, value.dtype):
                return None
            end += tensor.length or 0
        return _window(first, first.offset or 0, value)


def _size(value: ir.Value, name: str) -> int:
    """Bytes of another initializer of the value's graph; -1: there is none."""
    other = value.graph.initializers.get(name) if value.graph is not None else None
    return -1 if other is None or other.const_value is None else other.const_value.nbytes


def _window(tensor: ir.ExternalTensor, offset: int, value: ir.Value) -> ir.ExternalTensor:
    """The value's tensor in the file of another one."""
    like = value.const_value
    assert like is not None and value.name
    return ir.ExternalTensor(
        tensor.location, offset, like.nbytes, like.dtype, shape=ir.Shape(like.shape), name=value.name,
        base_dir=tensor.base_dir,
    )  # fmt: skip


def write_external(
    model: ir.Model,
    path: Path,
    keep: Path | None = None,
    advance: Callable[[int], None] | None = None,
    stored: StoredTensors | None = None,
) -> int:
    """Makes every large initializer external, in place; computed ones are computed as they are written.

    Args:
        model: Its initializers make the file's, matrices before vectors, each in the graph's order: what another
            target merges (query, key and value) then lies side by side.
        path: The file; not made when nothing needs it.
        keep: Initializers that lie in files of this folder stay where they are.
        advance: Called with the number of bytes of each tensor written or found.
        stored: What lies in these files is not written again.

    Returns:
        Bytes written.
    """
    position, stream = 0, None
    try:
        for value in sorted(model.graph.initializers.values(), key=_is_vector):
            tensor = value.const_value
            assert tensor is not None, value.name
            if _stays(tensor, keep):
                continue
            if tensor.nbytes < INLINE_BYTES:
                value.const_value = ir.tensor(np.array(tensor.numpy()), name=value.name)
                continue
            raw = _bytes(tensor)
            found = stored.find(value, raw) if stored is not None else None
            if found is None:
                stream = stream or path.open("wb")
                padding = -position % (PAGE if tensor.nbytes >= PAGE_FROM else LINE)
                stream.write(b"\0" * padding)
                position += padding
                stream.write(raw.data)
                found = ir.ExternalTensor(
                    path.name, position, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape),
                    name=value.name or "", base_dir=path.parent,
                )  # fmt: skip
                position += tensor.nbytes
            value.const_value = found
            if advance is not None:
                advance(tensor.nbytes)
    finally:
        if stream is not None:
            stream.close()
    return position


def read_stored(model: ir.Model, graph: Path) -> bool:
    """Makes large initializers read the files of a graph that was written before, where nearly all bytes lie in those.

    Where less does nothing changes: norms that are equal among other matrices would hold a whole file that nobody else
    reads, and count its bytes as this graph's.

    Args:
        model: Changed in place.
        graph: The other's file; the weight files lie beside it.

    Returns:
        Whether it reads there now.
    """
    stored, found = StoredTensors([graph]), dict[ir.Value, ir.ExternalTensor]()
    tensors = [(value, value.const_value) for value in model.graph.initializers.values()]
    large = [(value, tensor) for value, tensor in tensors if tensor is not None and tensor.nbytes >= INLINE_BYTES]
    lacking = sum(tensor.nbytes for _, tensor in large) // LACKING
    for value, tensor in sorted(large, key=lambda pair: -pair[1].nbytes):  # what differs is seen soon
        there = stored.find(value, _bytes(tensor))
        if there is not None:
            found[value] = there
            continue
        lacking -= tensor.nbytes
        if lacking < 0:
            return False
    for value, there in found.items():
        value.const_value = there
    return True


def external_files(model: ir.Model) -> tuple[str, ...]:
    """Names of the files that its initializers lie in, in the order of the first that does."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return tuple(dict.fromkeys(str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)))


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    """As stored, uint8 [n]: two 4-bit numbers in one."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _is_vector(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) < 2


def _stays(tensor: ir.TensorProtocol, keep: Path | None) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and keep is not None and Path(tensor.base_dir) == keep


__all__ = ["StoredTensors", "external_files", "read_stored", "write_external"]
