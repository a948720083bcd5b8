"""How long a run takes on the GPU, and what the GPU allows.

Runs stand one after another in a CUDA graph, as in a model, so that a kernel's start overlaps its predecessor's end.
The graph's first node reads more than the L2 holds; what that takes, and starting a graph, is measured alone and taken
off. So cold operands, of which each run has a copy of its own (or one that as many bytes ago was read last), come from
memory, and all that runs share comes from the L2 as far as it fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from statistics import median

import torch

from accel_kernels.benchmark.agreement import wait_for
from accel_kernels.benchmark.problem import DTYPE, Problem, Run

MOST_RUNS = 200  # in one graph
_LEAST_RUNS = 4
_GRAPH = 1e-3  # seconds that a graph should take at least
_SHORTEST = 2e-6  # of a run, to choose how many
_REPLAYS, _UNTIMED = 15, 3
_COPY_BYTES, _PRODUCT_SIZE, _TRIES = 1 << 30, 8192, 5


@dataclass(frozen=True)
class Limits:
    """What the GPU allows, the best of several tries.

    Attributes:
        copy_bytes_s: Bytes per second that a copy of 1 GiB reads and writes.
        product_flops_s: Operations per second of an fp16 product of 8,192 x 8,192 matrices.
        l2_bytes: Of the L2 cache.
    """

    copy_bytes_s: float
    product_flops_s: float
    l2_bytes: int

    def seconds(self, problem: Problem) -> float:
        """The roofline: the slower of moving a problem's bytes and computing."""
        return max(problem.bytes / self.copy_bytes_s, problem.flops / self.product_flops_s)

    def is_memory_bound(self, problem: Problem) -> bool:
        """Whether the bytes are the slower ones."""
        return problem.bytes / self.copy_bytes_s >= problem.flops / self.product_flops_s

    @property
    def spread(self) -> int:
        """Bytes after which nothing is left in the L2 of what was read before."""
        return 2 * self.l2_bytes

    def runs(self, problem: Problem) -> int:
        """How many runs a graph of a problem should have."""
        return max(_LEAST_RUNS, min(MOST_RUNS, ceil(_GRAPH / max(self.seconds(problem), _SHORTEST))))


def measure_limits(device: torch.device) -> Limits:
    """Of the GPU, in fp16."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device=device).to(DTYPE)
    out = torch.empty_like(matrix)
    copying = _best(lambda: target.copy_(source))
    product = _best(lambda: torch.mm(matrix, matrix, out=out))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return Limits(2 * _COPY_BYTES / copying, 2 * _PRODUCT_SIZE**3 / product, int(cache))


@dataclass(frozen=True)
class Times:
    """Seconds of one run: in the median replay of a graph, the fastest and the slowest."""

    median: float
    least: float
    most: float

    @property
    def microseconds(self) -> dict[str, float]:
        """All three, in microseconds to the nanosecond."""
        return {name: round(1e6 * value, 3) for name, value in vars(self).items()}


class Timer:
    """Takes times on one GPU.

    Args:
        device: The GPU.
        spread: Bytes that are read in front of the runs, to leave nothing else in the L2.
    """

    def __init__(self, device: torch.device, spread: int) -> None:
        self._device = device
        self._evicted = torch.zeros(spread // 4, device=device)
        self._eviction = median(self._replays(lambda: None))

    def time(self, run: Run, runs: int) -> Times:
        """Of one of ``runs`` runs, the i-th of which gets i.

        Raises:
            RuntimeError: It cannot run, or not in a graph.
        """
        run(0)  # compiles, and lets libraries take the memory that they work in

        def all_runs() -> None:
            for index in range(runs):
                run(index)

        found = sorted((seconds - self._eviction) / runs for seconds in self._replays(all_runs))
        return Times(median(found), found[0], found[-1])

    def _replays(self, body: Callable[[], object]) -> list[float]:
        """Seconds of each replay of a graph: the eviction, then the body."""
        self._evicted.sum()
        wait_for(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._evicted.sum()
            body()
        return _event_seconds(graph.replay, _UNTIMED, _REPLAYS)


def _best(run: Callable[[], object]) -> float:
    return min(_event_seconds(run, 1, _TRIES))


def _event_seconds(run: Callable[[], object], untimed: int, timed: int) -> list[float]:
    """Seconds of each of several calls, on the GPU's clock."""
    found = []
    for index in range(untimed + timed):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if index >= untimed:
            found.append(start.elapsed_time(stop) / 1e3)
    return found


__all__ = ["MOST_RUNS", "Limits", "Timer", "Times", "measure_limits"]
