"""Encoder session on a TensorRT engine: batches of any size run padded inside the engine's profiles."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel.engines.lifetime import Lifetime
from accel.engines.session import EngineInfo
from accel.engines.tensorrt.buffers import OutputBuffers, OutputLayout
from accel.engines.tensorrt.decoder import not_covered
from accel.engines.tensorrt.engine import LoadedEngine, Profile, ProfileContext, sizes
from accel.engines.tensorrt.staging import Staging
from accel.errors import EngineBrokenError, EngineError, EngineUnavailableError, InputError, UncoveredError
from accel.spec import OUTPUT_NAMES, ArchSpec

Feeds = dict[str, NDArray]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LEAST_WIDTH = 8  # sequences are padded to powers of two from here on
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Lane:
    """What runs on one profile go through."""

    context: ProfileContext
    staging: Staging


class TrtEncoderSession:
    """Implements ``accel.engines.session.EncoderSession``; thread-safe: calls take turns on the GPU.

    A batch whose outputs would take more than ``OUTPUT_BYTES`` runs in parts; a single row that does gets memory of its
    own for the run.
    """

    def __init__(self, engine: LoadedEngine, arch: ArchSpec, variant: str, command: str = "accel build") -> None:
        """Reserves inputs for the largest run of every profile, and outputs within ``OUTPUT_BYTES``.

        Args:
            engine: Closed with the session, or when this raises.
            variant: Its name, for ``info``.
            command: What builds this engine, for errors.

        Raises:
            EngineUnavailableError: The engine is not of this model.
            DeviceMemoryError: The GPU's memory does not hold them.
        """
        self._engine, self._device = engine, engine.device
        self._command, self._longest = command, arch.max_positions
        self._lifetime = Lifetime("encoder")
        self._broken: EngineBrokenError | None = None
        self._lanes: dict[int, _Lane] = {}
        self._buffers: OutputBuffers | None = None
        flavour = engine.flavour
        self.info = EngineInfo(flavour.target, flavour.version, f"cuda:{self._device.ordinal}", variant, 1)
        try:
            self._inputs, outputs = check_encoder(engine, arch)
            self._layout = OutputLayout(arch.task, {name: engine.tensors[name].shape for name in outputs})
            with self._device, engine.guard("opening the encoder"):
                self._allocate()
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Feeds) -> Feeds:
        """Runs one batch, in several runs if it has more rows than a profile takes.

        Args:
            feeds: ``input_ids`` int64 [B, S], and as the engine has them ``attention_mask`` and
                ``token_type_ids``. Without a mask, all tokens are real; without types, all are 0.

        Returns:
            The outputs by name, float32; arrays of their own.

        Raises:
            InputError: A feed that the model does not take, or of another shape or dtype.
            EngineError: Closed, or used after a fork.
            UncoveredError: No profile covers the batch's width; names the command that builds a longer one.
            DeviceMemoryError: A single row's outputs take more than is reserved, and more than is free.
            EngineBrokenError: TensorRT or CUDA failed; nothing runs on this session again.
        """
        self._lifetime.check()
        if self._broken is not None:
            raise self._broken
        feeds = self._complete(feeds)
        batch, width = feeds["input_ids"].shape
        most = self._most_rows(width)
        try:
            with self._device, self._engine.guard(f"encoder batch [{batch}, {width}]"):
                parts = [
                    self._run({name: array[start : start + most] for name, array in feeds.items()})
                    for start in range(0, batch, most)
                ]
        except EngineBrokenError as error:
            self._broken = error
            raise
        return parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}

    def warm_up(self) -> None:
        """Runs every batch and width of every profile once, so that kernels are compiled, and keeps them."""
        for profile in self._engine.profiles:
            for rows in sizes(profile, 0):
                for width in sizes(profile, 1, LEAST_WIDTH):
                    self.run({"input_ids": np.zeros((rows, width), np.int64)})
        self._engine.save_kernels()

    def close(self) -> None:
        """Frees the engine. Safe to call twice; in a fork it leaves the GPU alone."""
        if not self._lifetime.close() or self._lifetime.forked:
            return
        try:
            with self._device:
                if self._broken is None:
                    self._device.synchronize()
                    self._engine.save_kernels()
                for lane in self._lanes.values():
                    lane.context.close()
                    lane.staging.close()
                if self._buffers is not None:
                    self._buffers.close()
                self._engine.close()
        except EngineError as error:  # a broken device frees nothing: the process's end does
            _log.warning("closing the encoder: %s", error)
        self._lanes, self._buffers = {}, None

    def _allocate(self) -> None:
        profiles = self._engine.profiles
        self._reserved = self._layout.reserved(profile.ranges for profile in profiles)
        self._buffers = OutputBuffers(self._device, self._layout, self._reserved)
        for profile in profiles:
            context = self._engine.context(profile, fixed=False)
            self._lanes[profile.index] = _Lane(context, Staging(self._device, profile, self._inputs))

    def _complete(self, feeds: Feeds) -> Feeds:
        """Checks the feeds and fills in those that are missing."""
        have = ", ".join(self._inputs)
        ids = feeds.get("input_ids")
        if ids is None or ids.ndim != 2 or 0 in ids.shape:
            raise InputError("input_ids must be there, of shape [B, S], not empty", where="input_ids")
        for name, array in feeds.items():
            if name not in self._inputs:
                raise InputError(f"this model takes no {name}", where=name, remedy=f"It takes {have}")
            if array.shape != ids.shape or array.dtype != np.int64:
                what = f"{name} must be int64 {list(ids.shape)}, not {array.dtype} {list(array.shape)}"
                raise InputError(what, where=name)
        missing = {name: np.full(ids.shape, name == "attention_mask", np.int64) for name in self._inputs}
        return {**missing, **feeds}

    def _most_rows(self, width: int) -> int:
        """Rows of the largest run of this width whose outputs fit, or of the smallest one where none fits.

        Raises:
            EngineError: No profile takes the width.
        """
        most = []
        for profile in self._engine.profiles:
            length = next((length for length in self._lengths(profile, width) if length >= width), None)
            if length is not None:
                batches = sizes(profile, 0)
                most.append(max([b for b in batches if self._layout.size(b, length) <= self._reserved] or batches[:1]))
        if not most:
            raise self._too_long(width)
        return max(most)

    def _too_long(self, width: int) -> UncoveredError:
        """The error of rows that no profile takes."""
        _, (_, best), (rows, _) = self._engine.profiles[-1].ranges["input_ids"]
        ranges = f"batch: {{min: 1, opt: {rows}, max: {rows}}}, sequence: {{min: 1, opt: {best}, max: {self._longest}}}"
        file = f"encode: {{{ranges}}} in FILE"
        remedy = f"Build an engine for longer rows: {self._command} --profiles FILE, with {file}"
        return not_covered(self._engine, f"sequence {width}", remedy)

    def _lengths(self, profile: Profile, width: int) -> list[int]:
        """What rows of a width may be padded to on a profile, ascending."""
        low, _, high = (shape[1] for shape in profile.ranges["input_ids"])
        if self._may_pad:
            return sizes(profile, 1, LEAST_WIDTH)
        return [width] if low <= width <= high else []

    @property
    def _may_pad(self) -> bool:
        return "attention_mask" in self._inputs

    def _pad_to(self, rows: int, width: int) -> tuple[Profile, int, int]:
        """The padded shape of fewest tokens, and its profile."""
        found = [
            (batch * length, profile.tokens, profile.index, profile, batch, length)
            for profile in self._engine.profiles
            for batch in sizes(profile, 0)
            for length in self._lengths(profile, width)
            if batch >= rows and length >= width
        ]
        if not found:
            raise self._too_long(width)
        *_, profile, batch, length = min(found, key=lambda entry: entry[:3])
        return profile, batch, length

    def _run(self, feeds: Feeds) -> Feeds:
        rows, width = feeds["input_ids"].shape
        profile, batch, length = self._pad_to(rows, width)
        lane = self._lanes[profile.index]
        padded = {name: np.zeros((batch, length), np.int64) for name in self._inputs}
        for name, array in padded.items():
            array[:rows, :width] = feeds[name]
        if self._may_pad:
            padded["attention_mask"][rows:, 0] = 1  # a row that sees no key at all would be NaN
        lane.staging.send(padded)
        for name in self._inputs:
            lane.context.set_shape(name, (batch, length))
            lane.context.set_address(name, lane.staging.addresses[name])
        assert self._buffers is not None, "it is open"
        with self._buffers.addresses(batch, length) as addresses:
            for name, address in addresses.items():
                lane.context.set_address(name, address)
            lane.context.prepare()
            lane.context.enqueue()
            return self._fetch(self._buffers, addresses, rows, width, length)

    def _fetch(self, buffers: OutputBuffers, addresses: dict[str, int], rows: int, width: int, length: int) -> Feeds:
        """The outputs, cut back to the caller's rows and tokens."""
        shapes = self._layout.shapes(rows, length)  # the caller's rows come first
        found = {name: buffers.fetch(address, shapes[name]) for name, address in addresses.items()}
        if not self._layout.per_token or width == length:
            return found
        return {name: np.ascontiguousarray(array[:, :width]) for name, array in found.items()}


