"""Reads a TensorRT network: who makes a tensor, which layers came from an ONNX node, what a constant holds."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np

from accel.builder.parse import ParsedNetwork

_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class NetworkView:
    """An index over a parsed network as it is now; make a new one after changing it."""

    def __init__(self, parsed: ParsedNetwork) -> None:
        self.parsed, self.layers = parsed, parsed.layers()
        self.makers: dict[str, Any] = {}  # tensor name -> layer
        self.readers: dict[str, list[Any]] = defaultdict(list)
        self.by_node: dict[str, list[Any]] = defaultdict(list)  # ONNX node name -> its layers, in order
        for layer in self.layers:
            for index in range(layer.num_outputs):
                self.makers[layer.get_output(index).name] = layer
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None:
                    self.readers[tensor.name].append(layer)
            for name in _ORIGIN.findall(layer.metadata or ""):
                self.by_node[name].append(layer)

    def of_type(self, name: str) -> list[Any]:
        """Layers of one ``LayerType``."""
        return [layer for layer in self.layers if layer.type.name == name]

    def maker(self, tensor: Any, *types: str) -> Any | None:
        """The layer that makes the tensor, if it is of one of the types (any, without types)."""
        layer = None if tensor is None else self.makers.get(tensor.name)
        return layer if layer is not None and (not types or layer.type.name in types) else None

    def constant(self, tensor: Any) -> Any | None:
        """The CONSTANT layer behind casts and reshapes, if there is one."""
        layer = self.maker(tensor)
        while layer is not None and layer.type.name in ("CAST", "SHUFFLE"):
            layer = self.maker(layer.get_input(0))
        return layer if layer is not None and layer.type.name == "CONSTANT" else None

    def number(self, tensor: Any) -> float | None:
        """The value of a constant of one element; None when it is none, or of a type that NumPy lacks (bfloat16)."""
        layer = self.constant(tensor)
        weights = None if layer is None else layer.weights
        return float(weights.reshape(-1)[0]) if isinstance(weights, np.ndarray) and weights.size == 1 else None

    def dtype(self, tensor: Any) -> str:
        """NumPy-style name of a tensor's type."""
        return self.parsed.flavour.dtype_name(tensor.dtype)


__all__ = ["NetworkView"]
