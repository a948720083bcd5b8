"""A plan, checked and deserialized: its tensors, its profiles, and one execution context per profile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accel.bundle import Bundle
from accel.engines.tensorrt.adapter import Compatibility, Flavour, MessageLog
from accel.engines.tensorrt.kernel_cache import KernelFile
from accel.engines.tensorrt.memory import ALIGNMENT, Device
from accel.engines.tensorrt.runtime_adapter import runtime_adapter
from accel.errors import AccelError, EngineBrokenError, EngineUnavailableError

if TYPE_CHECKING:  # full TensorRT has the same methods, see runtime_adapter
    import tensorrt_rtx as trt

Shape = tuple[int, ...]


@dataclass(frozen=True)
class EngineFacts:
    """What is known of a plan beside its bytes, from the manifest that was written when it was built.

    Attributes:
        target: ``tensorrt`` or ``rtx``.
        version: Full version of the library that built it.
        sms: SMs it was built for.
        size: Of the plan, in bytes.
        profiles: Names, in the plan's order.
        compatibility: Hardware compatibility it was built with.
        sources: Files of the bundle that it was made from -> their sha256.
        sha256: Of the plan; None: it was verified already.
    """

    target: str
    version: str
    sms: tuple[str, ...]
    size: int
    profiles: tuple[str, ...] = ()
    compatibility: Compatibility = "none"
    sources: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None


def check_facts(facts: EngineFacts, plan: memoryview, flavour: Flavour, sm: str, bundle: Bundle) -> None:
    """Checks that a plan is whole, and is for this library, this GPU and this bundle.

    Raises:
        EngineUnavailableError: It is not; says what it is for.
    """
    rebuild = "Build it again with accel build"
    if facts.target != flavour.target:
        raise EngineUnavailableError(f"the engine is for {facts.target}, not {flavour.target}", remedy=rebuild)
    if facts.version != flavour.version:
        what = f"the engine was built by {flavour.title} {facts.version}, {flavour.version} is installed"
        raise EngineUnavailableError(what, remedy=rebuild)
    portable = facts.compatibility == "ampere+" and int(sm[2:]) >= 80
    if sm not in facts.sms and not portable:
        what = f"the engine is for {', '.join(facts.sms)}, this GPU is {sm}"
        raise EngineUnavailableError(what, remedy=f"{rebuild} --sm {sm}")
    if plan.nbytes != facts.size:
        what = f"the plan has {plan.nbytes:,} bytes, not {facts.size:,}: it is truncated or altered"
        raise EngineUnavailableError(what, remedy=rebuild)
    if facts.sha256 is not None and hashlib.sha256(plan).hexdigest() != facts.sha256:
        raise EngineUnavailableError("the plan was altered: its sha256 is another", remedy=rebuild)
    digests = {entry.sha256 for entry in bundle.manifest.files.values()}
    for name, digest in facts.sources.items():
        if digest not in digests:
            what = f"the engine was built from another bundle: {name} differs"
            raise EngineUnavailableError(what, where=str(bundle.path), remedy=rebuild)


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an engine. ``shape`` has -1 where it varies; ``alias``: the input it shares memory with."""

    name: str
    dtype: str
    shape: Shape
    is_input: bool
    alias: str | None = None


