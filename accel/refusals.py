"""Which targets have no graph for a kind of models in a scheme, and why.

Names and schemes alone: below ``accel.bundle`` and the engines, which must not advise what a target refuses.
"""

from __future__ import annotations

from collections.abc import Callable

from accel.scheme import Scheme
from accel.spec import Kind

NO_CACHE = "an encoder has no cache"


def _refuse_cpu(kind: Kind, scheme: Scheme) -> str | None:
    if scheme.base in ("fp16", "bf16", "fp8"):
        return f"ONNX Runtime computes {scheme.base} in several times fp32's time on a CPU"
    if scheme.lossless:
        return "every bundle has that graph already"
    if scheme.kv_float8:
        return "its caches are fp32, int8 or int4"
    return None


def _refuse_tensorrt(kind: Kind, scheme: Scheme) -> str | None:
    if scheme.kv_bits is not None:
        return f"its cache layer takes no {'8-bit floats' if scheme.kv_float8 else 'integers'}"
    if scheme.activations == "dynamic":
        return "its parser has no operator that finds a scale per token; w8a8 has calibrated scales"
    return None


def _refuse_cuda(kind: Kind, scheme: Scheme) -> str | None:
    if scheme.kv_bits not in (None, 8):
        return f"its caches are floats, of 8 bits too, or int8, not int{scheme.kv_bits}"
    if scheme.kv_bits is not None and scheme.base == "fp32" and not scheme.quantized:
        cache = "kvfp8" if scheme.kv_float8 else "kv8"
        return f"beside such a cache it computes in fp16 or bf16: fp16+{cache}, bf16+{cache}"
    return _refuse_ungrouped(scheme)


def _refuse_ort_cuda(kind: Kind, scheme: Scheme) -> str | None:
    if scheme.kv_bits is not None:
        return "its caches are floats" + (" of 16 bits" if scheme.kv_float8 else "")
    return _refuse_ungrouped(scheme)


def _refuse_openvino(kind: Kind, scheme: Scheme) -> str | None:
    if kind != "encoder":
        return "it has no caches that are updated in place"
    if scheme.base not in ("fp32", "bf16") or scheme.quantized:
        return "it runs fp32 and bf16 here"
    return None


def _refuse_ungrouped(scheme: Scheme) -> str | None:
    if scheme.activations != "none":
        return "its kernels take floats times integer weights in groups (w8g32, w4g128, ...), no integers on both sides"
    if scheme.base == "fp8":
        return "it has no products of 8-bit floats"
    return None


_RULES: dict[str, Callable[[Kind, Scheme], str | None]] = {
    "ort-cpu": _refuse_cpu,
    "tensorrt": _refuse_tensorrt,
    "cuda": _refuse_cuda,
    "ort-cuda": _refuse_ort_cuda,
    "openvino": _refuse_openvino,
}


def refusal(target: str, kind: Kind, scheme: Scheme) -> str | None:
    """Why a target has no graph for models of a kind in a scheme, or None."""
    if scheme.kv_bits is not None and kind != "decoder":  # whatever else there is to say, this is the reason
        return NO_CACHE
    return _RULES[target](kind, scheme)


__all__ = ["NO_CACHE", "refusal"]
