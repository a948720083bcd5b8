"""Reads a parsed TensorRT network: who makes a tensor, what a constant holds, which layers a node became."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from accel.engines.tensorrt.adapter import Flavour
from accel.errors import EngineProofError

_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
PASSES_ON = ("CAST", "IDENTITY", "SHUFFLE", "SQUEEZE", "UNSQUEEZE")  # one input's values, in another type or shape


class NetworkView:
    """An ``INetworkDefinition`` by names. Tensor names are unique in a parsed network.

    Attributes:
        layers: All layers, each as an object of its own class.
        inputs: Input tensors by name.
        outputs: Output tensors by name.
    """

    def __init__(self, flavour: Flavour, network: Any) -> None:
        self.flavour = flavour
        self.layers = [flavour.typed(network.get_layer(index)) for index in range(network.num_layers)]
        self.inputs = {t.name: t for t in map(network.get_input, range(network.num_inputs))}
        self.outputs = {t.name: t for t in map(network.get_output, range(network.num_outputs))}
        self._producers: dict[str, Any] = {}
        self._tensors: dict[str, Any] = dict(self.inputs)
        self._of_node: dict[str, list[Any]] = defaultdict(list)
        self._reads: dict[str, set[str]] = {}
        for layer in self.layers:
            for index in range(layer.num_outputs):
                tensor = layer.get_output(index)
                self._producers[tensor.name], self._tensors[tensor.name] = layer, tensor
            for name in _NODE.findall(layer.metadata):
                self._of_node[name].append(layer)

    def of_node(self, name: str) -> list[Any]:
        """The layers that a graph's node became, as their metadata say."""
        return self._of_node.get(name, [])

    def of_type(self, kind: str) -> list[Any]:
        """Layers of one ``LayerType``."""
        return [layer for layer in self.layers if layer.type.name == kind]

    def producer(self, tensor: Any) -> Any:
        """The layer that makes a tensor; None for inputs and for no tensor."""
        return None if tensor is None else self._producers.get(tensor.name)

    def makes(self, name: str) -> bool:
        """Whether a tensor of that name exists."""
        return name in self._producers or name in self.inputs

    def tensor(self, name: str) -> Any:
        """The tensor of that name; None: there is none."""
        return self._tensors.get(name)

    def origin(self, tensor: Any) -> Any:
        """The tensor whose values this one holds, before casts and changes of shape."""
        layer = self.producer(tensor)
        while layer is not None and layer.type.name in PASSES_ON:
            tensor = layer.get_input(0)
            layer = self.producer(tensor)
        return tensor

    def constant(self, tensor: Any) -> tuple[str, np.ndarray | None] | None:
        """Name and values of the constant that a tensor holds; None where it is none.

        The values are None for types that NumPy lacks (bfloat16): the name leads to the graph's initializer.
        """
        layer = self.producer(self.origin(tensor))
        if layer is None or layer.type.name != "CONSTANT":
            return None
        weights = layer.weights
        return layer.name, weights if isinstance(weights, np.ndarray) else None

    def operands(self, layer: Any) -> list[Any]:
        """The input tensors that a layer has."""
        tensors = (layer.get_input(index) for index in range(layer.num_inputs))
        return [tensor for tensor in tensors if tensor is not None]

    def consumed(self) -> set[str]:
        """Names of all tensors that the outputs depend on."""
        return self._behind(list(self.outputs.values()))

    def reads(self, tensor: Any) -> set[str]:
        """Names of the inputs that a tensor depends on."""
        if tensor.name not in self._reads:
            self._reads[tensor.name] = self._behind([tensor]) & set(self.inputs)
        return self._reads[tensor.name]

    def _behind(self, waiting: list[Any]) -> set[str]:
        seen: set[str] = set()
        while waiting:
            tensor = waiting.pop()
            if tensor.name not in seen:
                seen.add(tensor.name)
                layer = self.producer(tensor)
                waiting += [] if layer is None else self.operands(layer)
        return seen

    def counts(self) -> dict[str, int]:
        """Layers by type, in lower case, most frequent first."""
        return dict(Counter(layer.type.name.lower() for layer in self.layers).most_common())

    def shape(self, tensor: Any) -> tuple[int, ...]:
        """A tensor's shape, -1 where it varies.

        Raises:
            EngineProofError: The network gives it none.
        """
        try:
            return tuple(tensor.shape)
        except RuntimeError as error:
            what = f"The network is not the graph: the shapes before {tensor.name} do not fit together"
            raise EngineProofError(what, remedy="Lower the graph so that the parser keeps its shapes") from error

    def dtype(self, tensor: Any) -> str:
        """NumPy-style name of a tensor's type."""
        return self.flavour.dtype_name(tensor.dtype)


__all__ = ["PASSES_ON", "NetworkView"]
