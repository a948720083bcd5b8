"""Where a session runs, opening graphs there, and what its failures mean.

The provider is a parameter: the same sessions run fp32 graphs on ONNX Runtime's CPU provider, where there is no GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.engines.capturing import is_disturbed, undisturbed
from accel.engines.gpu_memory import OutOfMemoryError, says_full
from accel.engines.ort_cuda.package import CUDA
from accel.errors import AccelError, EngineBrokenError, EngineError, EngineUnavailableError

NAME = "ort-cuda"
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # of onnx.TensorProto; NumPy has no bfloat16
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ERRORS_ONLY = 3
_BROKEN = re.compile(r"CUDA failure|CUDA error|cudaError|CUBLAS failure|CUBLAS_STATUS|CUDNN failure|CUDNN_STATUS")


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        ort: The ``onnxruntime`` module.
        name: ONNX Runtime's name of it.
        device: Its device's name in ONNX Runtime: ``cuda`` or ``cpu``.
        index: Number of the device.
    """

    ort: Any
    name: str = CUDA
    device: str = "cuda"
    index: int = 0

    @property
    def is_cuda(self) -> bool:
        return self.name == CUDA

    def open(self, graph: Path | bytes, capture: bool = False) -> Any:
        """Opens an ``onnxruntime.InferenceSession``.

        Args:
            graph: The graph, its external data beside it; or a small one's bytes.
            capture: Let runs be captured as CUDA graphs.

        Raises:
            OutOfMemoryError: The weights do not fit.
            EngineUnavailableError: The provider cannot be used: driver, libraries, or a graph that it refuses.
        """
        options = self.ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is lowered already
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        where = graph.name if isinstance(graph, Path) else "a helper graph"
        given = str(graph) if isinstance(graph, Path) else graph
        providers = [self._settings(capture)]
        try:
            session = undisturbed(
                lambda: self.ort.InferenceSession(given, options, providers=providers, enable_fallback=0)
            )
        except Exception as error:
            raise _as_opening(error, where) from error
        if session.get_providers()[0] != self.name:  # ONNX Runtime goes on without a provider that does not load
            what = f"ONNX Runtime could not start {self.name} and would run on {session.get_providers()[0]}"
            remedy = "Its driver or CUDA libraries do not fit: see nvidia-smi and accel doctor"
            raise EngineUnavailableError(what, where=where, remedy=remedy)
        return session

    def _settings(self, capture: bool) -> str | tuple[str, dict[str, str]]:
        if not self.is_cuda:
            return self.name
        settings = {
            "device_id": str(self.index),
            "arena_extend_strategy": "kSameAsRequested",  # a power of two more would be lost to the cache
            "use_tf32": "0",
            "enable_cuda_graph": str(int(capture)),
        }
        return self.name, settings

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An ``OrtValue`` on the device, its contents undefined.

        Raises:
            OutOfMemoryError: It does not fit.
        """
        try:
            return self.ort.OrtValue.ortvalue_from_shape_and_type(
                list(shape), ONNX_TYPES[dtype], self.device, self.index
            )
        except Exception as error:
            raise run_error(error, "allocating device memory") from error

    def upload(self, array: Any) -> Any:
        """An ``OrtValue`` on the device with an array's values."""
        return self.ort.OrtValue.ortvalue_from_numpy(array, self.device, self.index)

    def host(self, array: Any) -> Any:
        """An ``OrtValue`` over a host array's own memory."""
        return self.ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)


def may_be_disturbed(error: BaseException) -> bool:
    """Whether another thread's capture may have come between: its arena calls memory full that CUDA refused then."""
    return is_disturbed(error) or says_full(str(error))


def run_error(error: Exception, where: str) -> EngineError:
    """An ONNX Runtime exception in our terms: out of memory, a lost device, or one failed run."""
    if isinstance(error, EngineError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or says_full(text):
        remedy = "Use a smaller batch or shorter inputs, or close other programs on this GPU"
        return OutOfMemoryError(f"ONNX Runtime ran out of device memory: {error}", where=where, remedy=remedy)
    if _BROKEN.search(text):
        remedy = "Check nvidia-smi and the kernel's log; load the bundle again, on another engine if it comes back"
        return EngineBrokenError(f"CUDA failed: {error}", where=where, remedy=remedy)
    remedy = "Check the bundle with Bundle.open(path, verify=True); export it again if it is damaged"
    return EngineError(f"ONNX Runtime failed: {text}", where=where, remedy=remedy)


def _as_opening(error: Exception, where: str) -> AccelError:
    found = run_error(error, f"opening {where}")
    if isinstance(found, OutOfMemoryError):
        return found
    return EngineUnavailableError(found.what, where=found.where, remedy=found.remedy)


__all__ = ["ITEM_BYTES", "NAME", "ONNX_TYPES", "Provider", "may_be_disturbed", "run_error"]
