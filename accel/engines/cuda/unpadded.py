"""Encoders without padding inside: values that hold each token's numbers hold those of real tokens alone.

A graph's inputs and outputs are padded, [B, W]. Between them most nodes compute each token by itself, or attend within
its row: there tokens stand side by side, [1, T, K]. Which values these are follows from the graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir
import torch

from accel.engines.cuda.attention import StepTensors
from accel.engines.cuda.executor import NORMS, Executor, Run
from accel.engines.cuda.program import DOMAIN, Program
from accel.engines.cuda.values import Rows

_ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Gelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"})


class Layout(NamedTuple):
    """Where T tokens stand, on the device.

    Attributes:
        rows, width: B and W of what is padded.
        tokens: int64 [T], each token's place in [B * W]; of places that are left over any.
        places: int64 [T], likewise, but B * W of places that are left over.
    """

    rows: int
    width: int
    tokens: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class TokenPlan:
    """What stands side by side.

    Attributes:
        values: Those that do.
        moves: By node, what it reads the other way than that is written.
    """

    values: set[ir.Value] = field(default_factory=set)
    moves: dict[ir.Node, list[ir.Value]] = field(default_factory=dict)


def plan_tokens(program: Program) -> TokenPlan | None:
    """Which values of an encoder's program hold tokens; None: none does, or no product would gain by it."""
    ids = next((value for value in program.inputs if value.name == "input_ids"), None)
    padded = () if ids is None or ids.shape is None else tuple(ids.shape)
    if len(padded) != 2 or "None" in map(str, padded):  # sizes without a name could be any
        return None
    plan = TokenPlan()
    for node in program.nodes:
        read = _tokens_of(node, plan, padded)
        if read is not None:
            plan.values.add(node.outputs[0])
            moved = [value for value in read if value not in plan.values]
        else:
            moved = [value for value in node.inputs if value is not None and value in plan.values]
        if moved:
            plan.moves[node] = list(dict.fromkeys(moved))
    return plan if any(node.outputs[0] in plan.values for node in program.matrices) else None


@torch.inference_mode()
def run_unpadded(
    executor: Executor, plan: TokenPlan, feeds: Mapping[str, torch.Tensor], step: StepTensors, layout: Layout
) -> dict[str, torch.Tensor]:
    """As ``Executor.run``; inputs and outputs are padded, [B, W, ...]. Behind a row's end anything may stand.

    Args:
        executor: Of the plan's program.
        plan: What stands side by side.
        feeds: On the device.
        step: Starts and stops among tokens side by side; ``room`` is 0.
        layout: Where these stand.
    """
    return _UnpaddedRun(executor, feeds, step, plan, layout).run()


class _UnpaddedRun(Run):
    def __init__(
        self, owner: Executor, feeds: Mapping[str, torch.Tensor], step: StepTensors, plan: TokenPlan, layout: Layout
    ) -> None:
        super().__init__(owner, feeds, step, None)
        self._plan, self._layout, self._slots = plan, layout, layout.tokens % layout.width
        self._turned: dict[ir.Value, object] = {}  # what was brought the other way

    def _compute(self, node: ir.Node) -> None:
        moves = self._plan.moves.get(node, [])
        written = {value: self._values[value] for value in moves}
        self._values.update({value: self._turn(value) for value in moves})
        super()._compute(node)
        self._values.update(written)

    def _output(self, value: ir.Value) -> torch.Tensor:
        result = super()._output(value)
        return self._padded(result) if value in self._plan.values else result

    def _turn(self, value: ir.Value) -> object:
        if value not in self._turned:
            padded = value in self._plan.values
            self._turned[value] = self._padded(self._tensor(value)) if padded else self._side_by_side(value)
        return self._turned[value]

    def _side_by_side(self, value: ir.Value) -> object:
        found = self._values[value]
        if isinstance(found, Rows) and found.result is None and not found.also:
            return Rows(found.table, self._chosen(found.ids.reshape(-1)))  # only rows of real tokens are read
        tensor = self._tensor(value)
        return self._chosen(tensor.reshape(-1, tensor.shape[-1]))

    def _chosen(self, flat: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] of [B * W, ...], or of [W, ...], which is alike for all rows."""
        rows, width, tokens, _ = self._layout
        assert len(flat) in (width, rows * width), flat.shape
        return flat[tokens if len(flat) == rows * width else self._slots][None]

    def _padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, W, K] of T tokens."""
        rows, width, _, places = self._layout
        made = tensor.new_zeros(rows * width + 1, tensor.shape[-1])  # the last: of places that are left over
        made.index_copy_(0, places, tensor.reshape(-1, tensor.shape[-1]))
        return made[:-1].unflatten(0, (rows, width))


def _tokens_of(node: ir.Node, plan: TokenPlan, padded: tuple[object, ...]) -> list[ir.Value] | None:
    """What it reads of each token; None: its result does not hold tokens, or it may look at others."""
    shape = node.outputs[0].shape
    if shape is None or len(shape) != 3 or tuple(shape)[:2] != padded or len(node.outputs) != 1:
        return None
    operands = [value for value in node.inputs if value is not None]
    if node.domain == DOMAIN and node.op_type == "Attention":
        read = [value for value in node.inputs[:3] if value is not None]
    elif _looks_at_first(node):
        read = operands[:1]
    elif node.op_type in _ELEMENTWISE or (node.op_type == "RotaryEmbedding" and len(operands) == 3):
        read = [value for value in operands if not _is_alike_for_all(value)]
    else:
        return None
    known = all(value in plan.values or _can_be_chosen(value, padded) for value in read)
    return read if known and read else None


def _looks_at_first(node: ir.Node) -> bool:
    """Whether a node computes each token of its first operand by itself, the others being constants."""
    if node.domain == DOMAIN:
        return node.op_type in ("Linear", "GatedLinear")
    if node.op_type in NORMS:
        return node.attributes.get_int("axis", -1) in (-1, 2)
    axes = node.inputs[3] if node.op_type == "Slice" and len(node.inputs) > 3 else None
    return axes is not None and axes.const_value is not None and axes.const_value.numpy().tolist() in ([-1], [2])


def _is_alike_for_all(value: ir.Value) -> bool:
    """Whether each token reads the same: a scalar, or a row of numbers."""
    return value.shape is not None and all(size == 1 for size in tuple(value.shape)[:-1])


def _can_be_chosen(value: ir.Value, padded: tuple[object, ...]) -> bool:
    """Whether it is [B, W, K], or [1, W, K]."""
    if value.shape is None or len(value.shape) != 3:
        return False
    first, second, _ = tuple(value.shape)
    width = re.escape(str(padded[1]))
    like_width = re.fullmatch(rf"{width}|Min\(\d+, {width}\)", str(second)) is not None
    return (first, second) == padded or (first == 1 and like_width)


__all__ = ["Layout", "TokenPlan", "plan_tokens", "run_unpadded"]
