"""Stands in for the module ``tensorrt_rtx`` where engines run: holds its rules, computes with ONNX Runtime.

Enums, loggers and all else are the real module's. An engine is what ``tests.engines.tensorrt.built`` read off the
network and config that TensorRT-RTX built. A broken rule is a ``RuleBroken``; where the library returns False and
logs, so does this. The rules are NvInferRuntime.h's and the developer guide's, each named where it is checked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort

from accel.engines.tensorrt.adapter import Flavour, load_flavour
from tests.engines.tensorrt.built import BuiltEngine
from tests.engines.tensorrt.gpu import Gpu, Illegal

SCRATCH = 100_000  # bytes that every engine wants


class RuleBroken(Exception):
    """TensorRT's documentation forbids this; what the real library does then is undefined."""


@dataclass
class Config:
    """``IRuntimeConfig``."""

    dynamic_shapes_kernel_specialization_strategy: Any = None
    cuda_graph_strategy: Any = None
    allocation: Any = None
    cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> KernelCache:
        return KernelCache()

    def set_runtime_cache(self, cache: KernelCache) -> bool:
        self.cache = cache
        return True


@dataclass
class KernelCache:
    """``IRuntimeCache``: remembers the shapes that ran."""

    content: bytes = b"kernels:"

    def deserialize(self, data: bytes) -> bool:
        fits = data.startswith(b"kernels:")
        self.content = bytes(data) if fits else self.content
        return fits

    def serialize(self) -> bytes:
        return self.content


@dataclass
class World:
    """What a test may look at and change.

    Attributes:
        contexts: Every context made.
        runs: (profile, shapes of input_ids) of every run, those of graphs included.
        refuse: What ``execute_async_v3`` of the next contexts' runs returns False for: "capture", "run".
        slow: Work that takes its time: "run" or "graph", by how many seconds.
        lasts: After how many runs all further ones fail.
        breaks: The broken rule that the test expects.
    """

    gpu: Gpu
    engines: dict[bytes, BuiltEngine] = field(default_factory=dict)
    contexts: list[Context] = field(default_factory=list)
    runs: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    refuse: set[str] = field(default_factory=set)
    capturable: bool = True
    slow: dict[str, float] = field(default_factory=dict)
    breaks: str = ""
    lasts: int | None = None

    def flavour(self) -> Flavour:
        """RTX's flavour, whose engines run on this world's GPU."""
        real = load_flavour("rtx")
        return type(real)(Module(real.trt, self), real.version)


class Module:
    """``tensorrt_rtx``, but for ``Runtime``."""

    def __init__(self, real: Any, world: World) -> None:
        self._real, self._world = real, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self._real, self._world, logger)


class Runtime:
    def __init__(self, trt: Any, world: World, logger: Any) -> None:
        self.trt, self.world, self.logger = trt, world, logger

    def error(self, text: str) -> None:
        self.logger.log(self.trt.ILogger.Severity.ERROR, text)

    def get_engine_validity(self, plan: Any) -> tuple[Any, int]:
        known = bytes(plan) in self.world.engines
        bits = self.trt.EngineInvalidityDiagnostics
        return (
            (self.trt.EngineValidity.VALID, 0)
            if known
            else (self.trt.EngineValidity.INVALID, int(bits.MALFORMED_ENGINE))
        )

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        if "deserialize" in self.world.refuse:
            self.error("IRuntime::deserializeCudaEngine: Error Code 1")
            return None
        return Engine(self, self.world.engines[bytes(plan)])


class Engine:
    def __init__(self, runtime: Runtime, built: BuiltEngine) -> None:
        self.runtime, self.built, self.trt = runtime, built, runtime.trt
        self.by_name = {tensor.name: tensor for tensor in built.tensors}
        self.num_io_tensors, self.num_optimization_profiles = len(built.tensors), len(built.profiles)
        self.device_memory_size_v2 = SCRATCH
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(built.graph, options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index: int) -> str:
        return self.built.tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if self.by_name[name].is_input else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return self.by_name[name].data_type

    def get_tensor_shape(self, name: str) -> Any:
        return self.trt.Dims(self.by_name[name].shape)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.by_name[name].alias

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Any]:
        return [self.trt.Dims(shape) for shape in self.built.profiles[index][name]]

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, config: Config) -> Context | None:
        if "context" in self.runtime.world.refuse:
            self.runtime.error("createExecutionContext: Error Code 2: out of memory")
            return None
        self.runtime.world.contexts.append(Context(self, config))
        return self.runtime.world.contexts[-1]


