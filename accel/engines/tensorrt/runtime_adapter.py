"""What running needs of a flavour beyond ``Flavour``: plan checks, contexts, kernel caches.

Methods of full TensorRT were read from ``python/src/infer/pyCore.cpp`` (10.15): contexts, configs and engines have
the same methods as in RTX 1.7, except where a method here says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from accel.engines.tensorrt.adapter import Flavour, MessageLog
from accel.errors import EngineUnavailableError

if TYPE_CHECKING:
    import tensorrt_rtx as trt


class RuntimeAdapter(ABC):
    """Running with one flavour. Made by ``runtime_adapter``."""

    def __init__(self, flavour: Flavour) -> None:
        self.flavour, self.trt = flavour, flavour.trt

    @abstractmethod
    def check_plan(self, runtime: trt.Runtime, plan: memoryview, log: MessageLog) -> None:
        """Asks the library whether it will take a plan, before it is deserialized.

        Raises:
            EngineUnavailableError: It will not; says why.
        """

    def context(self, engine: trt.ICudaEngine, settings: trt.IRuntimeConfig) -> trt.IExecutionContext | None:
        """A new execution context; None when the library refuses. Keep ``settings`` alive as long as it."""
        return engine.create_execution_context(settings)

    def settings(self, engine: trt.ICudaEngine, kernels: Any, fixed: bool) -> trt.IRuntimeConfig:
        """The config of a context whose scratch memory is the caller's.

        Args:
            kernels: The runtime cache of the engine, or None.
            fixed: The context's runs are captured: its kernels must not be replaced behind the graph.
        """
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return settings


class _TensorRT(RuntimeAdapter):
    def check_plan(self, runtime: trt.Runtime, plan: memoryview, log: MessageLog) -> None:
        """Nothing: there is no ``get_engine_validity`` (pyCore.cpp, 10.15); deserializing it tells."""


# RTX's own graphs (cuda_graph_strategy of the runtime config) are not used: the strategy is set once per context, so
# that a bucket for which the graph is slower could not be left out, and a context would have to be made anew to
# measure the difference. The stream is captured as for TensorRT.
class _TensorRTRTX(RuntimeAdapter):
    REASONS = (
        ("VERSION_MISMATCH", "it was built by another version of TensorRT-RTX"),
        ("UNSUPPORTED_CC", "it was built for other GPUs, or TensorRT-RTX does not support this one"),
        ("OLD_CUDA_DRIVER", "the CUDA driver is too old"),
        ("OLD_CUDA_RUNTIME", "the CUDA runtime is too old"),
        ("INSUFFICIENT_GPU_MEMORY", "the GPU has too little memory"),
        ("MALFORMED_ENGINE", "it is truncated, altered, or no engine"),
        ("CUDA_ERROR", "CUDA does not work here (no GPU, or a driver that does not fit)"),
    )

    def check_plan(self, runtime: trt.Runtime, plan: memoryview, log: MessageLog) -> None:
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity != self.trt.EngineValidity.INVALID:
            return
        bits = self.trt.EngineInvalidityDiagnostics
        reasons = [text for name, text in self.REASONS if int(diagnostics) & int(getattr(bits, name))]
        reasons = reasons or log.errors[-1:] or ["it gives no reason"]  # without a driver it says so in its log alone
        what = f"TensorRT-RTX refuses the engine: {'; '.join(reasons)}"
        raise EngineUnavailableError(what, where="plan", remedy="Build it again for this GPU and version")

    def settings(self, engine: trt.ICudaEngine, kernels: Any, fixed: bool) -> trt.IRuntimeConfig:
        settings = super().settings(engine, kernels, fixed)
        if kernels is not None and not settings.set_runtime_cache(kernels):
            raise EngineUnavailableError("TensorRT-RTX refuses its runtime cache", where="runtime cache")
        # LAZY swaps kernels between runs, when the specialised ones are compiled; a graph would keep the old ones.
        kinds = self.trt.DynamicShapesKernelSpecializationStrategy
        settings.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if fixed else kinds.LAZY
        return settings


_ADAPTERS: dict[str, type[RuntimeAdapter]] = {"tensorrt": _TensorRT, "rtx": _TensorRTRTX}


def runtime_adapter(flavour: Flavour) -> RuntimeAdapter:
    """The adapter of a flavour."""
    return _ADAPTERS[flavour.target](flavour)


__all__ = ["RuntimeAdapter", "runtime_adapter"]
