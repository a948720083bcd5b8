"""Whether the engine can run a bundle here, and opening it."""

from __future__ import annotations

from accel.bundle import Bundle
from accel.engines.openvino.package import NAME, computes_bfloat16, import_openvino, open_core
from accel.engines.session import EncoderSession, SessionOptions
from accel.errors import DependencyError, EngineError, EngineUnavailableError
from accel.machine import available_cores

PRECISIONS = ("fp32", "bf16")  # unasked, the first: rounding is never a choice of ours


def pick_precision(bundle: Bundle, variant: str) -> str | None:
    """The variant to run: the one asked for, else fp32; None: it has no graph for OpenVINO, or none that it runs."""
    if variant != "auto" and variant not in PRECISIONS:
        return None
    chosen = PRECISIONS[0] if variant == "auto" else variant
    known = bundle.manifest.variants.get(chosen)
    return chosen if known is not None and NAME in known.graphs else None


def probe(bundle: Bundle, variant: str) -> str | None:
    """Why the engine cannot run a bundle here, or None."""
    if bundle.manifest.arch.kind != "encoder":
        return "OpenVINO runs encoders only here: it has no caches that are updated in place"
    asked = PRECISIONS[0] if variant == "auto" else variant
    if asked not in PRECISIONS:  # before anybody installs it for nothing
        return f"OpenVINO runs {' and '.join(PRECISIONS)} here, not {asked}"
    try:
        import_openvino()
    except DependencyError as error:
        return str(error)
    chosen = pick_precision(bundle, variant)
    if chosen is None:
        command = f"accel quantize {bundle.path} --variant {asked} --target {NAME}"
        return f"the bundle has no graph for OpenVINO in {asked}: {command} adds it"
    if chosen == "bf16" and not computes_bfloat16(open_core()):
        return "this CPU has no bfloat16 instructions: OpenVINO would compute in float32"
    return None


def open_engine(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession:
    """A session.

    Raises:
        DependencyError: See ``import_openvino``.
        EngineUnavailableError: OpenVINO refuses the graph.
    """
    from accel.engines.openvino.encoder import OpenVinoEncoderSession

    chosen = pick_precision(bundle, variant)
    assert chosen is not None, "probe comes first"
    path = bundle.file(bundle.graph(chosen, NAME).file)
    try:
        return OpenVinoEncoderSession(path, chosen, options.threads or available_cores())
    except EngineError as error:
        raise EngineUnavailableError(error.what, where=error.where, remedy=error.remedy) from error


__all__ = ["PRECISIONS", "open_engine", "pick_precision", "probe"]
