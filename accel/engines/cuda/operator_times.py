"""Where a run's time goes: each kind of node alone, with the bytes and operations that it asks for.

The nodes of one kind (a product of one shape, the attention) run one after another in a recording of their own, all
layers' of them, so that weights come from memory and kernels overlap as they do in a whole run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass

import onnx_ir as ir
import torch

from accel.engines.cuda.attention import StepTensors
from accel.engines.cuda.device import Device
from accel.engines.cuda.executor import CHOICE, Executor, TracedRun, Values
from accel.engines.cuda.products import rows_of
from accel.engines.cuda.program import Matrix, Program
from accel.engines.cuda.recording import recording
from accel.engines.cuda.values import Normed, Product, Rows, Sum

_REPLAYS = 20
_Work = tuple[float, float]


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one kind in one run.

    Attributes:
        name: The operator; of products also how many inputs and outputs they have.
        count: Nodes.
        seconds: Of all of them.
        bytes: That they read and write at least, weights and caches included.
        flops: Multiplications and additions of products and attention.
    """

    name: str
    count: int
    seconds: float
    bytes: float
    flops: float


@dataclass(frozen=True)
class PhaseTimes:
    """A run as a whole and its operators, the longest first."""

    name: str
    seconds: float
    operators: tuple[OperatorTime, ...]


@dataclass
class _Kind:
    """What is known of one kind of nodes while it is gathered."""

    bytes: float = 0.0
    flops: float = 0.0
    runs: list[Callable[[], object]] = field(default_factory=list)


def time_operators(
    name: str, executor: Executor, device: Device, feeds: Mapping[str, torch.Tensor], step: StepTensors,
    seen: float, wanted: torch.Tensor | None = None,
) -> PhaseTimes:  # fmt: skip
    """Runs a phase and each kind of its nodes.

    Args:
        name: The phase's.
        executor: What runs it.
        device: Where; on the CPU times are those of the interpreter.
        feeds, step, wanted: See ``Executor.run``.
        seen: Keys that each query sees on average.
    """
    executor.run(feeds, step, wanted)  # compiles
    traced = executor.trace(feeds, step, wanted)
    by_matrix = {id(matrix): node for node, matrix in executor.program.matrices.items()}
    kinds: dict[str, _Kind] = {}
    for node, values, result in traced.nodes:
        waits = isinstance(result, Product | Normed | Rows)
        if waits or _hands_on(node, wanted) or not _computes(values, result, device):
            continue  # whoever reads it computes it, or nobody does
        kind = kinds.setdefault(_title(node, values, executor.program, by_matrix), _Kind())
        kind.runs.append(_again(traced, node, values))
        size, operations = _work(node, values, result, executor, step, seen)
        kind.bytes += size
        kind.flops += operations
    operators = []
    for title, kind in kinds.items():
        seconds = _seconds(lambda runs=kind.runs: [run() for run in runs], device)  # type: ignore[misc]
        operators.append(OperatorTime(title, len(kind.runs), seconds, kind.bytes, kind.flops))
    operators.sort(key=lambda operator: -operator.seconds)
    return PhaseTimes(name, _seconds(lambda: executor.run(feeds, step, wanted), device), tuple(operators))


def drawn_tokens(shape: tuple[int, ...], vocab_size: int, device: Device) -> torch.Tensor:
    """Ids in [0, vocab_size), int64, on the device; the same in every call.

    Where all are alike, so are rows that are multiplied, and a GPU at its power limit may multiply such rows faster.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, shape, generator=generator).to(device.torch)


def _hands_on(node: ir.Node, wanted: torch.Tensor | None) -> bool:
    """Whether it chooses tokens where each one's logits are wanted: nothing runs."""
    return wanted is None and any(value is not None and value.name == CHOICE for value in node.inputs)


def _computes(values: Values, result: object, device: Device) -> bool:
    """Whether anything runs on the device: shapes are the host's, and other views of a tensor cost nothing."""
    if not isinstance(result, torch.Tensor):
        return True
    seen = {value.data_ptr() for value in values.values() if isinstance(value, torch.Tensor)}
    return result.device.type == device.torch.type and result.data_ptr() not in seen


def _again(traced: TracedRun, node: ir.Node, values: Values) -> Callable[[], object]:
    return lambda: traced.compute(node, values)


def _title(node: ir.Node, values: Values, program: Program, by_matrix: dict[int, ir.Node]) -> str:
    product = next((value for value in values.values() if isinstance(value, Product)), None)
    linear = node if product is None else by_matrix[id(product.matrix)]
    matrix = program.matrices.get(linear)
    if matrix is None:
        return node.op_type
    bits = f", int{matrix.bits}" if matrix.bits else ""
    return f"{linear.op_type} {matrix.inputs} to {matrix.outputs}{bits}"


def _work(node: ir.Node, values: Values, result: object, executor: Executor, step: StepTensors, seen: float) -> _Work:
    """(bytes, operations) of one node."""
    size = _moved(values, result)
    product = next((value for value in values.values() if isinstance(value, Product)), None)
    matrix = executor.program.matrices.get(node) if product is None else product.matrix
    if matrix is not None:
        source = next(iter(values.values())) if product is None else product.source
        tensors = (matrix.weight, matrix.scales, matrix.bias)
        gates = 1 + (matrix.stripe is not None)
        weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        rows = source.numel() // matrix.inputs if isinstance(source, torch.Tensor) else rows_of(source)
        return size + weights, 2.0 * rows * matrix.inputs * matrix.outputs * gates
    if node.op_type.endswith("Attention") and isinstance(result, torch.Tensor):
        seen = min(seen, node.attributes.get_int("window", None) or seen)
        attention, sequences = executor.attention, len(step.past_lengths)
        cached = 0.0 if attention is None else seen * attention.slot_bytes(node) * sequences
        return size + cached, 4.0 * result.numel() * seen
    return (2.0 * _bytes(result) if node.op_type == "Gather" else size), 0.0


def _moved(values: Values, result: object) -> float:
    """Bytes of what a node reads and leaves; the stream of a sum that its reader adds up is that one's to read."""
    read = [kept for value, kept in values.items() if not value.is_initializer()]
    if isinstance(result, Sum) and result.result is None:
        read, result = [kept for kept in read if isinstance(kept, Product)], result.added
    return float(_bytes(result) + sum(_bytes(kept) for kept in read))


def _bytes(value: object) -> int:
    """Of everything that a value holds on the way to its reader, matrices left out; of a sum that is there itself."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Sum) and value.result is not None:
        return value.result.nbytes
    if isinstance(value, Rows):
        read = min(value.ids.numel(), len(value.table))  # a row that is read twice is in the L2
        return read * value.table.shape[1] * value.table.element_size() + _bytes(value.also)
    if is_dataclass(value) and not isinstance(value, Matrix | type):
        return sum(_bytes(getattr(value, each.name)) for each in fields(value))
    return sum(_bytes(part) for part in value) if isinstance(value, list | tuple) else 0


def _seconds(run: Callable[[], object], device: Device) -> float:
    """Of one run, recorded where there is a GPU."""
    with torch.inference_mode():
        run()
        if not device.is_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        graph = torch.cuda.CUDAGraph()
        with recording(graph):
            run()
        graph.replay()
        start_event, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        for _ in range(_REPLAYS):
            graph.replay()
        stop.record()
        stop.synchronize()
        return float(start_event.elapsed_time(stop)) / 1e3 / _REPLAYS


__all__ = ["OperatorTime", "PhaseTimes", "drawn_tokens", "time_operators"]
