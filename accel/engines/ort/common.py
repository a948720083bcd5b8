"""What the encoder and the decoder session share: importing, opening and running ONNX Runtime, and its errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import accel_cpu

from accel.engines.huge_pages import huge_pages
from accel.errors import DependencyError, EngineError
from accel.scheme import stores_integers

MINIMUM_VERSION = (1, 32)  # GroupQueryAttention takes query_seqlens from here on
INSTALL = 'pip install "accelrt[cpu]"'
NAME = "ort-cpu"
SPIN_US = 500  # an idle worker spins this long before it sleeps; MiniLM 1x8 gains 5 % over sleeping at once
_WARNING = 3  # ONNX Runtime's log severity: errors only


def import_onnxruntime() -> ModuleType:
    """Imports onnxruntime.

    Raises:
        DependencyError: It is missing, broken, or older than 1.32.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(f"onnxruntime cannot be imported: {error}", remedy=f"Install it: {INSTALL}") from error
    version = getattr(onnxruntime, "__version__", None)
    if version is None or not hasattr(onnxruntime, "InferenceSession"):
        what = "onnxruntime is damaged: its folder holds no usable package"
        raise DependencyError(what, remedy=f"Reinstall it: pip uninstall onnxruntime onnxruntime-gpu, then {INSTALL}")
    if parse_version(version) < MINIMUM_VERSION:
        what = f"onnxruntime {version} is too old: 1.32 or newer is needed"
        raise DependencyError(what, remedy=f"Upgrade it: {INSTALL} --upgrade")
    return onnxruntime


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor number of a version string."""
    numbers = re.findall(r"\d+", text)[:2]
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def missing_operators(variant: str) -> str | None:
    """Why a variant's graphs cannot run here although ONNX Runtime is there, or None."""
    return accel_cpu.unavailable_reason() if stores_integers(variant) else None


def open_graph(path: Path, threads: int, variant: str) -> Any:
    """Opens an ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        path: The graph; its external data lies beside it and is mapped.
        threads: Intra-op threads, the caller's own included.
        variant: The graph's; integers take operators of our own.

    Raises:
        DependencyError: see ``import_onnxruntime``.
        EngineError: ONNX Runtime refuses the graph.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _WARNING
    # The lowered graph is what we measured as fastest; ONNX Runtime's own passes would fuse its
    # residual adds into SkipLayerNormalization again, whose CPU kernel is several times slower.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > 1:
        # Long enough for the gap between two decode steps, where waking the workers would cost more
        # than the gap itself; short enough not to keep the cores from another session's workers.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    library = accel_cpu.library_path()
    if library is not None or stores_integers(variant):  # without it, what else it offers has a body in the graph
        with translated_errors("loading the CPU operators"):
            options.register_custom_ops_library(str(library))
    with translated_errors(f"opening {path.name}"), huge_pages():
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def translated_errors(where: str) -> Iterator[None]:
    """Turns whatever ONNX Runtime raises into an EngineError that keeps its message."""
    try:
        yield
    except (EngineError, DependencyError):
        raise
    except Exception as error:
        raise engine_error(error, where) from error


def engine_error(error: Exception, where: str) -> EngineError:
    """An ONNX Runtime exception in our terms."""
    if isinstance(error, MemoryError) or "bad_alloc" in str(error) or "Failed to allocate" in str(error):
        return EngineError(
            f"ONNX Runtime ran out of memory: {error}", where=where, remedy="Use a smaller batch, or a smaller capacity"
        )
    return EngineError(
        f"ONNX Runtime failed: {type(error).__name__}: {error}",
        where=where,
        remedy="Check the bundle with Bundle.open(path, verify=True); export it again if it is damaged",
    )


__all__ = [
    "INSTALL",
    "NAME",
    "engine_error",
    "import_onnxruntime",
    "missing_operators",
    "open_graph",
    "translated_errors",
]
