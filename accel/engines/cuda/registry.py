"""Whether the engine can run a bundle here, and opening it."""

from __future__ import annotations

from importlib.util import find_spec

from accel.bundle import Bundle
from accel.engines.kv_cache import cache_item_bytes, resolve_cache, rounded_cache
from accel.engines.session import DecoderSession, EncoderSession, SessionOptions
from accel.errors import CapacityError, EngineError, EngineUnavailableError
from accel.machine import missing_gpu
from accel.measurements import folders
from accel.refusals import refusal_by_name
from accel.scheme import FLOAT8_SM, gpu_type

TARGET = "cuda"  # of the graph
PRECISIONS = ("fp16", "bf16", "fp32")
MINIMUM_SM = 80  # the first with bf16 and asynchronous copies
_SHARE_LEFT = 0.9  # of the free memory: steps need some of their own


def pick_precision(bundle: Bundle, variant: str) -> str | None:
    """The variant to run: the one asked for, else fp16, bf16, fp32, whichever has a graph for this engine.

    Integers lose more than that: they run when they are asked for.
    """
    if variant != "auto":
        return variant if TARGET in bundle.variant(variant).graphs else None
    variants = bundle.manifest.variants
    return next((name for name in PRECISIONS if name in variants and TARGET in variants[name].graphs), None)


def probe(bundle: Bundle, variant: str) -> str | None:
    """Why the engine cannot run a bundle here, or None."""
    if pick_precision(bundle, variant) is None:
        asked = "fp16" if variant == "auto" else variant.replace("fp32+", "fp16+")  # beside 8-bit caches
        refused = refusal_by_name(TARGET, bundle.manifest.arch.kind, asked)
        if refused is not None:
            return f"the cuda engine does not run {variant!r}: {refused}"
        command = f"accel quantize {bundle.path} --variant {asked} --target cuda"
        lacking = f"the bundle has no graph of the cuda engine for variant {variant!r}: {command} adds one"
        return missing_gpu() or lacking  # without a GPU neither a graph nor a package would help
    missing = [name for name in ("torch", "triton", "onnx_ir") if find_spec(name) is None]
    if missing:  # named one by one: the extra would bring onnxruntime-gpu beside onnxruntime
        lacking = f"{' and '.join(missing)} missing: pip install {' '.join(missing).replace('_', '-')}"
        return missing_gpu() or lacking
    import torch

    if not torch.cuda.is_available():
        return missing_gpu() or "PyTorch finds no CUDA GPU here, or was installed without CUDA"
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < MINIMUM_SM:
        return f"the GPU is sm{major}{minor}; the kernels need sm{MINIMUM_SM} or later"
    if variant != "auto" and rounded_cache(bundle, variant) == "fp8" and 10 * major + minor < FLOAT8_SM:
        return f"the GPU is sm{major}{minor}; caches of 8-bit floats need sm{FLOAT8_SM} or later"
    return None


def open_cuda(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    """Opens the engine.

    Raises:
        CapacityError: Weights and cache do not fit; says what does.
        EngineUnavailableError: Its files are damaged.
    """
    import torch

    from accel.engines.cuda.device import open_device

    chosen = pick_precision(bundle, variant)
    assert chosen is not None, "probe comes first"
    entry, arch = bundle.graph(chosen, TARGET), bundle.manifest.arch
    device, path = open_device(), bundle.file(entry.file)
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    dtype = types[gpu_type(chosen, bundle.variant(chosen).dtype)]
    kept = folders(options.store)[0].with_name("kernels")
    try:
        if arch.kind == "encoder":
            from accel.engines.cuda.encoder import CudaEncoderSession

            return CudaEncoderSession(path, arch, chosen, device, dtype, kept)
        from accel.engines.cuda.decoder import CudaDecoderSession
        from accel.engines.cuda.program import weight_bytes

        weights, memory = weight_bytes(path), device.free_memory()
        left = None if memory is None else int(max(0, memory - weights) * _SHARE_LEFT)
        if left == 0:
            what = f"the weights take {weights:,} bytes, and the GPU has {memory:,} free"
            raise CapacityError(what, where="cuda", remedy="Free memory, or load with another engine")
        shape = resolve_cache(arch, options, cache_item_bytes(arch, entry), left)
        return CudaDecoderSession(path, arch, chosen, shape, device, dtype, kept)
    except EngineError as error:
        raise EngineUnavailableError(error.what, where=error.where, remedy=error.remedy) from error


__all__ = ["TARGET", "open_cuda", "pick_precision", "probe"]
