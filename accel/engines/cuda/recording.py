"""How CUDA graphs are recorded here, whoever does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_alone = threading.RLock()


@contextmanager
def recording(graph: Any, pool: Any = None) -> Iterator[None]:
    """Records what this thread launches meanwhile.

    Other threads, another model's for instance, go on: what they allocate or wait for meanwhile neither fails nor ends
    the recording, as CUDA has it unasked. They do not record themselves, since PyTorch has one stream for that.

    Args:
        graph: A ``torch.cuda.CUDAGraph``.
        pool: Of its memory; None: its own.

    Raises:
        RuntimeError: It failed. The stream is what it was.
    """
    with (
        _alone,
        torch.cuda.stream(torch.cuda.current_stream()),  # a recording that fails leaves its own stream current
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        yield


__all__ = ["recording"]
