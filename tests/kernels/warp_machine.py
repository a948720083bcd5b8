"""The machine that ``warp_jobs`` runs a kernel on: one program's shared memory, barriers, and whose turn it is."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")
_SCHEDULES = (-3.0, 3.0)  # powers of ten between which the odds of a job or of a kind of copy lie


class Value(torch.Tensor):  # type: ignore[misc]
    """A tensor in registers; ``split`` takes the last axis apart, as Triton's does, and ``+=`` makes another one."""

    def __iadd__(self, other: Any) -> Value:  # type: ignore[override, misc]
        return self + other  # type: ignore[return-value]

    def __imul__(self, other: Any) -> Value:  # type: ignore[override, misc]
        return self * other  # type: ignore[return-value]

    def split(self) -> tuple[Value, ...]:  # type: ignore[override]
        return self.unbind(-1)  # type: ignore[return-value]

    def to(self, dtype: Any) -> Value:  # type: ignore[override]
        return super().to(dtype)  # type: ignore[return-value]


class Pointer:
    """The first element of a global tensor, or many elements of it.

    Attributes:
        stores: How often each element was written.
    """

    def __init__(self, tensor: Any, offsets: Any = 0, stores: Any = None) -> None:
        self.tensor, self.offsets = tensor.view(-1), offsets
        self.dtype = tensor.dtype
        self.stores = torch.zeros(tensor.numel(), dtype=torch.int64) if stores is None else stores

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.tensor, self.offsets + offsets, self.stores)

    def places(self, inside: Any) -> Any:
        """Those of its elements that are inside."""
        found = self.offsets[inside].as_subclass(torch.Tensor)
        assert ((found >= 0) & (found < self.tensor.numel())).all(), "outside a tensor"
        return found


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes are there."""

    def __init__(self) -> None:
        self.count = self.awaited = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.awaited = count
        current().unfenced.append(self)

    def arrive(self, count: int) -> None:
        self.awaited -= count
        assert self.awaited >= 0, "more arrivals than the barrier expects in a phase"
        self.settle()

    def settle(self) -> None:
        if self.awaited == 0 and self.bytes == 0:
            self.phase ^= 1
            self.awaited = self.count


class Shared:
    """A piece of shared memory."""

    def __init__(self, data: Any) -> None:
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype

    def index(self, place: int) -> Shared:
        assert 0 <= place < len(self.data), "behind the end of shared memory"
        return Shared(self.data[place])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Value:
        current().move()
        return self.data.clone().as_subclass(Value)

    def store(self, value: Any) -> None:
        current().move()
        assert value.dtype == self.dtype and list(value.shape) == self.shape
        self.data.copy_(value)


class Accumulator(Value):
    """Sums that products which are under way still change: read behind a wait alone."""

    def to(self, dtype: Any) -> Value:
        assert not current().under_way_of("products"), "sums are read before the last product ends"
        return Value.to(self, dtype)


class Machine:
    """One program: its jobs, what is under way, and whose turn it is."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.odds: dict[Any, float] = {}
        self.under_way: dict[Any, list[Callable[[], None]]] = {}
        self.unfenced: list[Barrier] = []  # which copies do not know yet
        self.job = -1
        self._turns: list[threading.Semaphore] = []
        self._back = threading.Semaphore(0)
        self._ready: list[Callable[[], bool] | None] = []  # None: the job has ended
        self._failed: BaseException | None = None
        self._inference = torch.is_inference_mode_enabled()  # which each thread has of its own

    def start(self, kind: str, action: Callable[[], None], ordered: bool) -> None:
        """Something that ends later: in the order of its kind and job, or in any."""
        self.under_way.setdefault((kind, self.job), [])
        queue = self.under_way[kind, self.job]
        queue.append(action) if ordered or not queue else queue.insert(self.random.randrange(len(queue) + 1), action)

    def under_way_of(self, kind: str) -> list[Callable[[], None]]:
        """This job's."""
        return self.under_way.get((kind, self.job), [])

    def drain(self, kind: str, left: int) -> None:
        """Ends the oldest ones of this job until so many are left."""
        queue = self.under_way_of(kind)
        while len(queue) > left:
            queue.pop(0)()

    def move(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Others may have a turn; this job goes on when it is ready."""
        if self.job < 0:  # the program's head, before there are jobs
            return
        mine = self.job
        self._ready[mine] = ready
        self._back.release()
        self._turns[mine].acquire()
        if self._failed is not None:
            raise SystemExit

    def run(self, jobs: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """All jobs to their ends.

        Raises:
            AssertionError: They wait for one another, or a job broke a rule.
        """
        self._turns = [threading.Semaphore(0) for _ in jobs]
        self._ready = [lambda: True] * len(jobs)
        threads = [threading.Thread(target=self._job, args=(n, *job), daemon=True) for n, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        while self._failed is None and any(ready is not None for ready in self._ready):
            self._turn()
        for turn in self._turns:
            turn.release()
        for thread in threads:
            thread.join()
        if self._failed is not None:
            raise self._failed
        left = [kind for kind, queue in self.under_way.items() if queue]
        assert not left, f"the program ends while something is under way: {left}"

    def _turn(self) -> None:
        able: list[Any] = [place for place, ready in enumerate(self._ready) if ready is not None and ready()]
        able += [kind for kind, queue in self.under_way.items() if queue]
        if not able:
            self._failed = AssertionError("all jobs wait, and nothing is under way")
            return
        for actor in able:
            self.odds.setdefault(actor, 10 ** self.random.uniform(*_SCHEDULES))
        (actor,) = self.random.choices(able, [self.odds[actor] for actor in able])
        if isinstance(actor, int):
            self.job = actor
            self._turns[actor].release()
            self._back.acquire()
            return
        try:
            self.under_way[actor].pop(0)()
        except BaseException as error:  # the jobs' threads have to end all the same
            self._failed = error

    def _job(self, place: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._turns[place].acquire()
        try:
            if self._failed is None:
                with torch.inference_mode(self._inference):
                    function(*arguments)
        except SystemExit:
            return
        except BaseException as error:
            self._failed = self._failed or error
        self._ready[place] = None
        self._back.release()


_current: list[Machine] = []


def current() -> Machine:
    """The one that runs."""
    return _current[-1]


class Barriers(list[Barrier]):
    """Several of them."""

    def index(self, place: int) -> Barrier:  # type: ignore[override]
        assert 0 <= place < len(self), "no such barrier"
        return self[place]


def allocated(dtype: Any, shape: list[int], layout: Any) -> Barriers | Shared:
    """Shared memory that holds NaN, or barriers."""
    if dtype == torch.int64:  # nothing else has that type
        return Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(shape, math.nan, dtype=dtype))


@contextmanager
def running(machine: Machine) -> Iterator[None]:
    """It is the current one meanwhile."""
    _current.append(machine)
    try:
        yield
    finally:
        _current.pop()


__all__ = ["Accumulator", "Barrier", "Machine", "Pointer", "Shared", "Value", "allocated", "current", "running"]
