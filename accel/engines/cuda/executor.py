"""Runs a program node after node; what can wait for its reader does."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from accel_kernels.quantized_gather import quantized_gather
from accel_kernels.tiles import LAYER_NORM, RMS_NORM

from accel.engines.cuda.attention import CachedAttention, Constants, StepTensors, encoder_attention
from accel.engines.cuda.products import FEW, Products, as_tensor, rows_of
from accel.engines.cuda.program import DOMAIN, Program
from accel.engines.cuda.values import Normed, Parts, Product, Rows, Sum, fresh
from accel.engines.torch_operators import OPERATORS, TYPES

NORMS = {"RMSNormalization": RMS_NORM, "LayerNormalization": LAYER_NORM}
_LINEARS = ("Linear", "GatedLinear")
# Operators whose operands but the first say a shape, axes or ranges: these stay on the host.
_SHAPED = {"Reshape", "Expand", "Slice", "Unsqueeze", "Squeeze", "Split", "ReduceMean", "ReduceSum", "CumSum"}
_HOST = {"Shape", "Range"}
_FUSED = {  # methods by name: a run that held its own would be freed only when Python looks for cycles, memory with it
    "Linear": "_linear",
    "GatedLinear": "_gated_linear",
    "CachedAttention": "_cached_attention",
    "Attention": "_encoder_attention",
    "Gather": "_quantized_rows",
}
CHOICE = "logits_positions"  # the graph's input by which a Gather chooses tokens
Values = dict[ir.Value, object]


class Executor:
    """One run of the program over given inputs.

    Args:
        program: What runs.
        products: Multiplies.
        attention: The decoder's; None: an encoder.
    """

    def __init__(self, program: Program, products: Products, attention: CachedAttention | None = None) -> None:
        self._program, self._products, self._attention = program, products, attention
        self._on_device: dict[tuple[ir.Node, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}  # host -> device

    @torch.inference_mode()
    def run(
        self, feeds: Mapping[str, torch.Tensor], step: StepTensors, wanted: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Graph inputs by name -> outputs by name, float32; caches are no outputs.

        Args:
            feeds: On the device.
            step: Where tokens stand.
            wanted: int64 [R], the tokens whose logits are wanted; None: each token's.
        """
        return Run(self, feeds, step, wanted).run()

    @property
    def program(self) -> Program:
        """What runs."""
        return self._program

    @property
    def attention(self) -> CachedAttention | None:
        """The decoder's."""
        return self._attention

    @torch.inference_mode()
    def trace(
        self, feeds: Mapping[str, torch.Tensor], step: StepTensors, wanted: torch.Tensor | None = None
    ) -> TracedRun:
        """As ``run``, but keeps what each node read, so that it can run again alone."""
        traced = TracedRun(self, feeds, step, wanted)
        traced.run()
        return traced


