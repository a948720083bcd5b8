"""The fused graph of a bundle, and its weights on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError

from accel.engines.torch_operators import ROUNDED, to_torch
from accel.errors import BundleError

DOMAIN = "accel.kernels"
STRIPE = 128  # rows of the gate that alternate with as many of its partner: half a tile of the wide kernel
SMALL = 4096  # bytes: constants that may say shapes stay on the host


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weights as the kernels want them.

    Attributes:
        weight: [N, K], gated [2N, K] in stripes of ``stripe`` rows; contiguous. Quantised: words, int32.
        bias: float32 [N], gated [2N], the gate's first; None: none.
        low_bias: The same in the engine's type, for cuBLAS.
        stripe: None: not gated.
        scales: float16 [N, K / group], in the weight's order; None: the weights are floats.
        bits: Of integers, 4 or 8.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    stripe: int | None = None
    low_bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    bits: int = 0

    @property
    def inputs(self) -> int:
        """K."""
        return self.weight.shape[1] * (32 // self.bits if self.bits else 1)

    @property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[0] // (1 if self.stripe is None else 2)


@dataclass
class Program:
    """What runs.

    Attributes:
        nodes: In order.
        constants: Everything else the nodes read, on the device; small integers on the host.
        matrices: By node.
        readers: Who reads a value.
    """

    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    dtype: torch.dtype
    constants: dict[ir.Value, torch.Tensor] = field(default_factory=dict)
    matrices: dict[ir.Node, Matrix] = field(default_factory=dict)
    readers: dict[ir.Value, list[ir.Node]] = field(default_factory=dict)

    @property
    def cache_type(self) -> torch.dtype:
        """What keys and values are kept in: 8 bits where the graph says so, else the engine's type."""
        past = next((value for value in self.inputs if (value.name or "").startswith("past.")), None)
        return ROUNDED.get(past.dtype, self.dtype) if past is not None and past.dtype is not None else self.dtype

    def only_reader(self, value: ir.Value) -> ir.Node | None:
        """The one node that reads a value that is no output."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def load_program(path: Path, device: torch.device, dtype: torch.dtype) -> Program:
    """Reads a graph and moves its weights to the device, each distinct one once.

    Raises:
        BundleError: The file is no such graph, or its weights are missing.
    """
    model = _read(path)
    try:
        program = Program(list(model.graph), list(model.graph.inputs), list(model.graph.outputs), dtype)
        _Loader(program, model.graph, device).run()
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"The graph cannot be read: {error}", where=path.name, remedy="Quantize it again") from error
    return program


def weight_bytes(path: Path) -> int:
    """Bytes of the weight files that a graph reads, each once: they may hold what other graphs read.

    Raises:
        BundleError: The file is no graph.
    """
    values = _read(path).graph.initializers.values()
    stored = [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]
    spans = {(str(tensor.location), tensor.offset or 0): tensor.nbytes for tensor in stored}
    return sum(spans.values())


def _read(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except (OSError, ValueError, KeyError, DecodeError) as error:
        raise BundleError(f"The graph cannot be read: {error}", where=path.name, remedy="Quantize it again") from error


class _Loader:
    def __init__(self, program: Program, graph: ir.Graph, device: torch.device) -> None:
        self._program, self._graph, self._device = program, graph, device
        self._moved: dict[ir.Value, torch.Tensor] = {}
        self._made: dict[tuple[str, ...], torch.Tensor] = {}

    def run(self) -> None:
        program = self._program
        for node in program.nodes:
            for value in node.inputs:
                if value is not None:
                    program.readers.setdefault(value, []).append(node)
        for node in program.nodes:
            if node.domain == DOMAIN and node.op_type in ("Linear", "GatedLinear"):
                program.matrices[node] = self._matrix(node)
            else:
                for value in node.inputs:
                    if value is not None and value.is_initializer():
                        fused = node.domain == DOMAIN  # what kernels read is no shape, however small
                        program.constants[value] = self._move(value) if fused else self._constant(value)

    def _constant(self, value: ir.Value) -> torch.Tensor:
        tensor = value.const_value
        assert tensor is not None, value.name
        if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.nbytes <= SMALL:
            return to_torch(tensor.numpy())
        return self._move(value)

    def _move(self, value: ir.Value) -> torch.Tensor:
        if value not in self._moved:
            assert value.const_value is not None, value.name
            self._moved[value] = to_torch(value.const_value.numpy()).to(self._device)
        return self._moved[value]

    def _matrix(self, node: ir.Node) -> Matrix:
        count = node.attributes["weights"].as_int()
        bits = node.attributes.get_int("bits", None) or 0
        operands = list(node.inputs[1:])
        weight = self._whole(node, operands[:count])
        scales = self._whole(node, operands[count : 2 * count]) if bits else None
        biases = [self._move(value).float() for value in operands[count * (1 + bool(bits)) :] if value is not None]
        bias = torch.cat(biases) if biases else None
        low_bias = None if bias is None else bias.to(self._program.dtype)
        gated = node.op_type == "GatedLinear"
        return Matrix(weight, bias, stripe_of(weight.shape[0] // 2) if gated else None, low_bias, scales, bits)

    def _whole(self, node: ir.Node, inputs: list[ir.Value | None]) -> torch.Tensor:
        """A node's weights, or their scales, as one tensor; made once."""
        values = [value for value in inputs if value is not None]
        turned, gated = not node.attributes["transposed"].as_int(), node.op_type == "GatedLinear"
        key = (node.op_type, *(value.name or "" for value in values))
        if key not in self._made:
            parts = [self._move(value).T if turned else self._move(value) for value in values]
            parts = list(parts[0].chunk(2)) if gated and len(values) == 1 else parts
            self._made[key] = _striped(*parts) if gated else _joined(parts)
            for value in values:  # a copy stands for it; a tied embedding keeps its own
                if self._made[key] is not self._moved.get(value) and value not in self._program.constants:
                    self._moved.pop(value, None)
        return self._made[key]


def stripe_of(outputs: int) -> int:
    """Rows of a gated matrix's stripes."""
    return STRIPE if outputs % STRIPE == 0 else outputs


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _striped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    height, width = stripe_of(len(gate)), gate.shape[1]
    pair = torch.stack([part.reshape(-1, height, width) for part in (gate, up)], 1)
    return pair.reshape(-1, width).contiguous()


__all__ = ["DOMAIN", "Matrix", "Program", "load_program", "stripe_of", "weight_bytes"]