@dataclass(frozen=True)
class Profile:
    """One optimization profile. ``ranges``: input -> its least, best and largest shape."""

    index: int
    name: str
    ranges: Mapping[str, tuple[Shape, Shape, Shape]]

    def covers(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether all of the shapes lie in its ranges."""
        return all(
            len(shape) == len(self.ranges[name][0])
            and all(low <= size <= high for low, size, high in zip(self.ranges[name][0], shape, self.ranges[name][2]))
            for name, shape in shapes.items()
        )

    @property
    def tokens(self) -> int:
        """The most tokens of one run, padding included."""
        rows, width = self.ranges["input_ids"][2]
        return rows * width

    def __str__(self) -> str:
        (rows, width), _, (most_rows, most_width) = self.ranges["input_ids"]
        return f"{self.name}: batch {rows} to {most_rows}, sequence {width} to {most_width}"


def sizes(profile: Profile, axis: int, least: int = 1) -> list[int]:
    """Sizes of an axis of ``input_ids`` to pad to: powers of two, and the profile's own three."""
    low, best, high = (shape[axis] for shape in profile.ranges["input_ids"])
    powers = {1 << power for power in range(high.bit_length())}
    return sorted({size for size in powers | {best, high} if max(low, least) <= size <= high} | {low})


class LoadedEngine:
    """A deserialized plan on a device, whose scratch memory it shares with the device's other engines.

    Attributes:
        tensors: Its inputs and outputs by name.
        profiles: Its profiles, the one of fewest tokens first: the first that covers a run pads it least.

    Args:
        plan: The plan's bytes; may be a memory map. Not needed afterwards.
        facts: Checked before (``check_facts``).
        kernels: File of RTX's compiled kernels; read now, written by ``save_kernels``. None: none is kept.

    Raises:
        EngineUnavailableError: The library refuses the plan.
        DeviceMemoryError: The GPU's memory does not hold it.
    """

    def __init__(
        self, plan: memoryview, facts: EngineFacts, flavour: Flavour, device: Device, kernels: Path | None = None
    ) -> None:
        self.flavour, self.device, self.facts = flavour, device, facts
        self.adapter = runtime_adapter(flavour)
        self.log = MessageLog()
        self._logger = flavour.logger(self.log)
        self._kernels_file, self._kernels, self._kernels_config = KernelFile(kernels), None, None
        with device, self.guard("opening the engine"):
            self._runtime: trt.Runtime = flavour.trt.Runtime(self._logger)
            self.adapter.check_plan(self._runtime, plan, self.log)
            engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise EngineUnavailableError(
                    f"{flavour.title} cannot load the engine: {self._said()}", where="plan", remedy="Build it again"
                )
            self._engine = engine
            self.tensors = {tensor.name: tensor for tensor in self._read_tensors()}
            self.profiles = sorted(self._read_profiles(), key=lambda profile: profile.tokens)
            config, cache = flavour.runtime_config(self._engine, self._kernels_file.read())
            self._kernels_config, self._kernels = config, cache
            device.reserve(self, max(self.scratch_size, ALIGNMENT))

    @property
    def scratch_size(self) -> int:
        """Bytes of scratch memory that the most demanding profile needs."""
        return int(self._engine.device_memory_size_v2)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [name for name, tensor in self.tensors.items() if tensor.is_input]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [name for name, tensor in self.tensors.items() if not tensor.is_input]

    def profile_for(self, shapes: Mapping[str, Shape]) -> Profile | None:
        """The profile of fewest tokens that covers a run; None: none does."""
        return next((profile for profile in self.profiles if profile.covers(shapes)), None)

    def context(self, profile: Profile, fixed: bool) -> ProfileContext:
        """A context on a profile. ``fixed``: its runs may be captured.

        Raises:
            EngineUnavailableError: The library refuses.
        """
        settings = self.adapter.settings(self._engine, self._kernels, fixed)
        context = self.adapter.context(self._engine, settings)
        if context is None or not context.set_optimization_profile_async(profile.index, self.device.stream):
            what = f"{self.flavour.title} cannot make a context for profile {profile}: {self._said()}"
            raise EngineUnavailableError(what, where="execution context", remedy="Use a smaller max_batch")
        self.device.synchronize()
        return ProfileContext(self, profile, context, settings)

    @contextmanager
    def guard(self, where: str) -> Iterator[None]:
        """Turns what the bindings raise into an EngineBrokenError."""
        try:
            yield
        except AccelError:
            raise
        except Exception as error:
            raise self.broken(f"{type(error).__name__}: {error}", where) from error

    def broken(self, what: str, where: str) -> EngineBrokenError:
        """An error that ends the engine, with what the library said last."""
        return EngineBrokenError(
            f"{self.flavour.title} failed: {what} ({self._said()})",
            where=where,
            remedy="Load the bundle again, on another engine if it comes back",
        )

    def save_kernels(self) -> None:
        """Writes what RTX compiled so far to the kernels' file; a failure is logged, not raised."""
        if self._kernels is not None:
            with self.device:
                data = self.flavour.runtime_cache_of(self._kernels)
            if data:
                self._kernels_file.write(data)

    def close(self) -> None:
        """Frees the engine; its contexts must be gone."""
        self._kernels = self._kernels_config = None
        self._kernels_file.close()
        del self._engine, self._runtime
        with self.device:
            self.device.give_up(self)

    def _said(self) -> str:
        return "; ".join(self.log.errors[-2:]) or "it gave no reason"

    def _read_tensors(self) -> Iterator[TensorInfo]:
        library, engine = self.flavour.trt, self._engine
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
            if engine.get_tensor_location(name) != library.TensorLocation.DEVICE:
                what = f"the engine wants {name} in host memory"
                raise EngineUnavailableError(what, where=name, remedy="Build it again with this version of accel")
            alias = None if is_input else engine.get_aliased_input_tensor(name) or None
            dtype = self.flavour.dtype_name(engine.get_tensor_dtype(name))
            yield TensorInfo(name, dtype, tuple(engine.get_tensor_shape(name)), is_input, alias)

    def _read_profiles(self) -> Iterator[Profile]:
        names, count = self.facts.profiles, self._engine.num_optimization_profiles
        if names and len(names) != count:
            what = f"the engine has {count} profiles, its manifest names {len(names)}"
            raise EngineUnavailableError(what, where="plan", remedy="Build it again")
        for index in range(count):
            shapes = {name: self._engine.get_tensor_profile_shape(name, index) for name in self.inputs}
            ranges = {name: _three(*(tuple(shape) for shape in three)) for name, three in shapes.items()}
            yield Profile(index, names[index] if names else f"profile {index}", ranges)


def _three(low: Shape, best: Shape, high: Shape) -> tuple[Shape, Shape, Shape]:
    return low, best, high


class ProfileContext:
    """An execution context that stays on one profile. Shapes and addresses are set when they change."""

    def __init__(
        self, engine: LoadedEngine, profile: Profile, context: trt.IExecutionContext, settings: trt.IRuntimeConfig
    ) -> None:
        self.engine, self.profile = engine, profile
        self._context, self._settings = context, settings
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = 0

    def set_shape(self, name: str, shape: Shape) -> None:
        """Sets an input's shape.

        Raises:
            EngineBrokenError: The library refuses it.
        """
        if self._shapes.get(name) != shape:
            if not self._context.set_input_shape(name, shape):
                raise self.engine.broken(f"{name} cannot be {list(shape)}", str(self.profile))
            self._shapes[name] = shape

    def set_address(self, name: str, address: int) -> None:
        """Sets where an input or output lies.

        Raises:
            EngineBrokenError: The library refuses it.
        """
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise self.engine.broken(f"{name} cannot lie at {address:#x}", str(self.profile))
            self._addresses[name] = address

    def prepare(self) -> int:
        """Gives it the device's scratch memory; returns that memory's address."""
        address, size = self.engine.device.scratch
        if self._scratch != address:
            self._context.set_device_memory(address, size)
            self._scratch = address
        return address

    def enqueue(self) -> None:
        """Queues a run; ``prepare`` comes first.

        Raises:
            EngineBrokenError: The library refuses it.
        """
        if not self._context.execute_async_v3(self.engine.device.stream):
            raise self.engine.broken("a run could not be queued", str(self.profile))

    def is_capturable(self) -> bool:
        """Whether a graph may be captured from its next run."""
        return self.engine.flavour.stream_is_capturable(self._context, self.engine.device.stream)

    def close(self) -> None:
        """Frees it."""
        del self._context, self._settings


__all__ = ["EngineFacts", "LoadedEngine", "Profile", "ProfileContext", "TensorInfo", "check_facts", "sizes"]
