"""SmoothQuant: outliers of the inputs are moved into the weights, where 8 bits have room for them.

G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(arXiv:2211.10438): channel k's factor is max|X_k| ** a / max|W_k| ** (1 - a). The migration strength a is the best of a
grid by the error of the layers' outputs with inputs and weights in 8 bits; nothing is folded where it does not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.compress.folding import Site
from accel.compress.rtn import round_to_nearest
from accel.scheme import Activations

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
GAIN = 0.98  # a factor must lower the error to this share of it, or none is folded


def smoothing_factor(inputs: NDArray, columns: NDArray, strength: float) -> NDArray[np.float32]:
    """What weights are multiplied by and inputs divided by, [K].

    Args:
        inputs: max|X_k|, [K].
        columns: max|W_k| over all layers that read the inputs, [K].
        strength: 0: weights become even; 1: inputs become even.
    """
    factor = _positive(inputs) ** strength / _positive(columns) ** (1 - strength)
    return (factor / np.exp(np.mean(np.log(factor)))).astype(np.float32)


def _positive(size: NDArray) -> NDArray[np.float64]:
    """No channel counts as smaller than 1e-5 of the largest."""
    return np.maximum(size.astype(np.float64), 1e-5 * max(float(size.max()), 1e-30))


def search_smoothing(
    site: Site, weights: Sequence[NDArray[np.float32]], peaks: NDArray, rows: Any, activations: Activations
) -> tuple[NDArray[np.float32] | None, float]:
    """The best factor of a site.

    Args:
        site: Where it would be folded.
        weights: Of its layers, [N, K] each.
        peaks: max|X_k| over all calibration inputs, [K].
        rows: Some of these inputs, a tensor [R, K].
        activations: ``dynamic`` or ``static``.

    Returns:
        The factor [K] (None: none helps), and its squared error relative to that of no factor.
    """
    columns = np.max([np.abs(weight).max(0) for weight in weights], axis=0)
    plain = _squared_error(weights, peaks, rows, activations, np.ones_like(columns))
    best, found = GAIN * plain, None
    for strength in STRENGTHS:
        factor = site.share(smoothing_factor(peaks, columns, strength))
        error = _squared_error(weights, peaks, rows, activations, factor)
        if error < best:
            best, found = error, factor
    return found, best / plain if found is not None and plain > 0 else 1.0


def static_step(peak: float, rows: Any) -> float:
    """The step between two integers of a static input: of largest magnitude ``peak``, or less where that errs less.

    Args:
        peak: max|X| over all calibration inputs.
        rows: Some of these inputs, a tensor [R, K].
    """
    from accel.graph.evaluation.canonical import round_input

    if peak <= 0:
        return 1.0
    errors = []
    for share in _CLIPS:
        step = peak * share / 127
        errors.append((float(((rows - round_input(rows, step)) ** 2).double().sum()), step))
    return float(np.float32(min(errors)[1]))


_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def _squared_error(
    weights: Sequence[NDArray[np.float32]], peaks: NDArray, rows: Any, activations: Activations, factor: NDArray
) -> float:
    """Of the products of rounded rows and rounded weights, over all layers."""
    from accel.engines.torch_operators import to_torch
    from accel.graph.evaluation.canonical import round_input, row_step

    scaled = rows / to_torch(factor)
    step = row_step(scaled) if activations == "dynamic" else static_step(float((peaks / factor).max()), scaled)
    rounded = round_input(scaled, step)
    total = 0.0
    for weight in weights:
        integers = round_to_nearest(weight * factor, 8, 0, search=False).dequantize()
        lost = rounded @ to_torch(integers).T - rows @ to_torch(weight).T
        total += float((lost**2).double().sum())
    return total


__all__ = ["search_smoothing", "smoothing_factor", "static_step"]
