"""Probing and opening for the engine registry."""

from __future__ import annotations

from accel.bundle import Bundle
from accel.engines.capturing import undisturbed
from accel.engines.gpu_memory import OutOfMemoryError, let_go
from accel.engines.kv_cache import no_room_for_cache, no_room_for_weights, resolve_gpu_cache
from accel.engines.ort_cuda.package import free_memory, import_onnxruntime_gpu
from accel.engines.ort_cuda.provider import ITEM_BYTES, NAME, Provider
from accel.engines.session import DecoderSession, EncoderSession, SessionOptions
from accel.errors import DependencyError, EngineError
from accel.machine import missing_gpu
from accel.refusals import refusal_by_name
from accel.scheme import gpu_type

PRECISIONS = ("fp16", "bf16", "fp32")  # what a GPU prefers
RESERVE = 512 << 20  # bytes beside weights and caches: activations, logits, the libraries' own
Session = EncoderSession | DecoderSession


def probe(bundle: Bundle, variant: str) -> str | None:
    """Why this engine cannot run the bundle here, or None."""
    lacking = missing_gpu()
    if lacking is not None:  # first: the package would not help, and installing it costs ONNX Runtime CPU
        return lacking
    try:
        import_onnxruntime_gpu()
    except DependencyError as error:
        return str(error)
    name = pick_precision(bundle, variant)
    return _no_graph(bundle, variant) if name is None else _outdated(bundle, name)


def _outdated(bundle: Bundle, name: str) -> str | None:
    """Why a decoder's graph that an older accel made does not run: the next engine may."""
    if bundle.manifest.arch.kind != "decoder":
        return None
    if {"token", "token_logit"} <= {output.name for output in bundle.graph(name, NAME).outputs}:
        return None
    command = f"accel quantize {bundle.path} --variant {name} --target {NAME}"
    return f"an older accel made its graph: {command} makes it anew"


def pick_precision(bundle: Bundle, variant: str) -> str | None:
    """The variant to run: the one asked for, else fp16, bf16, fp32, whichever has a graph that runs on the GPU.

    Integers lose more than that: they run, in fp16, when they are asked for. A decoder in fp32 is none: CUDA's
    attention over a cache takes fp16 and bf16, in fp32 it would run on the CPU.
    """
    names = PRECISIONS if variant == "auto" else (variant,)
    for name in names:
        known = bundle.manifest.variants.get(name)
        low = known is not None and gpu_type(name, known.dtype) != "float32"
        runs = known is not None and (low or bundle.manifest.arch.kind == "encoder")
        if known is not None and runs and NAME in known.graphs:
            return name
    return None


def _no_graph(bundle: Bundle, variant: str) -> str:
    asked = "fp16" if variant == "auto" else variant
    if asked == "fp32" and bundle.manifest.arch.kind == "decoder":
        return "ONNX Runtime's CUDA attention over a cache takes fp16 and bf16, not fp32"
    refused = refusal_by_name(NAME, bundle.manifest.arch.kind, asked)
    if refused is not None:
        return f"ONNX Runtime CUDA does not run {variant!r}: {refused}"
    command = f"accel quantize {bundle.path} --variant {asked} --target {NAME}"
    return f"the bundle has no graph for ONNX Runtime CUDA in variant {variant!r}: {command} adds one"


def open_engine(bundle: Bundle, variant: str, options: SessionOptions) -> Session:
    """A session on the GPU.

    Raises:
        CapacityError: The capacity or ``max_batch`` asked for does not fit; says what does.
        EngineUnavailableError: The GPU has no room for the weights, or the provider cannot be used.
        DependencyError: See ``import_onnxruntime_gpu``.
    """
    name = pick_precision(bundle, variant)
    assert name is not None, "probe comes first"
    return open_on(Provider(import_onnxruntime_gpu()), bundle, name, options, free_memory())


def open_on(provider: Provider, bundle: Bundle, variant: str, options: SessionOptions, memory: int | None) -> Session:
    """A session on a provider.

    Args:
        provider: Where.
        bundle: The bundle.
        variant: One that it has a graph for.
        options: Of the session.
        memory: Bytes that are free on the device; None: unknown, the machine's own memory is the measure.
    """
    from accel.engines.ort_cuda.decoder import OrtCudaDecoderSession
    from accel.engines.ort_cuda.encoder import OrtCudaEncoderSession

    graph, arch = bundle.file(bundle.graph(variant, NAME).file), bundle.manifest.arch
    weights = _weight_bytes(bundle, variant)
    room = _room(memory, weights)
    if room == 0:
        raise no_room_for_weights(weights, f"the GPU has {memory:,} bytes free")
    item = ITEM_BYTES[gpu_type(variant, bundle.variant(variant).dtype)]
    shape = resolve_gpu_cache(arch, options, item, room) if arch.kind == "decoder" else None

    def opened() -> Session:
        if shape is None:
            return OrtCudaEncoderSession(graph, arch, variant, provider)
        return OrtCudaDecoderSession(graph, bundle.manifest, variant, provider, shape)

    try:
        return undisturbed(opened)
    except EngineError as error:
        let_go(error)
        if not isinstance(error, OutOfMemoryError):
            raise
        room = _room(free_memory(), weights)  # found out only by trying
        if shape is None or room == 0:
            raise no_room_for_weights(weights, error.what) from error
        raise no_room_for_cache(error, arch, options, shape, item, room) from error


def _room(free: int | None, weights: int) -> int | None:
    """Bytes that a cache may take beside the weights, where so many are free; None: unknown."""
    return None if free is None else max(0, free - weights - RESERVE)


def _weight_bytes(bundle: Bundle, variant: str) -> int:
    return sum(bundle.manifest.files[name].size for name in bundle.weights(variant, NAME))


__all__ = ["PRECISIONS", "open_engine", "open_on", "pick_precision", "probe"]
