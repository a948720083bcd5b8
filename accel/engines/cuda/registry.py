"""Whether the engine can run a bundle here, and opening it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from accel.bundle import Bundle
from accel.engines.kv_cache import (
    cache_item_bytes,
    no_room_for_cache,
    no_room_for_weights,
    resolve_gpu_cache,
    rounded_cache,
)
from accel.engines.session import DecoderSession, EncoderSession, SessionOptions
from accel.errors import EngineError, EngineUnavailableError
from accel.machine import missing_gpu
from accel.measurements import folders
from accel.refusals import refusal_by_name
from accel.scheme import FLOAT8_SM, gpu_type

if TYPE_CHECKING:
    from accel.engines.cuda.device import Device

TARGET = "cuda"  # of the graph
PRECISIONS = ("fp16", "bf16", "fp32")
MINIMUM_SM = 80  # the first with bf16 and asynchronous copies
_SHARE_LEFT = 0.9  # of the free memory: steps need some of their own
Session = EncoderSession | DecoderSession


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
    unfit = unfit_gpu()
    if unfit is None and variant != "auto" and rounded_cache(bundle, variant) == "fp8" and _sm() < FLOAT8_SM:
        return f"the GPU is sm{_sm()}; caches of 8-bit floats need sm{FLOAT8_SM} or later"
    return unfit


def _sm() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def unfit_gpu() -> str | None:
    """Why PyTorch cannot run the kernels on the GPU that it finds, or finds none; None: it can."""
    import torch

    if not torch.cuda.is_available():
        return missing_gpu() or _not_found()
    try:
        sm = _sm()
    except Exception as error:  # it starts CUDA, which a GPU that is full, busy or lost refuses
        from accel.engines.cuda.device import first_line

        return f"the GPU cannot be used now: {first_line(error)}"
    return f"the GPU is sm{sm}; the kernels need sm{MINIMUM_SM} or later" if sm < MINIMUM_SM else None


def _not_found() -> str:
    """Why PyTorch finds no GPU where there is one."""
    import torch

    from accel.engines.cuda.device import first_line

    if torch.version.cuda is None and torch.version.hip is None:
        return f"the PyTorch installed here ({torch.__version__}) was built without CUDA: install one with CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        said = first_line(error).partition(". Please")[0]
        if "driver" in said.lower():
            why = f"PyTorch {torch.__version__} cannot use this machine's NVIDIA driver: {said}"
            return f"{why}. Install a newer driver, or a PyTorch for this one; nvidia-smi shows its version"
        return f"PyTorch finds no CUDA GPU here: {said}"
    return "PyTorch finds no CUDA GPU here"


def open_cuda(bundle: Bundle, variant: str, options: SessionOptions) -> Session:
    """Opens the engine.

    Raises:
        CapacityError: The capacity or max_batch asked for does not fit; says what does.
        EngineUnavailableError: The GPU has no room for the weights, or for any cache, or cannot be used now.
        BundleError: The bundle's files are damaged.
    """
    from accel.engines.capturing import undisturbed
    from accel.engines.cuda.device import open_device, translated_errors

    chosen = pick_precision(bundle, variant)
    assert chosen is not None, "probe comes first"
    try:
        with translated_errors("loading"):  # whatever first asks the GPU may find it full, busy or lost
            return undisturbed(lambda: _open_on(open_device(), bundle, chosen, options))
    except EngineError as error:
        raise EngineUnavailableError(error.what, where=error.where, remedy=error.remedy) from error


def _open_on(device: Device, bundle: Bundle, variant: str, options: SessionOptions) -> Session:
    """A session on a device.

    Args:
        device: Where.
        bundle: The bundle.
        variant: One that it has a graph for.
        options: Of the session.
    """
    import torch

    from accel.engines.cuda.decoder import CudaDecoderSession
    from accel.engines.cuda.encoder import CudaEncoderSession
    from accel.engines.cuda.program import weight_bytes
    from accel.engines.gpu_memory import OutOfMemoryError

    entry, arch = bundle.graph(variant, TARGET), bundle.manifest.arch
    path = bundle.file(entry.file)
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    dtype = types[gpu_type(variant, bundle.variant(variant).dtype)]
    kept = folders(options.store)[0].with_name("kernels")
    weights, free = weight_bytes(path), device.free_memory()
    if free is not None and _room(free, weights) == 0:
        raise no_room_for_weights(weights, f"the GPU has {free:,} bytes free")
    item = cache_item_bytes(arch, entry) if arch.kind == "decoder" else 0
    shape = resolve_gpu_cache(arch, options, item, _room(free, weights)) if arch.kind == "decoder" else None
    try:
        if shape is None:
            return CudaEncoderSession(path, arch, variant, device, dtype, kept)
        return CudaDecoderSession(path, arch, variant, shape, device, dtype, kept)
    except EngineError as error:
        device.release_failed(error)
        if not isinstance(error, OutOfMemoryError):
            raise
        room = _room(device.free_memory(), weights)
        if shape is None or room == 0:
            raise no_room_for_weights(weights, error.what) from error
        raise no_room_for_cache(error, arch, options, shape, item, room) from error


def _room(free: int | None, weights: int) -> int | None:
    """Bytes that a cache may take beside the weights, where so many are free; None: unknown."""
    return None if free is None else int(max(0, free - weights) * _SHARE_LEFT)


__all__ = ["TARGET", "open_cuda", "pick_precision", "probe", "unfit_gpu"]
