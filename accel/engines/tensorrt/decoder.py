"""Decoder session on a TensorRT engine: packed steps run padded, over caches that never move."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel.engines.kv_cache import DEFAULT_MAX_BATCH, check_count
from accel.engines.lifetime import Lifetime
from accel.engines.padded import PaddedStep, StepPadder
from accel.engines.session import EngineInfo, SessionOptions, StepInputs
from accel.engines.tensorrt.buffers import logits_bytes
from accel.engines.tensorrt.engine import LoadedEngine, Profile, ProfileContext, Shape, sizes
from accel.engines.tensorrt.graphs import WARM_RUNS, StepGraphs
from accel.engines.tensorrt.memory import ALIGNMENT, DeviceMemoryError
from accel.engines.tensorrt.staging import Staging
from accel.errors import CapacityError, EngineBrokenError, EngineError, EngineUnavailableError, UncoveredError
from accel.spec import ArchSpec

SMALL = ("input_ids", "position_ids", "write_index", "logits_positions")  # inputs that the host sends
LEAST_WIDTH = 16  # longer runs are padded to powers of two from here on
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Lane:
    """What runs on one profile go through."""

    context: ProfileContext
    staging: Staging
    graphs: StepGraphs


class TrtDecoderSession:
    """Implements ``accel.engines.session.DecoderSession`` on an engine of the lowered ``tensorrt`` graph.

    One-token rows run together, padded to a batch that the profiles know; a row with more tokens runs alone,
    padded to a width. One-token runs become CUDA graphs where that is faster: see ``graphs``.
    """

    mixed_steps = False

    def __init__(self, engine: LoadedEngine, arch: ArchSpec, variant: str, options: SessionOptions) -> None:
        """Reserves the caches, zeroed: what an empty slot holds is multiplied by 0, which must not make a NaN.

        Args:
            engine: Closed with the session, or when this raises.
            variant: Its name, for ``info``.
            options: ``max_batch`` None: what the profiles take, at most 8; ``capacity``: the least that is wanted.

        Raises:
            EngineUnavailableError: The engine is not of this model.
            CapacityError: ``max_batch`` or ``capacity`` exceeds what it was built for.
            DeviceMemoryError: The caches do not fit; says how many rows would.
        """
        self._engine, self._device, self._arch = engine, engine.device, arch
        self._lifetime = Lifetime("decoder")
        self._broken: EngineBrokenError | None = None
        self._buffers: list[int] = []
        self._lanes: dict[int, _Lane] = {}
        self._choices: dict[tuple[int, int, int], Profile] = {}
        flavour = engine.flavour
        self.info = EngineInfo(flavour.target, flavour.version, f"cuda:{self._device.ordinal}", variant, 1)
        try:
            self.vocab_size = arch.vocab_size
            self.capacity = check_decoder(engine, arch)
            self.max_batch = choose_rows(engine, options, self.capacity)
            with self._device, engine.guard("opening the decoder"):
                self._allocate()
        except BaseException:
            self.close()
            raise

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Runs one packed step; see ``DecoderSession.step``.

        Raises:
            EngineError: Closed, or used after a fork.
            UncoveredError: No profile covers a run.
            EngineBrokenError: TensorRT or CUDA failed; nothing runs on this session again.
        """
        self._check()
        logits = self._logits_for(len(inputs.logits_positions))
        try:
            with self._device, self._engine.guard("decoder step"):
                for row in np.flatnonzero((inputs.query_lengths > 0) & (inputs.past_lengths == 0)):
                    self._clear(int(row))
                for run in self._padder.split(inputs):
                    self._run(run, logits)
        except EngineBrokenError as error:
            self._broken = error
            raise
        return logits

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See ``DecoderSession.copy_row``. Raises as ``step`` does."""
        self._check()
        try:
            with self._device, self._engine.guard("copying a cache row"):
                self._clear(target)
                for name, address in self._caches.items():
                    _, heads, capacity, dim = self._engine.tensors[f"past.{name}"].shape
                    item, row = self._item_bytes, self._row_bytes[name]
                    pitch, width = capacity * dim * item, length * dim * item
                    self._device.copy_rows(address + target * row, address + source * row, pitch, width, heads)
                self._device.synchronize()
        except EngineBrokenError as error:
            self._broken = error
            raise
        self._padder.copied(source, target, length)

    def _clear(self, row: int) -> None:
        """Queues zeroing a row that a new sequence takes: an infinity that the last one left behind would turn the
        hidden slots' weight of 0 into a NaN."""
        for name, address in self._caches.items():
            size = self._row_bytes[name]
            self._device.clear(address + row * size, size)

    def capture_graphs(self) -> None:
        """Runs every batch of single tokens and captures it. Only before the first step: it writes into the caches.
        Raises as ``step`` does.
        """
        empty = np.zeros(self.max_batch, np.int32)
        with ExitStack() as stack:
            for lane in self._lanes.values():
                stack.enter_context(lane.graphs.warming())
            for count in self._batches:
                taking = empty.copy()
                taking[:count] = 1
                ids = np.zeros(count, np.int64)
                for _ in range(WARM_RUNS):
                    self.step(StepInputs(ids, ids, taking, empty, np.arange(count)))

    def warm_up(self) -> None:
        """Runs every batch and width once or more, so that kernels are compiled and graphs captured, and keeps the
        kernels. Only before the first step: it writes into the caches. Raises as ``step`` does.
        """
        empty, one = np.zeros(self.max_batch, np.int32), np.zeros(1, np.int64)
        self.capture_graphs()
        for width in self._widths:
            taking = empty.copy()
            taking[0] = width
            self.step(StepInputs(np.zeros(width, np.int64), np.arange(width), taking, empty, one + width - 1))
        self._engine.save_kernels()

    def cache_pointers(self) -> dict[str, int]:
        """Device address of each layer's key and value buffer, by name; they never change."""
        return dict(self._caches)

    @property
    def graphs(self) -> int:
        """CUDA graphs in use."""
        return sum(len(lane.graphs.captured) for lane in self._lanes.values())

    def close(self) -> None:
        """Frees the caches and the engine. Safe to call twice; in a fork it leaves the GPU alone."""
        if not self._lifetime.close() or self._lifetime.forked:
            return
        try:
            with self._device:
                if self._broken is None:
                    self._device.synchronize()
                    self._engine.save_kernels()
                for lane in self._lanes.values():
                    lane.graphs.close()
                    lane.context.close()
                    lane.staging.close()
                for address in self._buffers:
                    self._device.release(address)
                self._engine.close()
        except EngineError as error:  # a broken device frees nothing: the process's end does
            _log.warning("closing the decoder: %s", error)
        self._lanes, self._buffers = {}, []

    # Opening

    def _allocate(self) -> None:
        tensors, rows = self._engine.tensors, self.max_batch
        names = [f"{index}.{part}" for index in range(len(self._arch.layers)) for part in ("key", "value")]
        shapes = {name: tensors[f"past.{name}"].shape[1:] for name in names}
        self._item_bytes = 4 if tensors["past.0.key"].dtype == "float32" else 2
        self._row_bytes = {name: int(np.prod(shape)) * self._item_bytes for name, shape in shapes.items()}
        self._check_alignment()
        self._logits_bytes = logits_bytes((profile.ranges for profile in self._engine.profiles), self.vocab_size)
        self._caches: dict[str, int] = {}
        for name, size in self._row_bytes.items():
            self._caches[name] = self._reserve(rows * size, name)
            self._device.clear(self._caches[name], rows * size)
        self._device_logits = self._reserve(self._logits_bytes, "logits")
        self._host_logits = self._device.pinned(
            (self._logits_bytes // (4 * self.vocab_size), self.vocab_size), np.float32
        )
        self._step_logits = np.zeros((rows, self.vocab_size), np.float32)
        for profile in self._engine.profiles:
            context = self._engine.context(profile, fixed=False)
            staging = Staging(self._device, profile, list(SMALL))
            self._lanes[profile.index] = _Lane(context, staging, StepGraphs(self._engine, context))
        self._make_padder()
        self._device.synchronize()

    def _make_padder(self) -> None:
        profiles, rows = self._engine.profiles, self.max_batch
        single = [profile for profile in profiles if profile.ranges["input_ids"][0][1] == 1]
        self._batches = sorted({size for profile in single for size in sizes(profile, 0) if size <= rows} | {rows})
        alone = [profile for profile in profiles if profile.ranges["input_ids"][0][0] == 1]
        longer = [profile for profile in alone if profile.ranges["input_ids"][2][1] > 1]
        alone = longer or alone  # a profile of single tokens says nothing about runs of several
        widths = {size for profile in alone for size in sizes(profile, 1, LEAST_WIDTH)}
        self._widths = sorted(width for width in widths if 1 < width <= self.capacity)
        most_tokens = max((profile.ranges["input_ids"][2][1] for profile in alone), default=1)
        most_logits = min((profile.ranges["logits_positions"][2][0] for profile in alone), default=1)
        self._padder = StepPadder(rows, self.capacity, self._batches, self._widths, most_tokens, most_logits)

    def _check_alignment(self) -> None:
        """Runs over later rows see the caches from there on: every row must begin at an aligned address."""
        if self.max_batch > 1 and any(size % ALIGNMENT for size in self._row_bytes.values()):
            what = f"a cache row is no multiple of {ALIGNMENT} bytes, as TensorRT's addresses must be"
            remedy = f"Build with a capacity that is a multiple of {ALIGNMENT}, or load with max_batch=1"
            raise EngineUnavailableError(what, where="capacity", remedy=remedy)

    def _reserve(self, size: int, what: str) -> int:
        try:
            address = self._device.allocate(size, what)
        except DeviceMemoryError as error:
            row = sum(self._row_bytes.values())
            held = sum(self._row_bytes[name] * self.max_batch for name in self._caches)
            free = max(0, error.free + held - self._logits_bytes)
            remedy = f"Rows of {self.capacity:,} positions take {row:,} bytes each: load with max_batch={free // row}"
            if free < row:
                remedy = f"Not one row fits: build an engine of at most {free * self.capacity // row:,} positions"
            what = f"{what} of {self.max_batch} cache rows"
            raise DeviceMemoryError(error.size, error.free, what, remedy) from error
        self._buffers.append(address)
        return address

    # Running

    def _check(self) -> None:
        self._lifetime.check()
        if self._broken is not None:
            raise self._broken

    def _logits_for(self, count: int) -> NDArray[np.float32]:
        if count <= self.max_batch:
            return self._step_logits[:count]
        return np.empty((count, self.vocab_size), np.float32)

    def _run(self, run: PaddedStep, logits: NDArray[np.float32]) -> None:
        rows, width, wanted = *run.input_ids.shape, len(run.logits_positions)
        lane = self._lanes[self._choose(rows, width, wanted).index]
        lane.staging.send({name: getattr(run, name) for name in SMALL})

        def bind(context: ProfileContext) -> None:
            self._bind(context, lane.staging, run)

        if width == 1:
            lane.graphs.run((rows, run.first, wanted), bind)
        else:
            bind(lane.context)
            lane.context.prepare()
            lane.context.enqueue()
        taken = run.wanted >= 0
        if taken.any():
            self._device.download(self._host_logits[:wanted], self._device_logits)
        self._device.synchronize()  # also without logits: the pinned inputs are free for the next run then
        logits[run.wanted[taken]] = self._host_logits[:wanted][taken]

    def _bind(self, context: ProfileContext, staging: Staging, run: PaddedStep) -> None:
        rows = len(run.input_ids)
        for name, address in staging.addresses.items():
            context.set_shape(name, getattr(run, name).shape)
            context.set_address(name, address)
        for name, address in self._caches.items():
            here = address + run.first * self._row_bytes[name]
            context.set_shape(f"past.{name}", (rows, *self._engine.tensors[f"past.{name}"].shape[1:]))
            context.set_address(f"past.{name}", here)
            context.set_address(f"present.{name}", here)
        context.set_address("logits", self._device_logits)

    def _choose(self, rows: int, width: int, wanted: int) -> Profile:
        key = rows, width, wanted
        if key not in self._choices:
            shapes: dict[str, Shape] = {"input_ids": (rows, width), "position_ids": (rows, width)}
            shapes |= {"write_index": (rows,), "logits_positions": (wanted,)}
            for name in self._caches:
                shapes[f"past.{name}"] = rows, *self._engine.tensors[f"past.{name}"].shape[1:]
            profile = self._engine.profile_for(shapes)
            if profile is None:
                raise not_covered(self._engine, f"batch {rows}, sequence {width}, {wanted} rows of logits")
            self._choices[key] = profile
        return self._choices[key]


def not_covered(
    engine: LoadedEngine, request: str, remedy: str = "Build an engine with a wider profile"
) -> UncoveredError:
    """The error of a run that no profile takes."""
    have = "; ".join(map(str, engine.profiles))
    return UncoveredError(f"no profile of the engine covers {request}", where=have, remedy=remedy)


def check_decoder(engine: LoadedEngine, arch: ArchSpec) -> int:
    """Checks that the engine is one of this model; returns its capacity.

    Raises:
        EngineUnavailableError: It is not; names the first tensor that differs.
    """
    tensors, layers = engine.tensors, arch.layers
    capacity = tensors["past.0.key"].shape[2] if "past.0.key" in tensors else -1
    wanted: dict[str, Shape] = {name: (-1,) * (2 if name.endswith("ids") else 1) for name in SMALL}
    wanted["logits"] = -1, arch.vocab_size
    for index, layer in enumerate(layers):
        for name in (f"{kind}.{index}.{part}" for kind in ("past", "present") for part in ("key", "value")):
            wanted[name] = -1, layer.kv_heads, capacity, layer.head_dim
    for name in sorted(wanted.keys() | tensors.keys()):
        have = tensors[name].shape if name in tensors else None
        if name not in wanted or have is None or not _fits(have, wanted[name]):
            what = f"the engine is of another model: {name} has the shape {have}, not {wanted.get(name)}"
            raise EngineUnavailableError(what, where=name, remedy="Build it again from this bundle")
        if name.startswith("present.") and tensors[name].alias != name.replace("present", "past"):
            what = f"{name} does not share its input's memory: the cache would be copied at every step"
            raise EngineUnavailableError(what, where=name, remedy="Build it again with this version of accel")
    return capacity


def _fits(have: Shape, wanted: Shape) -> bool:
    """Whether a tensor may have the wanted shape; a -1 of ours may be a number when a profile fixes it."""
    return len(have) == len(wanted) and all(b == -1 or a == b for a, b in zip(have, wanted))


def choose_rows(engine: LoadedEngine, options: SessionOptions, capacity: int) -> int:
    """Cache rows: those asked for, or as many as the profiles take, at most the default.

    Raises:
        CapacityError: Rows or capacity that the engine was not built for.
    """
    single = [profile for profile in engine.profiles if profile.ranges["input_ids"][0][1] == 1]
    have = "; ".join(map(str, engine.profiles))
    if not single:
        remedy = "Build an engine with a profile whose sequence begins at 1"
        raise EngineUnavailableError("no profile of the engine takes single tokens", where=have, remedy=remedy)
    asked, positions = check_count("max_batch", options.max_batch), check_count("capacity", options.capacity)
    if positions is not None and positions > capacity:
        what = f"the engine holds {capacity:,} positions per row, {positions:,} are asked for"
        raise CapacityError(what, where="capacity", remedy=f"Ask for at most {capacity:,}, or build a larger engine")
    ranges = [tuple(shape[0] for shape in profile.ranges["input_ids"]) for profile in single]
    most = max(high for _, _, high in ranges)
    rows = asked if asked is not None else min(most, max(DEFAULT_MAX_BATCH, min(low for low, _, _ in ranges)))
    if not any(low <= rows <= high for low, _, high in ranges):
        what = f"no profile of the engine takes {rows} rows of single tokens"
        raise CapacityError(what, where=f"max_batch; {have}", remedy=f"Load with max_batch={most}, or build for more")
    return rows


__all__ = ["TrtDecoderSession", "check_decoder", "choose_rows", "not_covered"]
