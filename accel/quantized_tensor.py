"""A weight matrix in integers with scales, as compression makes it and engines store it in their own layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT8_MAX = 448.0  # of E4M3 without infinities

@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Symmetric integers: weight[n, k] = values[n, k] * scales[n, k // group].

    Attributes:
        values: int8 [N, K], an output's row after the other: in [-127, 127] for 8 bits, in [-8, 7] for 4.
        scales: float32 [N, G], G = K / group, or 1 when ``group`` is 0. A scale may be negative. Those of groups are
            numbers of float16, as which engines store them.
        bits: 8 or 4.
        group: Neighbouring inputs that share a scale; 0: the whole row.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        groups = columns // self.group if self.group else 1
        assert self.scales.shape == (rows, groups), (self.values.shape, self.scales.shape, self.group)
        assert not self.group or columns % self.group == 0, (columns, self.group)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed values and the scales (2 each in groups, else 4), without padding."""
        return self.values.size * self.bits // 8 + self.scales.size * (2 if self.group else 4)

    def dequantize(self) -> NDArray[np.float32]:
        """The weights that it stands for, float32 [N, K]."""
        rows, columns = self.shape
        grouped = self.values.reshape(rows, self.scales.shape[1], -1)
        return (grouped * self.scales[:, :, None]).reshape(rows, columns)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """A range of outputs."""
        return QuantizedTensor(self.values[start:stop], self.scales[start:stop], self.bits, self.group)


def concatenate(parts: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """One under the other; None unless all are of the same bits and groups."""
    first = parts[0]
    if any((part.bits, part.group) != (first.bits, first.group) for part in parts):
        return None
    values, scales = (np.concatenate(arrays) for arrays in zip(*((p.values, p.scales) for p in parts), strict=True))
    return QuantizedTensor(values, scales, first.bits, first.group)


def float8_scale(weight: NDArray) -> float:
    """The scale under which the largest magnitude is at the end of E4M3's range; a float16 number above 0."""
    least = float(np.finfo(np.float16).smallest_subnormal)
    peak = max(float(weight.max(initial=0.0)), -float(weight.min(initial=0.0)))
    return max(float(np.float16(peak / FLOAT8_MAX)), least)


def round_float8(weight: NDArray, scale: float) -> NDArray[Any]:
    """The nearest 8-bit floats (E4M3: 4 bits of exponent, 3 of mantissa, up to 448): weight is near result * scale.

    Args:
        weight: Finite, of any shape.
        scale: See ``float8_scale``.

    Returns:
        ``ml_dtypes.float8_e4m3fn`` of that shape.
    """
    import ml_dtypes

    scaled = np.clip(np.asarray(weight, np.float32) / np.float32(scale), -FLOAT8_MAX, FLOAT8_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn)


__all__ = ["FLOAT8_MAX", "QuantizedTensor", "concatenate", "float8_scale", "round_float8"]
