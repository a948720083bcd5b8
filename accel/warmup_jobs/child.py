"""The child's side: does one thing that a line of JSON on standard input asks for, and writes the result to a file."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from accel.builder.files import write_atomically
from accel.errors import (
    AccelError,
    BundleError,
    DependencyError,
    EngineBuildError,
    EngineProofError,
    EngineStoreError,
    ExportError,
    InputError,
    RecipeError,
)
from accel.schema import from_dict
from accel.storage import will_stay_unwritable
from accel.warmup_jobs.jobs import Wanted

# Asking again changes nothing. ExportError: the graph cannot be lowered, or its rounding costs too much.
_PERMANENT = (InputError, RecipeError, BundleError, DependencyError, EngineProofError, ExportError)


def main() -> int:
    """Answers one request; what it raises is part of the answer."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background hands down SIG_IGN
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, name="accel-parent", daemon=True).start()
    try:
        answer: dict[str, Any] = {"result": _answer(request)}
    except KeyboardInterrupt:
        answer = {"error": "It was interrupted"}
    except Exception as error:
        traceback.print_exc()  # into the log
        said = str(error) if isinstance(error, AccelError) else f"{type(error).__name__}: {error}"
        answer = {"error": said, "permanent": is_permanent(error)}
    write_atomically(Path(request["result"]), json.dumps(answer).encode())
    return 0


def is_permanent(error: Exception) -> bool:
    """Whether the next attempt would fail alike: wrong input, a missing package, a graph that TensorRT refuses, a
    place that must not be written to."""
    refused = isinstance(error, EngineBuildError) and (error.where or "").startswith("node ")
    return isinstance(error, _PERMANENT) or refused or will_stay_unwritable(error)


def _end_with_parent() -> None:
    """Waits for the end of standard input, which is the end of the parent; the store bears a death at any moment."""
    while os.read(sys.stdin.fileno(), 1):  # not the buffered stream, whose lock Python wants when it ends
        pass
    os._exit(1)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "variant":
        return _add_variant(request["bundle"], request["variant"], request.get("target"))
    if request["do"] == "measure":
        return _measure(request["bundle"], request["store"])
    wanted = from_dict(Wanted, request["wanted"], "request")
    if request["do"] == "build":
        return _build(wanted, request["store"], request["max_bytes"])
    if request["do"] == "warm":
        return _warm(wanted, request["variant"], request["store"])
    return _run(wanted, request["store"])


def _add_variant(bundle: str, variant: str, target: str | None = None) -> dict[str, Any]:
    from accel.variants import add_variant

    add_variant(bundle, variant, target=target, show_progress=False)
    return {}


def _warm(wanted: Wanted, variant: str, store: str | None) -> dict[str, Any]:
    from accel.warmup_jobs.warming import warm_engine

    return {"latency_ms": warm_engine(wanted, variant, store)}


def _measure(bundle: str, store: str | None) -> dict[str, Any]:
    from accel.warmup_jobs.measuring import measure_bundle

    return measure_bundle(bundle, store)


def _build(wanted: Wanted, store: str | None, max_bytes: int | None) -> dict[str, Any]:
    from accel.engine_build import build_one
    from accel.engines.tensorrt.adapter import load_flavour
    from accel.engines.tensorrt.lookup import open_store

    flavour = load_flavour(wanted.target)
    report = build_one(_settle(wanted), flavour, open_store(store, max_bytes=max_bytes), show_progress=False)
    return {"digest": report.digest, "built": report.built, "bytes": report.size}


def _run(wanted: Wanted, store: str | None) -> dict[str, Any]:
    from accel.engine_latency import measure_engine
    from accel.engines.tensorrt.adapter import load_flavour
    from accel.engines.tensorrt.lookup import open_store

    request, place = _settle(wanted), open_store(store)
    engine = place.get(request.key)
    if engine is None:
        raise EngineStoreError("The engine is no longer in the store", where=place.url, remedy="Run the job again")
    with engine:
        return {"latency_ms": measure_engine(request, engine, load_flavour(wanted.target))}


def _settle(wanted: Wanted) -> Any:
    from accel.bundle import Bundle
    from accel.engine_request import prepare
    from accel.engines.tensorrt.adapter import load_flavour

    bundle, flavour = Bundle.open(wanted.bundle), load_flavour(wanted.target)
    (request,) = prepare(bundle, flavour, wanted.sm, **wanted.asked(), show_progress=False)
    return request


if __name__ == "__main__":
    raise SystemExit(main())


__all__ = ["is_permanent", "main"]
