"""Evaluates a lowered graph with PyTorch, each operator in the type that the graph gives it.

ONNX Runtime's CPU has no bf16 kernels and computes fp16 products in float32; PyTorch rounds after every operator,
as a strongly typed network does. Products add up in float32 and round once, like tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray

from accel.engines.torch_operators import FIXED, OPERATORS, Tensor, to_numpy, to_torch
from accel.errors import FusionError
from accel.graph.evaluation.canonical import CANONICAL
from accel.graph.evaluation.contrib import CONTRIB, CONTRIB_FIXED
from accel.graph.evaluation.fused import FUSED

TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "": OPERATORS,
    "accel": CANONICAL,
    "com.microsoft": CONTRIB,
    "accel.kernels": FUSED,
}


class TorchGraph:
    """A graph and its weights as tensors.

    Args:
        model: Canonical, or in the dialect of TensorRT, of ONNX Runtime's CUDA provider, or of the cuda engine.

    Raises:
        FusionError: An operator, or an attribute of one, that none of them uses.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        unknown = sorted({name for node in model.graph for name in _unknown(node)})
        if unknown:
            raise FusionError(f"no evaluation for {', '.join(unknown)}", where="evaluation")
        self._weights = {
            value: to_torch(value.const_value.numpy())
            for value in model.graph.initializers.values()
            if value.const_value is not None
        }
        self._last_use = {value: node for node in model.graph for value in node.inputs if value is not None}

    def run(self, feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Graph inputs by name -> outputs by name; bfloat16 arrays are ``ml_dtypes.bfloat16``."""
        values: dict[ir.Value | None, Tensor | None] = dict(self._weights)
        values[None] = None
        for value in self._graph.inputs:
            if value not in values:
                values[value] = to_torch(feeds[value.name or ""])
        kept = set(self._graph.outputs) | set(self._weights)
        with torch.inference_mode():
            for node in self._graph:
                results = TABLES[node.domain][node.op_type](node, *(values[value] for value in node.inputs))
                results = results if isinstance(results, list | tuple) else [results]
                values.update(zip(node.outputs, results, strict=True))
                for value in node.inputs:
                    if value is not None and self._last_use[value] is node and value not in kept:
                        values.pop(value, None)
        return {value.name or "": to_numpy(values[value]) for value in self._graph.outputs}  # type: ignore[arg-type]


def _unknown(node: ir.Node) -> Iterator[str]:
    """What of a node would be computed wrongly or not at all."""
    if node.op_type not in TABLES.get(node.domain, {}):
        yield f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        return
    fixed = {"": FIXED, "com.microsoft": CONTRIB_FIXED}.get(node.domain, {})
    for name, value in fixed.get(node.op_type, {}).items():
        if name in node.attributes and node.attributes[name].value != value:
            yield f"{node.op_type} with {name}"


__all__ = ["TorchGraph"]
