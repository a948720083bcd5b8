"""How far a row's kernel, and what it is compared with, are from what they should compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from accel_kernels.benchmark.problem import DTYPE, Operands, Result, Row, as_tuple
from accel_kernels.narrow_cache import EIGHT_BITS
from accel_kernels.ops import OPS

PEER = "PyTorch"
PEER_LIMIT = 2e-2  # fp16 between its ops
_EXACT = ("argmax", "sample", "advance")  # they choose and count
_ROUNDING = 1e-7  # of a float32 sum


@dataclass(frozen=True)
class Agreement:
    """One way to compute a row.

    Attributes:
        way: The launch parameters, or ``PEER``.
        error: The largest one, relative to the largest expected value; infinity where a result is missing.
        limit: What the kernel's tests allow; of PyTorch ``PEER_LIMIT``.
    """

    way: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def agreements(row: Row, device: torch.device) -> Iterator[Agreement]:
    """Runs each way, then PyTorch, once, on operands of their own, and compares with the kernel's reference.

    In Triton's interpreter too. Meant for small shapes: the reference is float64.

    Raises:
        TypeError, ValueError: The kernel refuses its operands.
    """
    for way in [*row.prepare(Operands(device)).ways, PEER]:
        problem = row.prepare(Operands(device))
        expected = problem.reference()
        wait_for(device)
        actual = (problem.peer if way == PEER else problem.ways[way])(0)
        yield Agreement(way, error_of(actual, expected), limit_of(row, way))


def peer_result(row: Row, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What PyTorch makes of the row's operands, at any size."""
    problem = row.prepare(Operands(device))
    wait_for(device)
    return tuple(tensor.clone() for tensor in as_tuple(problem.peer(0)))


def check_way(row: Row, way: str, expected: Result, device: torch.device) -> None:
    """Runs one way once, at any size, and compares with PyTorch's result.

    Raises:
        ArithmeticError: They differ by more than PyTorch may lose.
        TypeError, ValueError: The kernel refuses its operands.
    """
    problem = row.prepare(Operands(device))
    wait_for(device)
    error, limit = error_of(problem.ways[way](0), expected), limit_of(row, PEER)
    if not error <= limit:
        raise ArithmeticError(f"the result is {error:.1e} from PyTorch's, more than {limit:.0e}")


def wait_for(device: torch.device) -> None:
    """Lets the operands arrive: a kernel may read weights before the kernel before it ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limit_of(row: Row, way: str) -> float:
    """The largest error of a way that is right."""
    if row.kernel in _EXACT:
        return 0.0
    if way == PEER:
        return PEER_LIMIT
    tolerances = next(op.tolerances for op in OPS if op.name == row.kernel)
    return max(tolerances[DTYPE], _ROUNDING)


def error_of(actual: Result, expected: Result) -> float:
    """The largest relative error of results; of what comes in parts, their sum's."""
    pairs = list(zip(as_tuple(actual), as_tuple(expected), strict=True))
    return max(_error(mine.to(theirs.device), theirs) for mine, theirs in pairs)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In 8 bits a tie may become the next number, of some: what is more than that counts, and how many moved."""
    kind, actual, expected = actual.dtype, actual.double(), expected.double()
    if actual.ndim == expected.ndim + 1:
        actual = actual.sum(0)
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    differences, largest = (actual - expected).abs(), expected.abs().max().clamp(min=1e-30)
    if kind not in EIGHT_BITS:
        return float(differences.max() / largest)
    moved = (differences > 0).double().mean()
    step = 1.0 if kind == torch.int8 else expected.abs().clamp(min=2.0**-6) / 8  # three bits behind the point
    return float(torch.maximum(moved, ((differences - step).max() / largest).clamp(min=0)))


__all__ = [
    "PEER",
    "PEER_LIMIT",
    "Agreement",
    "agreements",
    "check_way",
    "error_of",
    "limit_of",
    "peer_result",
    "wait_for",
]
