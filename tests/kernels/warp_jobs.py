"""Runs a Gluon kernel of SM 90 whose groups of warps have jobs on the CPU, which Triton's interpreter cannot.

Each job is a thread; one of them, or one copy or product that is under way, moves at a time, drawn at random with odds
of many orders of magnitude. What is under way reads and writes as late as the kernel's waits allow, and the place of a
copy holds NaN from its start: who reads too early, or writes over what is still read, gets wrong numbers. Jobs that
wait for one another for good, arrivals that no barrier expects, copies that a barrier's start is not fenced for, and
elements that are not stored exactly once are errors.

A job's warps move together here: layouts, registers, the width of integers, and what Triton places between the warps of
a group, so that one of them speaks for all, have no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.kernels.warp_machine import (
    Accumulator,
    Barrier,
    Machine,
    Pointer,
    Shared,
    Value,
    allocated,
    current,
    running,
)

torch = pytest.importorskip("torch")


def _wait(barrier: Barrier, phase: int, pred: bool = True) -> None:
    current().move((lambda: barrier.phase != phase) if pred else lambda: True)


def _arrive(barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
    current().move()
    if pred:
        barrier.arrive(count)


def _expect(barrier: Barrier, size: int, pred: bool = True) -> None:
    current().move()
    if pred:
        barrier.bytes += size
        barrier.arrive(1)


def _fetch(source: Any, place: list[int], barrier: Barrier, into: Shared, pred: bool = True) -> None:
    machine = current()
    machine.move()
    if not pred:
        return
    assert barrier not in machine.unfenced, "copies do not know of the barrier's start"
    into.data.fill_(math.nan)
    assert list(source.block_shape) == into.shape and min(place) >= 0

    def arrive() -> None:
        into.data.zero_()
        rows, columns = (slice(first, first + size) for first, size in zip(place, into.shape))
        found = source.base[rows, columns]
        into.data[: found.shape[0], : found.shape[1]] = found
        barrier.bytes -= into.data.numel() * into.data.element_size()
        barrier.settle()

    machine.start("fetches", arrive, ordered=False)


def _fence() -> None:
    current().unfenced.clear()


def _multiply(a: Shared, b: Shared, sums: Any, *, use_acc: bool, is_async: bool) -> Any:
    assert is_async
    current().move()

    def add() -> None:
        product = a.data.float() @ b.data.float()
        sums.copy_(sums + product if use_acc else product)

    current().start("products", add, ordered=True)
    return sums


def _multiply_wait(left: int, deps: list[Any]) -> Any:
    machine = current()
    machine.move()
    machine.drain("products", left)
    return deps[0]


def _gather(pointer: Pointer, mask: Any, other: float) -> Value:
    current().move()
    found = torch.full(mask.shape, other, dtype=pointer.dtype)
    found[mask] = pointer.tensor[pointer.places(mask)]
    return found.as_subclass(Value)


def _scatter(pointer: Pointer, value: Any, mask: Any) -> None:
    current().move()
    assert value.dtype == pointer.dtype
    places = pointer.places(mask)
    pointer.tensor[places] = value[mask].as_subclass(torch.Tensor)
    pointer.stores += torch.bincount(places, minlength=len(pointer.stores))


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def _larger(a: Any, b: Any, propagate_nan: Any = None) -> Any:
    if isinstance(b, torch.Tensor):
        return torch.maximum(a, b)  # NaN where one is
    return torch.clamp(a, min=b) if isinstance(a, torch.Tensor) else max(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return torch.clamp(a, max=b) if isinstance(a, torch.Tensor) else min(a, b)


def _language(program: int) -> SimpleNamespace:
    """``gl`` and ``tl`` of one program."""
    return SimpleNamespace(
        float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32, int64=torch.int64, constexpr=None,
        program_id=lambda axis: program, cdiv=lambda a, b: -(-a // b), where=_where, maximum=_larger, minimum=_smaller,
        exp=torch.exp, abs=torch.abs, load=_gather, store=_scatter, static_range=range,
        allocate_shared_memory=allocated,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Accumulator),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype).as_subclass(Value),
        arange=lambda start, stop, layout=None: torch.arange(start, stop).as_subclass(Value),
        NVMMADistributedLayout=lambda *_: None, BlockedLayout=lambda *_: None, SliceLayout=lambda *_: None,
        warp_specialize=lambda jobs, warps, registers: current().run(jobs),
    )  # fmt: skip


class Simulated:
    """Stands in for a kernel: ``kernel[(programs,)](...)`` runs it on the CPU, program after program.

    Args:
        kernel: The jitted function.
        seed: Of the schedules.
    """

    def __init__(self, kernel: Any, seed: int) -> None:
        self._kernel, self._seed = kernel, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, enable_fp_fusion: bool, **options: Any) -> None:
            operands = [_operand(argument) for argument in arguments]
            for program in range(grid[0]):
                with running(Machine(self._seed * 1000 + program)):
                    _Copies(program).of(self._kernel)(*operands, **options)
            for stores in (operand.stores for operand in operands if isinstance(operand, Pointer)):
                assert stores.sum() == 0 or (stores == 1).all(), "not one store for each element"

        return launch


def _operand(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return Pointer(argument)
    if hasattr(argument, "block_shape"):
        base, block = argument.base, argument.block_shape
        return SimpleNamespace(base=base, block_shape=block, layout=None, dtype=base.dtype)
    return argument


class _Copies:
    """Jitted functions as plain ones that call this file's in place of Gluon's."""

    def __init__(self, program: int) -> None:
        language = _language(program)
        self._names: dict[str, Any] = {
            "gl": language, "tl": language, "fence_async_shared": _fence, "warpgroup_mma": _multiply,
            "warpgroup_mma_wait": _multiply_wait, "_load": _fetch, "_INTERPRETED": True,
            "mbarrier": SimpleNamespace(
                init=Barrier.init, wait=_wait, arrive=_arrive, expect=_expect, MBarrierLayout=lambda: None
            ),
        }  # fmt: skip
        self._modules: dict[int, dict[str, Any]] = {}

    def of(self, jitted: Any) -> FunctionType:
        plain = jitted.fn
        known = self._modules.get(id(plain.__globals__))
        if known is None:
            known = self._modules[id(plain.__globals__)] = {}
            for name, value in plain.__globals__.items():
                known[name] = self._names[name] if name in self._names else self._plain(value)
        return FunctionType(plain.__code__, known, plain.__name__, plain.__defaults__)

    def _plain(self, value: Any) -> Any:
        return self.of(value) if isinstance(getattr(value, "fn", None), FunctionType) else value


@contextmanager
def simulated(module: ModuleType, name: str, seed: int, programs: int) -> Iterator[None]:
    """The launchers of a module run its kernel ``name`` on the CPU meanwhile, as if there were so many
    multiprocessors.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, Simulated(getattr(module, name), seed))
        patch.setattr(module, "has_warp_jobs", lambda device: True)
        patch.setattr(module, "multiprocessors", lambda device: programs)
        yield


__all__ = ["Simulated", "simulated"]
