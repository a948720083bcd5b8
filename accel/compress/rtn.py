"""Round to nearest: each weight on its own, with the largest value's scale or the one of least squared error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.compress.tensors import LIMITS, check_weight, pack, storable_scales
from accel.quantized_tensor import QuantizedTensor

ROWS = 512  # rounded at a time, so that what is in work stays in the caches
# Candidates of the search, as shares of the scale that loses nothing at the ends.
_SHARES = {8: (1.0, 0.97), 4: (1.06, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.64)}


def round_to_nearest(
    weight: NDArray, bits: int, group: int = 0, *, search: bool = True, importance: Any = None, name: str = "weight"
) -> QuantizedTensor:
    """Quantises a weight matrix.

    Args:
        weight: float [N, K].
        bits: 8 or 4.
        group: Inputs that share a scale, a divisor of K; 0: one scale per row.
        search: Choose each group's scale by its squared error; otherwise the largest magnitude decides.
        importance: Weights of the squared error per input, a tensor [K] of numbers > 0 (say the mean square of the
            inputs); None: all alike.
        name: Of the weight, for errors.

    Raises:
        InputError: NaN or infinity among the weights, or scales beyond float16.
    """
    import torch

    check_weight(weight, name)
    rows, columns = weight.shape
    groups = columns // (group or columns)
    factor = None if importance is None else _inputs_first(importance.float()[None], groups)
    values, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, groups)
    for start in range(0, rows, ROWS):
        part = torch.from_numpy(np.array(weight[start : start + ROWS], dtype=np.float32))
        grouped = _inputs_first(part, groups)
        found = storable_scales(choose_scales(grouped, bits, factor, search=search), group, name)
        scales[start : start + ROWS] = found
        rounded = nearest(grouped, found, bits).to(torch.int8)
        values[start : start + ROWS] = rounded.permute(1, 2, 0).reshape(-1, columns)
    return pack(values, scales, bits, group)


def _inputs_first(weight: Any, groups: int) -> Any:
    """[N, K] -> [K / G, N, G]: sums over a group then run along whole rows of memory."""
    return weight.reshape(len(weight), groups, -1).permute(2, 0, 1).contiguous()


def nearest(weight: Any, scales: Any, bits: int) -> Any:
    """The nearest allowed integers, as floats; ``scales`` (none is zero) broadcasts against ``weight``."""
    low, high = LIMITS[bits]
    return (weight / scales).round_().clamp_(low, high)


def choose_scales(groups: Any, bits: int, importance: Any = None, *, search: bool = True) -> Any:
    """A scale per group.

    Without a search, the value of largest magnitude lies at the end of the range: with 4 bits, whose range [-8, 7] is
    not symmetric, the scale's sign puts it on -8. The search rounds with smaller scales too (clipping the largest
    values), and for 4 bits with both signs; each candidate q gets the factor <w, q> / <q, q> that fits it best, and
    the one of least squared error is taken.

    Args:
        groups: float32 [size, ...], the members of each group along the first axis.
        bits: 8 or 4.
        importance: Of each squared error, broadcasts against ``groups``.

    Returns:
        float32 [...]; zero where all of a group is zero.
    """
    import torch

    high, low = groups.amax(0), groups.amin(0)
    full = torch.where(high > -low, high, low) / -8 if bits == 4 else torch.maximum(high, -low) / 127
    if not search:
        return full
    weighted = groups if importance is None else groups * importance
    best, chosen = torch.full_like(full, -1.0), full
    ones = torch.ones_like(full)
    for share in _candidates(bits):
        scales = full * share
        rounded = nearest(groups, torch.where(scales == 0, ones, scales), bits)
        product = (weighted * rounded).sum(0)
        square = (rounded * rounded if importance is None else rounded * rounded * importance).sum(0)
        fitted = product / torch.where(square == 0, ones, square)
        gain = product * fitted  # <w, w> less this is the error
        better = gain > best
        chosen, best = torch.where(better, fitted, chosen), torch.where(better, gain, best)
    return chosen


def _candidates(bits: int) -> list[float]:
    shares = list(_SHARES[bits])
    return shares if bits == 8 else [*shares, *(-share * 8 / 7 for share in shares)]


__all__ = ["choose_scales", "nearest", "round_to_nearest"]
