"""Scales of an integer KV cache, as calibration finds them and engines' graphs hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel.errors import InputError
from accel.spec import ArchSpec

KV_BITS = (8, 4)


@dataclass(frozen=True, eq=False)
class KvQuantization:
    """Symmetric integers: key[h, t, d] = q[h, t, d] * keys[layer][h, d], and values alike.

    q lies in [-128, 127] for 8 bits and in [-8, 7] for 4; what exceeds that is cut off. Keys are quantised as the
    cache holds them: after their rotation.

    Attributes:
        bits: 8 or 4.
        keys: Per layer float32 [kv_heads, head_dim], or [1] where the whole tensor shares one scale.
        values: The same of the values. Both of a layer, and all layers, are of one kind.
    """

    bits: int
    keys: tuple[NDArray[np.float32], ...]
    values: tuple[NDArray[np.float32], ...]

    @property
    def per_channel(self) -> bool:
        """Whether every channel of every head has its own scale."""
        return self.keys[0].ndim == 2

    @property
    def range(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def check(self, arch: ArchSpec) -> None:
        """Compares with a model's layers.

        Raises:
            InputError: Bits that no cache has, a layer's scales are missing, of another shape, or no positive numbers.
        """
        check_bits(self.bits)
        for part, scales in (("keys", self.keys), ("values", self.values)):
            if len(scales) != len(arch.layers):
                what = f"scales of {len(scales)} layers for a model of {len(arch.layers)}"
                raise InputError(what, where=f"kv.{part}", remedy="Calibrate this model")
            for index, (scale, layer) in enumerate(zip(scales, arch.layers, strict=True)):
                expected = (layer.kv_heads, layer.head_dim) if self.per_channel else (1,)
                where = f"kv.{part}, layer {index}"
                if scale.shape != expected or scale.dtype != np.float32:
                    what = f"scales are {scale.dtype} {list(scale.shape)}, not float32 {list(expected)}"
                    raise InputError(what, where=where, remedy="Calibrate this model")
                if not (np.isfinite(scale).all() and (scale > 0).all()):
                    raise InputError("a scale is not a positive number", where=where, remedy="Calibrate again")


def check_bits(bits: int) -> None:
    """Refuses bits that no integer cache has.

    Raises:
        InputError: Neither 8 nor 4.
    """
    if bits not in KV_BITS:
        raise InputError(f"a KV cache has 8 or 4 bits, not {bits}", where="kv.bits")


__all__ = ["KV_BITS", "KvQuantization", "check_bits"]
