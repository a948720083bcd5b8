"""A variant's name as data: ``w4g32+kv8`` says how its weights, activations and caches are stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from accel.errors import InputError
from accel.schema import nearest, suggest

Base = Literal["fp32", "fp16", "bf16", "fp8"]
Activations = Literal["none", "dynamic", "static"]

BASES: tuple[Base, ...] = ("fp32", "fp16", "bf16", "fp8")
GROUPS = (32, 64, 128)
QUANTIZED = ("w8a8-dyn", "w8a8", *(f"w{bits}g{group}" for bits in (8, 4) for group in GROUPS))
FLOAT8_SM = 89  # the first GPUs that convert and multiply 8-bit floats
CACHES = {"kv8": 8, "kv4": 4, "kvfp8": 8}  # bits
FLOAT8_CACHE = "kvfp8"
_GROUPED = re.compile(r"w([48])g(\d+)")


@dataclass(frozen=True)
class Scheme:
    """What a variant's name says.

    Attributes:
        name: The name itself, in canonical order.
        base: The type of what is not quantised; ``fp8`` products take 8-bit floats on both sides.
        weight_bits: 8 or 4; None: weights are in ``base``.
        group: Input channels that share a scale; 0: one scale per output row.
        activations: Whether products round their input to int8: ``dynamic`` with scales found at run time, per token;
            ``static`` with calibrated ones; ``none``: that is left to the kernel.
        kv_bits: 8 or 4 for caches that are rounded; None: caches are in ``base``.
        kv_float8: Whether caches hold 8-bit floats (E4M3) in place of integers.
    """

    name: str
    base: Base = "fp32"
    weight_bits: int | None = None
    group: int = 0
    activations: Activations = "none"
    kv_bits: int | None = None
    kv_float8: bool = False

    @property
    def quantized(self) -> bool:
        """Whether weights are integers."""
        return self.weight_bits is not None

    @property
    def gpu_base(self) -> Literal["fp32", "fp16", "bf16"]:
        """What a GPU computes in where nothing is rounded: fp16, unless the variant is a precision of its own."""
        if self.base == "fp8" or (self.base == "fp32" and not self.lossless):
            return "fp16"
        return self.base

    @property
    def lossless(self) -> bool:
        """Whether it is the model itself, in fp32."""
        return self.base == "fp32" and not self.quantized and self.kv_bits is None

    @property
    def usual_algorithm(self) -> str:
        """What chooses the integers of its weights where nothing else is asked for and there is text to look at."""
        if self.weight_bits == 4:
            return "gptq"
        return "rtn" if self.activations == "none" else "smoothquant+gptq"


def parse_scheme(name: str) -> Scheme:
    """Reads a variant's name.

    Raises:
        InputError: No such scheme; says the nearest.
    """
    weights, *rest = name.split("+")
    caches = [part for part in rest if part in CACHES]
    if len(rest) > 1 or len(caches) != len(rest):
        raise _unknown(name)
    if weights in CACHES and not rest:  # the cache alone
        return parse_scheme(f"fp32+{weights}")
    kv_bits, kv_float8 = (CACHES[caches[0]], caches[0] == FLOAT8_CACHE) if caches else (None, False)
    for base in BASES:
        if weights == base:
            return Scheme(name, base, kv_bits=kv_bits, kv_float8=kv_float8)
    if weights in ("w8a8", "w8a8-dyn"):
        activations: Activations = "dynamic" if weights.endswith("dyn") else "static"
        return Scheme(name, weight_bits=8, activations=activations, kv_bits=kv_bits, kv_float8=kv_float8)
    found = _GROUPED.fullmatch(weights)
    if found is None or weights not in QUANTIZED:  # w4g032 is another name for nothing
        raise _unknown(name)
    bits, group = int(found[1]), int(found[2])
    return Scheme(name, weight_bits=bits, group=group, kv_bits=kv_bits, kv_float8=kv_float8)


def full_name(name: object) -> object:
    """The name by which bundles have a variant: ``fp32+kv8`` of ``kv8``; what is no scheme's name as it is."""
    try:
        return parse_scheme(name).name if isinstance(name, str) else name
    except InputError:
        return name


def stores_integers(name: str) -> bool:
    """Whether a variant of this name has integer weights; not for names that are no schemes."""
    try:
        return parse_scheme(name).quantized
    except InputError:
        return False


def gpu_type(name: str, dtype: str) -> str:
    """The type that a variant computes in on ONNX Runtime's CUDA provider and our kernels; caches that are floats too.

    Args:
        name: The variant's.
        dtype: That of its manifest entry, which is the CPU's where weights are integers.
    """
    try:
        scheme = parse_scheme(name)
    except InputError:
        return dtype
    return "float16" if scheme.quantized else dtype


def suggest_variant(name: str, known: Sequence[str]) -> str:
    """``suggest`` for a variant's name: of one with a cache, whatever the order, each part's nearest name counts.

    Args:
        name: What no scheme is called.
        known: What else could be meant where no cache is named.
    """
    parts = list(dict.fromkeys(filter(None, name.split("+"))))
    near = [nearest(part.lower(), [*BASES, *QUANTIZED, *CACHES]) for part in parts]
    caches = list(dict.fromkeys(part for part in near if part in CACHES))
    weights = list(dict.fromkeys(part for part in near if part is not None and part not in CACHES))
    if not caches and len(parts) == 2 and (meant := nearest(parts[1], list(CACHES))):  # fp16+fp8
        caches, weights = [meant], weights[:1]
    whole = ["+".join([*weights, cache]) for cache in caches]
    if len(parts) < 2 or None in near or len(weights) > 1 or not whole:
        return suggest(name, list(known))
    return f"Did you mean '{whole[0]}'?" if len(whole) == 1 else f"A variant has one cache: {' or '.join(whole)}"


def _unknown(name: str) -> InputError:
    remedy = f"{suggest_variant(name, [*BASES, *QUANTIZED, *CACHES])}; + joins one with a cache: w4g32+kv8"
    return InputError(f"unknown variant {name!r}", where="variant", remedy=remedy)


__all__ = [
    *("BASES", "CACHES", "FLOAT8_SM", "GROUPS", "QUANTIZED"),
    *("Activations", "Base", "Scheme", "full_name", "gpu_type", "parse_scheme", "stores_integers"),
    "suggest_variant",
]
