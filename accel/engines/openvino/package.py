"""The package openvino: importing it without its telemetry, what its CPU plugin can do, and its errors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from accel.capabilities import MINIMUM_OPENVINO, version_of
from accel.engines.openvino.signal_stack import kept_signal_stack
from accel.engines.ort.common import parse_version
from accel.errors import DependencyError, EngineError

INSTALL = 'pip install "accelrt[openvino]"'
NAME = "openvino"
_TELEMETRY = "openvino_telemetry"
_importing = threading.Lock()


def is_installed() -> bool:
    """Whether the package is there, without importing it."""
    return version_of("openvino") is not None


def import_openvino() -> ModuleType:
    """Imports openvino.

    Importing it reports that to Google Analytics by itself, unless its telemetry package is missing: it is hidden
    while the import runs, so nothing is sent. Who imported openvino before chose otherwise.

    Raises:
        DependencyError: It is missing, broken or too old.
    """
    version = version_of("openvino")
    if version is None:
        raise DependencyError("openvino is not installed", remedy=f"Run: {INSTALL}")
    if parse_version(version) < MINIMUM_OPENVINO:
        least = ".".join(map(str, MINIMUM_OPENVINO))
        what = f"openvino {version} is too old: {least} or newer is needed"
        raise DependencyError(what, remedy=f"Run: {INSTALL} --upgrade")
    try:
        with _importing, _without_telemetry():
            import openvino

            if not hasattr(openvino, "Core"):
                what = "openvino is damaged: its folder holds no usable package"
                raise DependencyError(what, remedy=f"Reinstall it: {INSTALL}")
            # The first call makes a table of NumPy's types, and lets go of Python's lock amid that: two threads whose
            # first calls meet wait for each other for ever (seen with openvino 2026.4.1). Here one comes at a time.
            openvino.Type.f32.to_dtype()
    except DependencyError:  # an ImportError too
        raise
    except ImportError as error:
        raise DependencyError(f"openvino cannot be imported: {error}", remedy=f"Reinstall it: {INSTALL}") from error
    return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # "import" raises, and openvino takes its stub
    try:
        yield
    finally:
        sys.modules.pop(_TELEMETRY, None)


def open_core() -> Any:
    """An ``openvino.Core``, to ask what it can do: ``compile_graph`` compiles.

    Raises:
        DependencyError: See ``import_openvino``.
        EngineError: Its CPU plugin does not load.
    """
    with kept_signal_stack():
        return _load_core()


def compile_graph(graph: Path, settings: dict[str, Any]) -> Any:
    """An ``openvino.CompiledModel`` for the CPU, on a core of its own, whose threads end with it.

    Args:
        graph: Its weights lie beside it and are mapped.
        settings: Properties of the CPU plugin.

    Raises:
        DependencyError: See ``import_openvino``.
        EngineError: The CPU plugin does not load, or refuses the graph.
    """
    # One block: compiling asks the kernel for AMX, which needs the plugin's signal stack where ours is small.
    with translated_errors(f"opening {graph.name}"), kept_signal_stack():
        core = _load_core()  # named, so that it outlives the block even where compiling fails
        return core.compile_model(str(graph), "CPU", settings)


def _load_core() -> Any:
    openvino = import_openvino()
    with translated_errors("opening the CPU plugin"):
        core = openvino.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
        return core


def computes_bfloat16(core: Any) -> bool:
    """Whether this CPU has instructions for bfloat16 that OpenVINO uses."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def translated_errors(where: str) -> Iterator[None]:
    """Turns whatever OpenVINO raises into an EngineError that keeps its message."""
    try:
        yield
    except (EngineError, DependencyError):
        raise
    except Exception as error:
        raise engine_error(error, where) from error


def engine_error(error: Exception, where: str) -> EngineError:
    """An exception of OpenVINO in our terms."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "bad_alloc" in text or "bad allocation" in text:
        return EngineError(f"OpenVINO ran out of memory: {text}", where=where, remedy="Use a smaller batch")
    remedy = "Load with engine='ort-cpu'; Bundle.open(path, verify=True) tells whether the bundle is damaged"
    return EngineError(f"OpenVINO failed: {type(error).__name__}: {text}", where=where, remedy=remedy)


__all__ = [
    "INSTALL",
    "NAME",
    "compile_graph",
    "computes_bfloat16",
    "engine_error",
    "import_openvino",
    "is_installed",
    "open_core",
    "translated_errors",
]
