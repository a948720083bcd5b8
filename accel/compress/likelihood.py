"""Q = mean log p(token | tokens before it) of a canonical decoder, for decisions that are made by measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.compress.calibrate import feeds_of
from accel.spec import ArchSpec

MEASURED_TOKENS = 2048
_TOKENS_AT_ONCE = 128  # logits of a large vocabulary are large


def measured_samples(samples: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Samples at even distances, about 2048 tokens of them."""
    count = max(1, MEASURED_TOKENS // max(1, sum(map(len, samples)) // len(samples)))
    step = max(1, len(samples) // count)
    return list(samples[::step][:count])


def mean_log_likelihood(
    model: ir.Model,
    arch: ArchSpec,
    samples: Sequence[NDArray[np.int64]],
    advance: Callable[[int], None] | None = None,
) -> float:
    """Q over samples of token ids, in nats per token; inputs and caches are not rounded.

    Args:
        model: Canonical, of a decoder; what follows its head (scaling, softcap) is computed too.
        arch: The model's.
        samples: int64 [T] each, T >= 2.
        advance: Told of tokens as they are done.
    """
    import torch

    from accel.graph.evaluation.torch_graph import TorchGraph

    total, count = 0.0, 0
    graph = TorchGraph(model)
    for sample in samples:
        logits = torch.from_numpy(graph.run(feeds_of(model, arch, sample, logits=True))["logits"])[:-1]
        wanted = torch.from_numpy(sample[1:, None])
        for start in range(0, len(wanted), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            total += float(torch.log_softmax(logits[part], -1).gather(1, wanted[part]).double().sum())
        count += len(wanted)
        if advance is not None:
            advance(len(sample))
    return total / count


__all__ = ["mean_log_likelihood", "measured_samples"]