class Context:
    def __init__(self, engine: Engine, config: Config) -> None:
        strategies = engine.trt.ExecutionContextAllocationStrategy
        if config.allocation != strategies.USER_MANAGED:
            raise RuleBroken("scratch memory is shared: contexts must not have their own")
        self.engine, self.config, self.world = engine, config, engine.runtime.world
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.version = self.flushed = 0  # of shapes and addresses; of the last enqueue
        self.captured: int | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self.captured is not None:
            raise RuleBroken("the profile changes after a capture")
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Any) -> bool:
        """setInputShape: "dimensions must be within the range of the profile"."""
        tensor = self.engine.by_name[name]
        if self.profile is None:
            raise RuleBroken("shapes come after the profile")
        low, _, high = self.engine.built.profiles[self.profile][name]
        fits = len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high))
        if not tensor.is_input or not fits:
            self.engine.runtime.error(f"IExecutionContext::setInputShape: Error Code 3: {name} {tuple(shape)}")
            return False
        self._change()
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        """setTensorAddress: "the pointer must have at least 256-byte alignment"."""
        if name not in self.engine.by_name:
            self.engine.runtime.error(f"IExecutionContext::setTensorAddress: given invalid tensor name: {name}")
            return False
        if address % 256:
            raise RuleBroken(f"{name} lies at {address:#x}")
        self._change()
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        """setDeviceMemoryV2: aligned, and as large as the engine says."""
        if address % 256 or size < self.engine.device_memory_size_v2:
            raise RuleBroken(f"scratch memory of {size} bytes at {address:#x}")
        self._change()
        self.scratch = address, size

    def get_tensor_shape(self, name: str) -> Any:
        shape = self.engine.by_name[name].shape
        if name in self.shapes:
            shape = self.shapes[name]
        elif "logits_positions" in self.engine.by_name and name == "logits":
            shape = (*self.shapes["logits_positions"], shape[1])
        elif "input_ids" in self.shapes:
            shape = (*self.shapes["input_ids"][: shape.count(-1)], *shape[shape.count(-1) :])
        return self.engine.trt.Dims(shape)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.world.capturable

    def execute_async_v3(self, stream: int) -> bool:
        """enqueueV3: every shape and address is set; an aliased output has its input's address."""
        self._check()
        gpu = self.world.gpu
        if "run" in self.world.refuse or (self.world.lasts is not None and len(self.world.runs) >= self.world.lasts):
            self.engine.runtime.error("IExecutionContext::enqueueV3: Error Code 1: Cask")
            return False
        if gpu.capturing is not None:
            if "capture" in self.world.refuse:
                gpu.capture_broken = True
                self.engine.runtime.error(
                    "IExecutionContext::enqueueV3: operation not permitted when stream is capturing"
                )
                return False
            if self.flushed != self.version:
                raise RuleBroken("new shapes: enqueue once before capturing")
            kinds = self.engine.trt.DynamicShapesKernelSpecializationStrategy
            if self.config.dynamic_shapes_kernel_specialization_strategy != kinds.EAGER:
                raise RuleBroken("lazily specialised kernels would be swapped behind the graph")
            self.captured = self.version
        self.flushed = self.version
        shapes, addresses, scratch, graph = (
            dict(self.shapes),
            dict(self.addresses),
            self.scratch,
            gpu.capturing is not None,
        )
        cache = self.config.cache
        if cache is not None and str(shapes["input_ids"]).encode() not in cache.content:
            cache.content += str(shapes["input_ids"]).encode()
        gpu.submit(lambda: self._compute(shapes, addresses, scratch, graph))
        return True

    def _change(self) -> None:
        """Developer guide, CUDA graphs: a context whose shapes or addresses change needs a new capture."""
        if self.captured is not None:
            raise RuleBroken("shapes or addresses change after a capture")
        self.version += 1

    def _check(self) -> None:
        for tensor in self.engine.built.tensors:
            if tensor.is_input and tensor.name not in self.shapes:
                raise RuleBroken(f"{tensor.name} has no shape")
            if tensor.name not in self.addresses:
                raise RuleBroken(f"{tensor.name} has no address")
            if tensor.alias is not None and self.addresses[tensor.name] != self.addresses[tensor.alias]:
                raise RuleBroken(f"{tensor.name} and {tensor.alias} lie apart")
        if not self.scratch[0]:
            raise RuleBroken("there is no scratch memory")

    def _compute(
        self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], scratch: tuple[int, int], graph: bool
    ) -> None:
        gpu = self.world.gpu
        gpu.find(*scratch)
        gpu.view(scratch[0], (scratch[1],), np.uint8).fill(0xFF)  # nothing survives there
        self.world.runs.append((self.profile or 0, shapes["input_ids"]))
        time.sleep(self.world.slow.get("graph" if graph else "run", 0.0))
        feeds = {}
        for name, shape in shapes.items():
            dtype = self.engine.trt.nptype(self.engine.by_name[name].data_type)
            feeds[name] = gpu.view(addresses[name], shape, dtype)
        self._check_values(feeds)
        outputs = [tensor.name for tensor in self.engine.built.tensors if not tensor.is_input]
        for name, array in zip(outputs, self.engine.session.run(outputs, feeds)):
            gpu.view(addresses[name], array.shape, array.dtype)[...] = array

    def _check_values(self, feeds: dict[str, np.ndarray]) -> None:
        """KVCacheUpdate: "write index + sequence <= capacity", unchecked; and what Gather must not leave."""
        if not feeds.get("attention_mask", np.ones((1, 1))).any(axis=1).all():
            raise Illegal("a row sees no key at all")
        if "write_index" not in feeds:
            return
        rows, width = feeds["input_ids"].shape
        capacity = feeds["past.0.key"].shape[2]
        if feeds["write_index"].min() < 0 or feeds["write_index"].max() + width > capacity:
            raise Illegal(f"tokens are written behind the cache: {feeds['write_index']} + {width}")
        if feeds["logits_positions"].min() < 0 or feeds["logits_positions"].max() >= rows * width:
            raise Illegal("logits of tokens that are not there")
