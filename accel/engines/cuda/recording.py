"""How CUDA graphs are recorded here, whoever does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from accel.engines.capturing import capturing


@contextmanager
def recording(graph: Any, pool: Any = None) -> Iterator[None]:
    """Records what this thread launches meanwhile.

    Other threads, another model's for instance, go on: what they launch, allocate or wait for on their streams neither
    fails nor ends the recording, as an allocation would unasked. They record themselves, or wait for the whole device,
    when this is done: PyTorch has one stream for all recordings.

    Args:
        graph: A ``torch.cuda.CUDAGraph``.
        pool: Of its memory; None: its own.

    Raises:
        RuntimeError: It failed. The stream is what it was, and memory is given back as before, but for what the
            recording took where PyTorch is 2.12 or 2.13.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    with capturing, torch.cuda.stream(torch.cuda.current_stream()):  # what fails leaves its own stream current
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                yield
        except BaseException:
            _end_allocation(pool)
            raise


def _end_allocation(pool: Any) -> None:
    """What PyTorch leaves undone where CUDA refuses a recording's begin or, before 2.12, its end (PyTorch's #180395).

    To PyTorch a recording would be under way for ever: no memory would go back to the driver, nor be freed for others.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # PyTorch has ended it
    if torch.__version__ < "2.12":  # of later ones some release it with the graph (PyTorch's #190348)
        torch._C._cuda_releasePool(device, pool)


__all__ = ["recording"]
