"""Probing and opening for the engine registry, one pair per flavour."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from accel.bundle import Bundle
from accel.engines.session import DecoderSession, EncoderSession, SessionOptions
from accel.engines.tensorrt.adapter import Target, load_flavour
from accel.engines.tensorrt.kernel_cache import kernels_path
from accel.engines.tensorrt.lookup import find_engine, open_store, pick_precision
from accel.engines.tensorrt.packages import TITLES, current_gpu, current_sm
from accel.errors import AccelError, DependencyError, EngineError, EngineUnavailableError
from accel.machine import missing_gpu
from accel.store import StoredEngine

_log = logging.getLogger("accel")
Session = EncoderSession | DecoderSession


def probe_for(target: Target) -> Callable[[Bundle, str], str | None]:
    """The registry's probe: why this flavour cannot run a bundle here, or None."""

    def probe(bundle: Bundle, variant: str) -> str | None:
        try:
            load_flavour(target)
        except DependencyError as error:
            return missing_gpu() or str(error)  # without a GPU no package would help
        if find_spec("cuda") is None:
            install = 'pip install "cuda-python>=12.8"'
            lacking = f"{TITLES[target]} runs through cuda-python, which is not installed: {install}"
            return missing_gpu() or lacking
        if current_sm() is None:
            lacking = f"{TITLES[target]} needs an NVIDIA GPU and its driver; CUDA finds none here"
            return missing_gpu() or lacking
        if pick_precision(bundle, variant) is None:
            command = f"accel build {bundle.path} --target {target}"
            return (
                f"the bundle has no TensorRT graph for variant {variant!r}: {command} makes one and builds the engine"
            )
        return None

    return probe


def open_for(target: Target) -> Callable[[Bundle, str, SessionOptions], Session]:
    """The registry's open: a session on the stored engine that fits; nothing is ever built here."""

    def open_session(bundle: Bundle, variant: str, options: SessionOptions) -> Session:
        from accel.engines.tensorrt.open import open_tensorrt

        flavour, sm = load_flavour(target), current_sm()
        chosen = pick_precision(bundle, variant)
        assert sm is not None and chosen is not None, "probe comes first"
        try:  # whatever is wrong with the store or the engine is a reason to try the next one
            store, gpu = open_store(options.store), current_gpu()
            engine, facts = find_engine(store, bundle, chosen, flavour, sm, options, gpu)
            kernels = kernels_path(engine.manifest.key, sm)
            try:
                session: Any = open_tensorrt(bundle, chosen, options, engine.plan(), facts, flavour, kernels=kernels)
                _prepare(session)
            except BaseException:
                engine.close()
                raise
        except EngineError:
            raise
        except AccelError as error:
            raise EngineUnavailableError(error.what, where=error.where, remedy=error.remedy) from error
        return _hold(session, engine)

    return open_session


def _prepare(session: Any) -> None:
    """Captures a decoder's graphs now: in a request somebody would wait for it."""
    if not hasattr(session, "capture_graphs"):
        return
    try:
        session.capture_graphs()
    except BaseException:
        session.close()
        raise


def _hold(session: Any, engine: StoredEngine) -> Session:
    """Keeps the stored engine marked as in use as long as the session is open."""
    close = session.close

    def close_both() -> None:
        close()
        engine.close()

    session.close = close_both
    return session  # type: ignore[no-any-return]


__all__ = ["open_for", "probe_for"]
