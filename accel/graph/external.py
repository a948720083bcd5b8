"""Writes initializers to a weight file, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

INLINE_BYTES = 1024  # smaller constants stay in the graph file
PAGE, LINE = 4096, 64  # alignments: tensors of 1 MiB and more can be mapped on their own, others share pages
PAGE_FROM = 1 << 20


def write_external(
    model: ir.Model, path: Path, keep: Path | None = None, advance: Callable[[int], None] | None = None
) -> int:
    """Makes every large initializer external, in place; computed ones are computed as they are written.

    Args:
        model: Its initializers in the graph's order make the file's.
        path: The file; not made when nothing needs it.
        keep: Initializers that lie in files of this folder stay where they are.
        advance: Called with the number of bytes of each tensor written.

    Returns:
        Bytes written.
    """
    position, stream = 0, None
    try:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None, value.name
            if _stays(tensor, keep):
                continue
            if tensor.nbytes < INLINE_BYTES:
                value.const_value = ir.tensor(np.array(tensor.numpy()), name=value.name)
                continue
            stream = stream or path.open("wb")
            padding = -position % (PAGE if tensor.nbytes >= PAGE_FROM else LINE)
            stream.write(b"\0" * padding)
            position += padding
            stream.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
            value.const_value = ir.ExternalTensor(
                path.name, position, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name or "",
                base_dir=path.parent,
            )  # fmt: skip
            position += tensor.nbytes
            if advance is not None:
                advance(tensor.nbytes)
    finally:
        if stream is not None:
            stream.close()
    return position


def _stays(tensor: ir.TensorProtocol, keep: Path | None) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and keep is not None and Path(tensor.base_dir) == keep


__all__ = ["write_external"]
