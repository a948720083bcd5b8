"""What every algorithm does to arrays first and last: checks, groups, and the packing of a result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import InputError
from accel.quantized_tensor import QuantizedTensor

GROUPS = (128, 64, 32)  # input channels that may share a scale
LIMITS = {8: (-127, 127), 4: (-8, 7)}  # smallest and largest integer of each width
_LARGEST_SCALE = 65504.0  # of float16


def check_weight(weight: NDArray, name: str) -> None:
    """Refuses what no integers can stand for.

    Raises:
        InputError: NaN or infinity in it, or it is no matrix; names it and counts the bad values.
    """
    if weight.ndim != 2:
        raise InputError(f"a weight of shape {list(weight.shape)} is no matrix", where=name)
    check_finite(weight, name)


def check_finite(weight: NDArray, name: str) -> None:
    """Refuses what is no number.

    Args:
        weight: Floats of any shape.
        name: Of the weight, for the error.

    Raises:
        InputError: NaN or infinity in it; counts them.
    """
    bad = weight.size - int(np.count_nonzero(np.isfinite(weight)))
    if bad:
        remedy = "The checkpoint is damaged or was trained into overflow: export the model again from a sound one"
        raise InputError(f"{bad:,} of {weight.size:,} weights are NaN or infinite", where=name, remedy=remedy)


def check_moments(moments: Any, name: str) -> None:
    """Refuses second moments X^T X of inputs that are no numbers.

    Raises:
        InputError: NaN or infinity among them; names the layer that reads the inputs.
    """
    import torch

    if not bool(torch.isfinite(moments).all()):
        remedy = "The model gives NaN or infinity on the calibration text: check it in fp32 first"
        raise InputError("NaN or infinity among the inputs' second moments", where=name, remedy=remedy)


def fitting_group(columns: int, group: int, name: str) -> int:
    """The largest group of at most ``group`` inputs that divides a row; 0 (the whole row) stays.

    Args:
        columns: Inputs of the layer.
        group: Wanted: 0, 32, 64 or 128.
        name: Of the weight, for the error.

    Raises:
        InputError: No allowed group divides the row.
    """
    if group == 0:
        return 0
    for size in GROUPS:
        if size <= group and columns % size == 0:
            return size
    what = f"{columns} inputs cannot be divided into groups of {group}, nor of a smaller size there is"
    remedy = f"Keep this layer in float (keep={{{name!r}: 32}}), or take a scheme with one scale per row, such as w8a8"
    raise InputError(what, where=name, remedy=remedy)


def storable_scales(scales: Any, group: int, name: str) -> Any:
    """Scales as they are stored: those of groups rounded to float16, zeros (of all-zero groups) made one.

    Args:
        scales: A float32 tensor of any shape.
        group: Of the tensor; 0: scales stay float32.
        name: Of the weight, for the error.

    Raises:
        InputError: Larger than float16 holds.
    """
    import torch

    if group:
        if bool((scales.abs() > _LARGEST_SCALE).any()):
            remedy = "Take a scheme with one scale per row, such as w8a8, or keep this layer in float"
            raise InputError("weights this large have scales beyond float16", where=name, remedy=remedy)
        scales = scales.half().float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def pack(values: Any, scales: Any, bits: int, group: int) -> QuantizedTensor:
    """Tensors [N, K] of integers and [N, G] of scales as a quantised weight."""
    import torch

    integers = values.to(torch.int8).contiguous().numpy()
    return QuantizedTensor(integers, scales.float().contiguous().numpy(), bits, group)


__all__ = [
    *("GROUPS", "LIMITS"),
    *("check_finite", "check_moments", "check_weight", "fitting_group", "pack", "storable_scales"),
]
