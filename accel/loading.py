"""``accel.load``: the runtime's own, and, where it is allowed, a build of the engine that is missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accel.bundle import Bundle
from accel.engines import FASTEST
from accel.errors import InputError
from accel.runtime import load as runtime

if TYPE_CHECKING:
    from accel.runtime.decoder import Decoder
    from accel.runtime.encoder import Encoder

TENSORRT = ("tensorrt", "rtx")


def load(
    path: str | Path,
    device: str = "auto",
    engine: str = "auto",
    variant: str = "auto",
    capacity: int | None = None,
    max_batch: int | None = None,
    threads: int | None = None,
    strict: bool = False,
    *,
    store: str | Path | None = None,
    build: Literal["never", "allow"] = "never",
) -> Encoder | Decoder:
    """Opens a bundle and starts an engine on it.

    Args:
        path: The bundle's directory.
        device: ``auto``, ``cpu`` or ``cuda``.
        engine: ``auto``: the fastest that ``accel bench`` or a warm-up measured for this bundle here, else the first of
            the documented order that runs; or the one engine to use (``tensorrt``, ``rtx``, ``cuda``, ``ort-cuda``,
            ``ort-cpu``, ``openvino``, ``torch``): no other takes its place.
        variant: ``auto``: fp32 on the CPU, on a GPU the engine's own choice, whatever was measured; ``fastest``: the
            fastest variant that ``accel bench`` measured here, which may round more; or the precision to use.
        capacity: Cache positions per sequence, decoders only. None: on the CPU up to 4,096, as the model and memory
            allow; for TensorRT what the engine was built with.
        max_batch: Sequences that run at a time, decoders only. None: 8, or what the engine was built with.
        threads: Worker threads. None: all cores that this process may use.
        strict: Raise instead of falling back to a later engine, now and when the engine breaks later on. Where there is
            no GPU, its engines are left out, which is no falling back.
        store: Where built engines, and what was measured, are kept: a directory or URL. None: ``ACCEL_STORE``, else
            this user's cache.
        build: ``never``: a TensorRT engine must be in the store. ``allow``: with ``engine="tensorrt"`` or ``"rtx"`` one
            that is missing is built first, which takes from seconds to hours: not for serving code.

    Returns:
        An Encoder or a Decoder. ``.engine`` says what runs (``.engine.why``: what was measured, where that decided),
        ``.fallbacks`` what was passed over and why.
        When the engine breaks in the midst of a call, the call goes on, on the next engine that can run the bundle.

    Raises:
        BundleError: No bundle there, a damaged one, or no such variant.
        EngineUnavailableError: No engine (or not the one asked for) can run it here; names the command that builds a
            missing one.
        CapacityError: The cache asked for exceeds the model, the memory or the engine.
        InputError: An unknown engine or device, an option out of range, or a cache option for an encoder.
        EngineBuildError: With ``build="allow"``: the engine could not be built.
    """
    if build not in ("never", "allow"):
        raise InputError(f"build must be 'never' or 'allow', not {build!r}", where="build")
    if build == "allow":
        if engine not in TENSORRT:
            what = f"build='allow' builds for a named TensorRT engine, not for engine={engine!r}"
            raise InputError(what, where="build", remedy="Pass engine='tensorrt' or engine='rtx'")
        if variant == FASTEST:
            what = "what build='allow' builds was not measured yet, so variant='fastest' names nothing"
            raise InputError(what, where="variant", remedy="Name the precision, or leave it out")
        from accel.engine_build import build_missing

        build_missing(Bundle.open(path), engine, variant, capacity, max_batch, store)
    place = None if store is None else str(store)
    return runtime.load(path, device, engine, variant, capacity, max_batch, threads, strict, place)


__all__ = ["load"]
