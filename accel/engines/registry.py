"""The engines, in the order in which they are tried. Each is imported only when it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from accel.engines.kv_cache import cache_item_bytes, resolve_cache
from accel.engines.session import DecoderSession, EncoderSession, SessionOptions
from accel.errors import DependencyError
from accel.machine import available_cores

if TYPE_CHECKING:
    from accel.bundle import Bundle


@dataclass(frozen=True)
class Engine:
    """One entry of the registry.

    Attributes:
        name: What ``engine=`` takes and ``EngineInfo.name`` says.
        device: The device it runs on.
        probe: (bundle, variant name or "auto") -> why it cannot run this bundle here, or None.
        open: (bundle, variant name or "auto", checked options) -> session; what is None is the engine's choice.
        installed: Whether its package is there at all.
        rounded_caches: What its KV caches may hold beside floats of 16 and 32 bits, see ``kv_cache.rounded_cache``.
        target: Of the graphs that it runs; empty: it takes no part in measured choices.
        pick: (bundle, variant name or "auto") -> the variant that ``open`` would run; None: there is none.
    """

    name: str
    device: str
    probe: Callable[[Bundle, str], str | None]
    open: Callable[[Bundle, str, SessionOptions], EncoderSession | DecoderSession]
    installed: Callable[[], bool] = lambda: True
    rounded_caches: tuple[str, ...] = ()
    target: str = ""
    pick: Callable[[Bundle, str], str | None] = lambda *_: None


def pick_variant(bundle: Bundle, variant: str, target: str) -> str | None:
    """The variant to run on a target: the one asked for, or fp32 first, then the manifest's order.

    Returns:
        None when there is none with a graph for this target.

    Raises:
        BundleError: The variant asked for does not exist.
    """
    if variant != "auto":
        return variant if target in bundle.variant(variant).graphs else None
    variants = bundle.manifest.variants
    usable = [name for name in variants if target in variants[name].graphs]
    return "fp32" if "fp32" in usable else next(iter(usable), None)


def _probe_ort(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.ort.common import import_onnxruntime, missing_operators

    try:
        import_onnxruntime()
    except DependencyError as error:
        return str(error)
    name = pick_variant(bundle, variant, "ort-cpu")
    if name is None:
        known = bundle.manifest.variants.get(variant)
        others = f"; its graphs are for {', '.join(known.graphs)}" if known is not None and known.graphs else ""
        return f"the bundle has no ort-cpu graph for variant {variant!r}{others}"
    return missing_operators(name)


def _open_ort(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.ort.decoder import OrtDecoderSession
    from accel.engines.ort.encoder import OrtEncoderSession

    name = pick_variant(bundle, variant, "ort-cpu")
    assert name is not None, "probe comes first"
    path = bundle.file(bundle.graph(name, "ort-cpu").file)
    threads = options.threads or available_cores()
    if bundle.manifest.arch.kind == "encoder":
        return OrtEncoderSession(path, name, threads)
    shape = resolve_cache(bundle.manifest.arch, options, cache_item_bytes_of(bundle, name))
    return OrtDecoderSession(path, bundle.manifest, name, threads, shape)


def cache_item_bytes_of(bundle: Bundle, variant: str) -> float:
    """Of one number in the caches of ONNX Runtime's graph for the CPU; without such a graph: float32's."""
    name = pick_variant(bundle, variant, "ort-cpu")
    return 4 if name is None else cache_item_bytes(bundle.manifest.arch, bundle.graph(name, "ort-cpu"))


def _pick_ort(bundle: Bundle, variant: str) -> str | None:
    return pick_variant(bundle, variant, "ort-cpu")


def _probe_openvino(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.openvino.registry import probe

    return probe(bundle, variant)


def _open_openvino(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.openvino.registry import open_engine

    return open_engine(bundle, variant, options)


def _pick_openvino(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.openvino.registry import pick_precision

    return pick_precision(bundle, variant)


def _has_openvino() -> bool:
    from accel.engines.openvino.package import is_installed

    return is_installed()


def _probe_torch(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.torch_reference import probe

    return probe(bundle, variant)


def _open_torch(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.torch_reference import open_reference

    return open_reference(bundle, variant, options)


def _tensorrt(target: Literal["tensorrt", "rtx"]) -> Engine:
    def probe(bundle: Bundle, variant: str) -> str | None:
        from accel.engines.tensorrt.registry import probe_for

        return probe_for(target)(bundle, variant)

    def open_engine(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
        from accel.engines.tensorrt.registry import open_for

        return open_for(target)(bundle, variant, options)

    def installed() -> bool:
        from accel.engines.tensorrt.packages import is_installed

        return is_installed(target)

    def pick(bundle: Bundle, variant: str) -> str | None:
        from accel.engines.tensorrt.lookup import pick_precision

        return pick_precision(bundle, variant)

    return Engine(target, "cuda", probe, open_engine, installed, target="tensorrt", pick=pick)


def _probe_cuda(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.cuda.registry import probe

    return probe(bundle, variant)


def _open_cuda(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.cuda.registry import open_cuda

    return open_cuda(bundle, variant, options)


def _pick_cuda(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.cuda.registry import pick_precision

    return pick_precision(bundle, variant)


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _probe_ort_cuda(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.ort_cuda.registry import probe

    return probe(bundle, variant)


def _open_ort_cuda(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    from accel.engines.ort_cuda.registry import open_engine

    return open_engine(bundle, variant, options)


def _pick_ort_cuda(bundle: Bundle, variant: str) -> str | None:
    from accel.engines.ort_cuda.registry import pick_precision

    return pick_precision(bundle, variant)


def _has_ort_cuda() -> bool:
    from accel.engines.ort_cuda.package import is_installed

    return is_installed()


ENGINES: tuple[Engine, ...] = (
    _tensorrt("tensorrt"),
    _tensorrt("rtx"),
    Engine("cuda", "cuda", _probe_cuda, _open_cuda, _has_triton, ("int8", "fp8"), "cuda", _pick_cuda),
    Engine("ort-cuda", "cuda", _probe_ort_cuda, _open_ort_cuda, _has_ort_cuda, target="ort-cuda", pick=_pick_ort_cuda),
    Engine("ort-cpu", "cpu", _probe_ort, _open_ort, rounded_caches=("int8", "int4"), target="ort-cpu", pick=_pick_ort),
    Engine(
        "openvino", "cpu", _probe_openvino, _open_openvino, _has_openvino, target="openvino", pick=_pick_openvino
    ),
    Engine("torch", "cpu", _probe_torch, _open_torch),
)


__all__ = ["ENGINES", "Engine", "cache_item_bytes_of", "pick_variant"]
