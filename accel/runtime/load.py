"""From a bundle's path to a running encoder or decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import SessionOptions
from accel.errors import InputError

if TYPE_CHECKING:
    from accel.runtime.decoder import Decoder
    from accel.runtime.encoder import Encoder


def load(
    path: str | Path,
    device: str = "auto",
    engine: str = "auto",
    variant: str = "auto",
    capacity: int | None = None,
    max_batch: int | None = None,
    threads: int | None = None,
    strict: bool = False,
    store: str | None = None,
) -> Encoder | Decoder:
    """Opens a bundle and starts an engine on it; the arguments are those of ``accel.load``.

    Returns:
        An Encoder or a Decoder. ``.engine`` says what runs, ``.fallbacks`` what was passed over and why.
        When the engine breaks in the midst of a call, the call goes on, on the next engine that can run the bundle.

    Raises:
        BundleError: No bundle there, a damaged one, or no such variant.
        EngineUnavailableError: No engine (or not the one asked for) can run it here.
        CapacityError: The cache asked for exceeds the model or the memory.
        InputError: An unknown engine or device, an option out of range, or a cache option for an encoder.
    """
    bundle = Bundle.open(path)
    if bundle.manifest.arch.kind == "encoder":
        for name, value in (("capacity", capacity), ("max_batch", max_batch)):
            if value is not None:
                remedy = "Leave it out; batch_size belongs to the calls"
                raise InputError(
                    f"{name} sizes a decoder's cache, and this model is an encoder", where=name, remedy=remedy
                )
    options = SessionOptions(threads=threads, capacity=capacity, max_batch=max_batch, store=store)
    return open_model(bundle, device, engine, variant, options, strict)


def open_model(
    bundle: Bundle,
    device: str = "auto",
    engine: str = "auto",
    variant: str = "auto",
    options: SessionOptions | None = None,
    strict: bool = False,
) -> Encoder | Decoder:
    """Starts an engine on an opened bundle; the arguments are those of ``accel.engines.open_session``.

    Raises:
        EngineUnavailableError, CapacityError, InputError, BundleError: as ``load``.
    """
    opened = open_session(bundle, device, engine, variant, options, strict)
    try:
        if bundle.manifest.arch.kind == "encoder":
            from accel.runtime.encoder import Encoder

            return Encoder(bundle, opened)
        from accel.runtime.decoder import Decoder

        return Decoder(bundle, opened)
    except BaseException:
        opened.session.close()
        raise


__all__ = ["load", "open_model"]