class Run:
    """A run of a program: what its nodes left, node after node."""

    def __init__(
        self, owner: Executor, feeds: Mapping[str, torch.Tensor], step: StepTensors, wanted: torch.Tensor | None
    ) -> None:
        self._program, self._products, self._attention = owner._program, owner._products, owner._attention
        self._on_device, self._step, self._wanted = owner._on_device, step, wanted
        self._values: Values = dict(owner._program.constants)
        for value in owner._program.inputs:
            if value.name in feeds:
                self._values[value] = feeds[value.name]
        self._device = step.past_lengths.device

    def run(self) -> dict[str, torch.Tensor]:
        remaining = {value: len(readers) for value, readers in self._program.readers.items()}
        for node in self._program.nodes:
            self._values[node.outputs[0]] = None
            self._compute(node)
            for value in node.inputs:
                if value is None or value.is_initializer():
                    continue
                remaining[value] -= 1
                if not remaining[value] and not value.is_graph_output():
                    self._values.pop(value, None)
        outputs = [value for value in self._program.outputs if not (value.name or "").startswith("present.")]
        return {value.name or "": self._output(value) for value in outputs}

    def _output(self, value: ir.Value) -> torch.Tensor:
        return self._tensor(value).float()

    def _compute(self, node: ir.Node) -> None:
        values = self._values
        if node.domain == DOMAIN:
            values[node.outputs[0]] = getattr(self, _FUSED[node.op_type])(node)
        elif node.op_type in NORMS:
            values[node.outputs[0]] = self._norm(node)
        elif node.op_type == "Add" and (total := self._sum(node)) is not None:
            values[node.outputs[0]] = total
        elif node.op_type == "Add" and (added := self._added_rows(node)) is not None:
            values[node.outputs[0]] = added
        elif node.op_type == "Cast" and isinstance(values[node.inputs[0]], Rows) and _to_float32(node):
            values[node.outputs[0]] = values[node.inputs[0]]
        elif node.op_type == "Gather" and (rows := self._gather(node)) is not None:
            values[node.outputs[0]] = rows
        else:
            results = self._generic(node)
            results = results if isinstance(results, list | tuple) else [results]
            values.update(zip(node.outputs, results, strict=True))

    # Fused nodes

    def _linear(self, node: ir.Node) -> object:
        matrix, source = self._program.matrices[node], self._flat(node.inputs[0])
        kind = node.attributes.get_string("activation", None)
        reader = self._program.only_reader(node.outputs[0])
        if kind is None and reader is not None and self._adds(reader, node.outputs[0]):
            return Product(source, matrix)
        decoding = self._attention is not None and self._step.longest == 1
        if kind is None and decoding and reader is not None and _takes_parts(reader):
            return self._products.parts(source, matrix)
        low = all(use.domain == DOMAIN for use in self._program.readers.get(node.outputs[0], [])) and reader is not None
        wide = not low and (node.outputs[0].is_graph_output() or rows_of(source) <= FEW)
        result = self._products.linear(source, matrix, kind=kind, wide_out=wide)
        return self._shaped(result, node.inputs[0])

    def _gated_linear(self, node: ir.Node) -> object:
        matrix, source = self._program.matrices[node], self._flat(node.inputs[0])
        result = self._products.linear(source, matrix, kind=node.attributes["activation"].as_string())
        return self._shaped(result, node.inputs[0])

    def _cached_attention(self, node: ir.Node) -> torch.Tensor:
        assert self._attention is not None
        constants = Constants(*(None if value is None else self._tensor(value) for value in node.inputs[7:]))
        operands = [None if value is None else self._flat(value) for value in node.inputs[:3]]
        return self._attention.run(node, operands, constants, self._step)

    def _encoder_attention(self, node: ir.Node) -> torch.Tensor:
        operands = [None if value is None else self._flat(value) for value in node.inputs[:3]]
        bias = self._tensor(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
        result = encoder_attention(node, operands, bias, self._step, self._products)
        return self._shaped(result, node.inputs[0])

    def _norm(self, node: ir.Node) -> object:
        source = self._values[node.inputs[0]]  # type: ignore[index]
        weight = self._tensor(node.inputs[1])
        bias = self._tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        default = 1e-5
        epsilon = node.attributes.get_float("epsilon", default) or default
        by = Normed(torch.empty(0), weight, bias, epsilon, NORMS[node.op_type])
        readers, output = self._program.readers.get(node.outputs[0], []), node.outputs[0].is_graph_output()
        linears = [reader.domain == DOMAIN and reader.op_type in _LINEARS for reader in readers]
        low = any(linears) and not output
        alone = self._program.only_reader(node.inputs[0]) is node  # type: ignore[arg-type]
        if low and alone and isinstance(source, Rows) and source.result is None:
            return source.normalized(by, self._products.dtype)
        if isinstance(source, Sum):
            shape = source.shape
        else:
            tensor = self._tensor(node.inputs[0])
            shape = tensor.shape
            source = tensor.reshape(-1, shape[-1])
        if all(linears) and rows_of(source) == 1 and not output:
            by.source, by.shape = source.tensor() if isinstance(source, Sum) else source, shape
            return by
        if not low:
            return self._wide_norm(source, by, shape)
        result = self._products.norm(source, by)
        return result if shape is None else result.reshape(shape)

    def _wide_norm(self, source: torch.Tensor | Sum, by: Normed, shape: torch.Size | None) -> torch.Tensor:
        """A norm whose result is a stream of its own, or an output: float32."""
        wide = Products(torch.float32, False).norm(source, by)
        return wide if shape is None else wide.reshape(shape)

    # Sums and rows

    def _adds(self, reader: ir.Node, value: ir.Value) -> bool:
        """Whether a node adds the value to a computed one of its shape."""
        if reader.op_type != "Add" or reader.domain or reader.inputs[0] is reader.inputs[1]:
            return False
        other = reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0]
        return other is not None and not other.is_initializer() and other.shape == value.shape

    def _sum(self, node: ir.Node) -> object:
        pair = [self._values[value] for value in node.inputs]  # type: ignore[index]
        if not any(isinstance(value, Product) for value in pair):
            return None
        place = next(index for index, value in enumerate(pair) if isinstance(value, Product))
        product, other = pair[place], node.inputs[1 - place]
        assert isinstance(product, Product) and other is not None
        if isinstance(pair[1 - place], Product):  # two branches: one is computed first
            second = pair[1 - place]
            assert isinstance(second, Product)
            stream = self._products.linear(second.source, second.matrix, wide_out=rows_of(second.source) <= FEW).float()
        else:
            stream = self._flat_tensor(other)
        shape = self._shape_of(pair[1 - place])
        shape = None if shape is None else torch.Size((*shape[:-1], product.matrix.outputs))
        rows = rows_of(product.source)
        if rows == 1:
            done = self._products.linear(product.source, product.matrix, residual=stream.float().contiguous())
            return done if shape is None else done.reshape(shape)
        reader = self._program.only_reader(node.outputs[0])
        kept = reader is None or reader.op_type not in NORMS
        total = self._products.sum(product.source, product.matrix, stream.contiguous(), kept=kept)
        total.shape = shape
        return total

    def _shape_of(self, value: object) -> torch.Size | None:
        """A computed value's shape where it is not [T, K]."""
        if isinstance(value, Product):
            return self._shape_of(value.source)
        if isinstance(value, Sum | Normed):
            return value.shape
        shape = value.shape if isinstance(value, torch.Tensor | Rows) else None
        return shape if shape is not None and len(shape) != 2 else None

    def _added_rows(self, node: ir.Node) -> torch.Tensor | Rows | None:
        """Rows of a table on top of what stands beside them; None: neither operand is that."""
        for place in (1, 0):
            rows, value = self._values[node.inputs[place]], node.inputs[1 - place]  # type: ignore[index]
            beside = self._values[value]  # type: ignore[index]
            if isinstance(rows, Rows) and isinstance(beside, Rows) and (joined := beside.joined(rows)) is not None:
                return joined
            if isinstance(rows, Rows) and rows.result is None:
                other = self._tensor(value)
                if other.is_floating_point() and other.device == self._device and rows.fits(other.shape):
                    return rows.added_to(other)
        return None

    def _gather(self, node: ir.Node) -> torch.Tensor | Sum | Rows | None:
        """Rows of an embedding, or the tokens whose logits are wanted."""
        source, index = node.inputs
        assert source is not None and index is not None
        if index.name == CHOICE and self._wanted is None:
            return self._values[source]  # type: ignore[return-value]
        if index.name == CHOICE:
            assert self._wanted is not None
            return self._tensor(source).index_select(node.attributes.get_int("axis", 0) or 0, self._wanted)
        table = self._values[source]
        ids = self._values[index]
        if not source.is_initializer() or not isinstance(table, torch.Tensor) or not isinstance(ids, torch.Tensor):
            return None
        embeds = table.dim() == 2 and table.is_floating_point() and table.device == self._device and ids.numel() > 0
        if not embeds or node.attributes.get_int("axis", 0):
            return None
        return Rows(table, ids if ids.device == table.device else self._moved((node, 1), ids))

    def _quantized_rows(self, node: ir.Node) -> torch.Tensor:
        table, scales, ids = (self._tensor(value) for value in node.inputs)
        bits = node.attributes["bits"].as_int()
        out = torch.empty(ids.numel(), table.shape[1] * 32 // bits, dtype=torch.float32, device=table.device)
        return quantized_gather(table, scales, out, ids.reshape(-1).contiguous(), bits=bits).reshape(*ids.shape, -1)

    # Everything else

    def _generic(self, node: ir.Node) -> object:
        """An operator of ONNX on PyTorch, low types widened: none of these is where time goes."""
        operands: list[torch.Tensor | None] = []
        shaped = node.op_type in _SHAPED
        for value in node.inputs:
            tensor = None if value is None else self._tensor(value)
            if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
                tensor = tensor.float()
            operands.append(tensor)
        if not shaped and node.op_type not in _HOST:
            operands = self._together(node, operands)
        if node.op_type == "Shape":
            return _shape(node, operands[0])  # type: ignore[arg-type]
        if node.op_type == "Range":
            start, stop, by = (operand.item() for operand in operands if operand is not None)
            return torch.arange(start, stop, by, dtype=operands[0].dtype)  # type: ignore[union-attr]
        if node.op_type == "Cast" and _to_float32(node):
            return operands[0].float()  # type: ignore[union-attr]
        return OPERATORS[node.op_type](node, *operands)

    def _together(self, node: ir.Node, operands: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Operands that live on the host join those on the device."""
        if all(operand is None or operand.device.type == "cpu" for operand in operands):
            return operands
        result: list[torch.Tensor | None] = []
        for place, operand in enumerate(operands):
            if operand is None or operand.device == self._device or (operand.dim() == 0 and node.op_type != "Gather"):
                result.append(operand)
            else:
                result.append(self._moved((node, place), operand))
        return result

    def _moved(self, key: tuple[ir.Node, int], operand: torch.Tensor) -> torch.Tensor:
        """The operand on the device. What the host computes depends on shapes alone: a recorded run meets it again."""
        known = self._on_device.setdefault(key, [])
        for host, device in known:
            if host.dtype == operand.dtype and torch.equal(host, operand):
                return device
        known.append((operand.clone(), operand.to(self._device)))
        return known[-1][1]

    def _tensor(self, value: ir.Value | None) -> torch.Tensor:
        assert value is not None
        found = self._values[value]
        if isinstance(found, Normed):
            result = self._products.normalize(found)
            return result if found.shape is None else result.reshape(found.shape)
        if isinstance(found, Product):
            return self._products.linear(found.source, found.matrix)
        tensor = as_tensor(found)
        return tensor.reshape(found.shape) if isinstance(found, Sum) and found.shape is not None else tensor

    def _flat(self, value: ir.Value | None) -> object:
        """As rows of tokens: [T, K], or what becomes that."""
        assert value is not None
        found = self._values[value]
        if isinstance(found, Normed | Sum | Parts):
            return found
        return self._flat_tensor(value)

    def _flat_tensor(self, value: ir.Value) -> torch.Tensor:
        tensor = self._tensor(value)
        return tensor.reshape(-1, tensor.shape[-1])

    def _shaped(self, result: torch.Tensor, like: ir.Value | None) -> torch.Tensor:
        """[T, N] with the leading dimensions of the node's input."""
        assert like is not None
        found = self._values[like]
        shape = found.shape if isinstance(found, torch.Tensor | Normed | Sum | Rows) else None
        return result if shape is None else result.reshape(*shape[:-1], result.shape[-1])


class TracedRun(Run):
    """A run that remembers.

    Attributes:
        nodes: (node, what it read, what it left), in order.
    """

    def __init__(
        self, owner: Executor, feeds: Mapping[str, torch.Tensor], step: StepTensors, wanted: torch.Tensor | None
    ) -> None:
        super().__init__(owner, feeds, step, wanted)
        self.nodes: list[tuple[ir.Node, Values, object]] = []

    def _compute(self, node: ir.Node) -> None:
        operands = node.inputs[:1] if node in self._program.matrices else node.inputs
        read = {value: fresh(self._values[value]) for value in operands if value is not None and value in self._values}
        super()._compute(node)
        self.nodes.append((node, read, self._values[node.outputs[0]]))

    def compute(self, node: ir.Node, values: Values) -> object:
        """The node's result for what it reads."""
        self._values.update({value: fresh(kept) for value, kept in values.items()})
        super()._compute(node)
        return self._values[node.outputs[0]]


def _to_float32(cast: ir.Node) -> bool:
    return TYPES[ir.DataType(cast.attributes["to"].as_int())] == torch.float32


def _takes_parts(reader: ir.Node) -> bool:
    """Whether it adds up a product's parts as it reads them: attention over queries, keys and values in one."""
    return reader.op_type == "CachedAttention" and reader.inputs[1] is None


def _shape(node: ir.Node, x: torch.Tensor) -> torch.Tensor:
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


__all__ = ["CHOICE", "NORMS", "Executor", "Run", "TracedRun", "Values"]
