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
        RuntimeError: It failed. The stream is what it was.
    """
    with (
        capturing,
        torch.cuda.stream(torch.cuda.current_stream()),  # a recording that fails leaves its own stream current
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        yield


__all__ = ["recording"]
