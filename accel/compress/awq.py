"""AWQ: input channels that carry more are made larger before rounding, so that they lose less.

J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv:2306.00978): the
factor of channel k is (how large the channel is) ** exponent, the exponent the best of a grid by the error of the
layers' outputs. The channel's size is its root mean square here, and the error is computed exactly from the inputs'
second moments instead of being sampled. Factors are folded into the layer before (``accel.compress.folding``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.compress.folding import Site
from accel.compress.plan import FLOAT_BITS, Choice
from accel.compress.rtn import round_to_nearest

EXPONENTS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
GAIN = 0.98  # a factor must lower the error to this share of it, or none is folded


def channel_factor(size: NDArray, exponent: float) -> NDArray[np.float32]:
    """size ** exponent, scaled so that its largest and smallest number multiply to one; 1 where size is 0.

    Args:
        size: Of the channels, [K], >= 0.
    """
    known = size > 0
    logs = exponent * np.log(size[known].astype(np.float64))
    factor = np.ones(len(size))
    factor[known] = np.exp(logs - (logs.max(initial=-np.inf) + logs.min(initial=np.inf)) / 2)
    return factor.astype(np.float32)


def search_factor(
    site: Site, weights: Sequence[NDArray[np.float32]], choices: Mapping[str, Choice], moments: Any
) -> tuple[NDArray[np.float32] | None, float]:
    """The best factor of a site.

    Args:
        site: Where it would be folded.
        weights: Of its layers, [N, K] each.
        choices: Widths and groups by the layers' names.
        moments: X^T X of the site's inputs, a tensor [K, K].

    Returns:
        The factor [K] (None: none helps), and its squared error relative to that of no factor.
    """
    size = np.sqrt(np.maximum(moments.diagonal().numpy(), 0))
    plain = _squared_error(site, weights, choices, moments, None)
    best, found = GAIN * plain, None
    for exponent in EXPONENTS:
        factor = site.share(channel_factor(size, exponent))
        error = _squared_error(site, weights, choices, moments, factor)
        if error < best:
            best, found = error, factor
    return found, best / plain if found is not None and plain > 0 else 1.0


def _squared_error(
    site: Site,
    weights: Sequence[NDArray[np.float32]],
    choices: Mapping[str, Choice],
    moments: Any,
    factor: NDArray[np.float32] | None,
) -> float:
    """tr((W - W') H (W - W')^T), over the site's layers."""
    import torch

    total = 0.0
    for layer, weight in zip(site.layers, weights, strict=True):
        choice = choices[layer.name]
        if choice.bits == FLOAT_BITS:
            continue
        scaled = weight if factor is None else weight * factor
        rounded = round_to_nearest(scaled, choice.bits, choice.group, search=False, name=layer.name).dequantize()
        lost = torch.from_numpy(weight - (rounded if factor is None else rounded / factor))
        total += float(((lost @ moments) * lost).double().sum())
    return total


__all__ = ["channel_factor", "search_factor"]
