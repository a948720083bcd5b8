"""Which targets have no graph for a kind of models in a scheme, and why; how a bundle comes by what it lacks.

Names and schemes alone: below ``accel.bundle`` and the engines, which must not advise what a target refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from accel.errors import InputError
from accel.scheme import BASES, QUANTIZED, Scheme, parse_scheme
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


def refusal_by_name(target: str, kind: Kind, variant: str) -> str | None:
    """``refusal`` of a variant; one whose name is no scheme is refused nowhere."""
    try:
        return refusal(target, kind, parse_scheme(variant))
    except InputError:
        return None


def takers(kind: Kind, scheme: Scheme) -> tuple[str, ...]:
    """The targets that refuse nothing of a scheme; what is rounded goes to the first where none is named."""
    return tuple(target for target in _RULES if refusal(target, kind, scheme) is None)


def how_to_get(path: Path, kind: Kind, name: str, graphs: Mapping[str, Collection[str]]) -> str:
    """What helps a caller who asked a bundle for a variant that it has not, or not by this name.

    Args:
        path: The bundle.
        kind: Of its model.
        name: What was asked for: a scheme's name, or ``kv8``, short for ``fp32+kv8``.
        graphs: The bundle's variants -> the targets that they have graphs for.

    Raises:
        InputError: No such scheme.
    """
    scheme = parse_scheme(name)
    able, command, short = takers(kind, scheme), f"accel quantize {path} --variant", name != scheme.name
    if scheme.name in graphs:
        told = [f"{name} is short for '{scheme.name}', which it has for {', '.join(graphs[scheme.name])}"]
    elif scheme.kv_bits is None:
        return f"{command} {name} adds it"
    elif able:
        told = [f"{command} {name} adds {repr(scheme.name) if short else 'it'}, for {able[0]}"]
        told += [f"for {target} with --target {target}" for target in able[1:]]
    else:
        told = [f"No target runs this {kind} so" + ("" if kind == "decoder" else f": {NO_CACHE}")]
    if short or not able:  # no precision was named, or none that goes with such a cache
        for target, others in with_cache(kind, scheme):
            held = [repr(other) for other in others if target in graphs.get(other, ())]
            told.append(f"for {target}" + (f" it has {', '.join(held)}" if held else f": {command} {others[0]}"))
    return "; ".join(told)


def how_to_mend(
    path: Path, kind: Kind, variant: str, targets: Sequence[str], whole: bool, options: str = "", left_out: str = ""
) -> str:
    """The commands for a variant whose files are lost: what makes its graphs again, where that can be, or drops them.

    Args:
        path: The bundle.
        kind: Of its model.
        variant: Its name in the bundle.
        targets: Of the graphs.
        whole: Whether these are all that it has: else to drop it would cost others.
        options: That choose its integers as they were.
        left_out: What these do not choose so.
    """
    able = [target for target in targets if refusal_by_name(target, kind, variant) is None]
    again = "".join(f" --target {target}" for target in able)
    which = "" if whole else "".join(f" --target {target}" for target in targets)
    again += f" {options}" if options else ""
    made = f"makes it again{f' ({left_out})' if left_out else ''}"
    told = [f"accel quantize {path} --variant {variant}{again} {made}"] if able else []
    return ", ".join([*told, f"accel quantize {path} --drop {variant}{which} drops it"])


def with_cache(kind: Kind, scheme: Scheme) -> Iterator[tuple[str, list[str]]]:
    """Targets that refuse a scheme, and what they take beside a cache like its own; without those that take nothing."""
    for target in _RULES:
        taken = beside_cache(target, kind, scheme)
        if taken and scheme.name not in taken:
            yield target, taken


def beside_cache(target: str, kind: Kind, scheme: Scheme) -> list[str]:
    """The variants with a scheme's cache that a target takes."""
    cache = scheme.name.rpartition("+")[2]
    names = [f"{weights}+{cache}" for weights in (*BASES, *QUANTIZED)]
    return [name for name in names if refusal(target, kind, parse_scheme(name)) is None]


__all__ = [
    "NO_CACHE",
    "beside_cache",
    "how_to_get",
    "how_to_mend",
    "refusal",
    "refusal_by_name",
    "takers",
    "with_cache",
]