def check_encoder(engine: LoadedEngine, arch: ArchSpec) -> tuple[list[str], list[str]]:
    """Checks that the engine is one of this model's task; returns its inputs and outputs.

    Raises:
        EngineUnavailableError: It is not.
    """
    remedy = "Build it again from this bundle"
    unknown = sorted(set(engine.inputs) - set(INPUTS))
    wrong = [name for name in engine.inputs if len(engine.tensors[name].shape) != 2]
    if unknown or wrong or "input_ids" not in engine.inputs:
        what = f"the engine is of another model: it takes {', '.join(engine.inputs)}"
        raise EngineUnavailableError(what, where="inputs", remedy=remedy)
    missing = [name for name in OUTPUT_NAMES[arch.task] if name not in engine.outputs]
    other = [name for name in engine.outputs if engine.tensors[name].dtype != "float32"]
    hidden = engine.tensors.get("last_hidden_state")
    narrow = hidden is not None and hidden.shape[-1] != arch.hidden_size
    if missing or other or narrow:
        what = f"the engine is of another model: it puts out {', '.join(engine.outputs)}"
        raise EngineUnavailableError(what, where="outputs", remedy=remedy)
    return engine.inputs, engine.outputs


__all__ = ["TrtEncoderSession", "check_encoder"]
