"""Scales of a KV cache that is rounded, as calibration finds them and engines' graphs hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel.errors import InputError
from accel.quantized_tensor import FLOAT8_MAX
from accel.spec import ArchSpec

KV_BITS = (8, 4)


@dataclass(frozen=True, eq=False)
class KvQuantization:
    """Symmetric integers: key[h, t, d] = q[h, t, d] * keys[layer][h, d], and values alike.

    q lies in [-128, 127] for 8 bits and in [-8, 7] for 4; what exceeds that is cut off. With ``float8`` it is an E4M3
    number in [-448, 448]. Keys are quantised as the cache holds them: after their rotation.

    Attributes:
        bits: 8 or 4.
        keys: Per layer float32 [kv_heads, head_dim], or [1] where the whole tensor shares one scale.
        values: The same of the values. Both of a layer, and all layers, are of one kind.
        float8: Whether 8-bit floats stand in place of integers.
    """

    bits: int
    keys: tuple[NDArray[np.float32], ...]
    values: tuple[NDArray[np.float32], ...]
    float8: bool = False

    @property
    def kind(self) -> str:
        """What a cache holds: ``int8``, ``int4`` or ``fp8``."""
        return "fp8" if self.float8 else f"int{self.bits}"

    @property
    def per_channel(self) -> bool:
        """Whether every channel of every head has its own scale."""
        return self.keys[0].ndim == 2

    @property
    def range(self) -> tuple[int, int]:
        """The least and the largest number."""
        if self.float8:
            return -int(FLOAT8_MAX), int(FLOAT8_MAX)
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def check(self, arch: ArchSpec) -> None:
        """Compares with a model's layers.

        Raises:
            InputError: Bits that no cache has, a layer's scales are missing, of another shape, or no positive numbers.
        """
        check_bits(self.bits, self.float8)
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


def check_bits(bits: int, float8: bool = False) -> None:
    """Refuses bits that no cache has.

    Raises:
        InputError: Neither 8 nor 4, or floats of 4.
    """
    if float8 and bits != 8:
        raise InputError(f"a KV cache of floats has 8 bits, not {bits}", where="kv.bits")
    if bits not in KV_BITS:
        raise InputError(f"a KV cache has 8 or 4 bits, not {bits}", where="kv.bits")


__all__ = ["KV_BITS", "KvQuantization", "check_bits"]
