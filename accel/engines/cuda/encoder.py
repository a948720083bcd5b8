"""Encoder session: one recorded graph per shape, which computes no padding where that pays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from accel.engines.capturing import undisturbed
from accel.engines.cuda.attention import StepTensors
from accel.engines.cuda.buckets import power_of_two, token_bucket
from accel.engines.cuda.contest import Contest
from accel.engines.cuda.device import Device, is_full
from accel.engines.cuda.executor import Executor
from accel.engines.cuda.operator_times import PhaseTimes, drawn_tokens, time_operators
from accel.engines.cuda.products import Products
from accel.engines.cuda.program import Program, load_program
from accel.engines.cuda.replay import Replay
from accel.engines.cuda.unpadded import Layout, TokenPlan, plan_tokens, run_unpadded
from accel.engines.lifetime import Lifetime
from accel.engines.session import EngineInfo
from accel.errors import BundleError, UncoveredError
from accel.spec import ArchSpec

NAME = "cuda"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_LENGTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # a row is padded up to one of these, or a multiple of 256
_MOST_ROWS = 64  # up to which a power of two is taken; behind them a multiple of 256
_SHAPES = 128  # recorded at most; the least recently used goes
_KEPT_BYTES = 1 << 30  # of their results, likewise: as many as were kept before the last one

Feeds = dict[str, NDArray]


class CudaEncoderSession:
    """Implements ``accel.engines.session.EncoderSession`` on the bundle's ``cuda`` graph. Thread-safe.

    Args:
        path: The graph; its weights lie beside it.
        arch: The bundle's.
        variant: Its name.
        device: Where to run.
        dtype: Of the weights.
        kept: Where it is kept which kernels are fastest; None: in this user's cache.

    Raises:
        BundleError: The file is no such graph.
        EngineError: The weights do not fit.
    """

    def __init__(
        self, path: Path, arch: ArchSpec, variant: str, device: Device, dtype: torch.dtype, kept: Path | None = None
    ) -> None:
        self.info = EngineInfo(NAME, device.version, device.title, variant, 1)
        self._device, self._longest, self._vocab_size = device, arch.max_positions, arch.vocab_size
        with device.at_work("loading"):
            program = load_program(path, device.torch, dtype)
            self._inputs = [value.name or "" for value in program.inputs]
            if set(self._inputs) - set(INPUTS):
                what = f"The graph takes {', '.join(self._inputs)}"
                raise BundleError(what, where=path.name, remedy="Quantize the bundle again")
            products = Products(dtype, device.tensor_memory, Contest(device, kept), warp_jobs=device.warp_jobs)
            self._executor, self._plan = Executor(program, products), plan_tokens(program)
            self._per_token = per_token_outputs(program)
        self._places: OrderedDict[tuple[int, int, int | None], _Place] = OrderedDict()
        self._lock, self._lifetime = threading.Lock(), Lifetime("encoder")

    def run(self, feeds: Feeds) -> Feeds:
        """Runs one batch; see ``EncoderSession.run``.

        Raises:
            EngineError: The session is closed or was forked, or the device's memory is full.
            EngineBrokenError: The device failed.
            UncoveredError: A mask with holes, or with padding in front.
        """
        self._lifetime.check()
        ids = feeds["input_ids"]
        rows, width = ids.shape
        mask = feeds.get("attention_mask")
        lengths = np.full(rows, width) if mask is None else _lengths(mask)
        shape = self._shape(rows, width, int(lengths.sum()))

        def run() -> Feeds:
            return self._place(*shape).run(feeds, rows, width, lengths)

        with self._lock, self._device.at_work("encoder run"):
            try:
                return undisturbed(run, self._make_room)
            except Exception as error:  # while it is handled, it holds what the run had made
                if not is_full(error):
                    raise
            self._make_room()
            return run()

    def operator_times(self, rows: int, width: int) -> PhaseTimes:
        """Where a forward's time goes: ``rows`` full rows of ``width`` tokens, on the device.

        Raises:
            EngineError, EngineBrokenError: See ``run``.
        """
        self._lifetime.check()
        place = self._device.torch
        feeds = {name: torch.ones(rows, width, dtype=torch.int64, device=place) for name in self._inputs}
        feeds["input_ids"] = drawn_tokens((rows, width), self._vocab_size, self._device)
        if "token_type_ids" in feeds:
            feeds["token_type_ids"].zero_()
        starts = torch.arange(rows, dtype=torch.int32, device=place) * width
        step = StepTensors(starts, starts, starts + width, longest=width, room=width)
        with self._lock, self._device.at_work("encoder run"):
            return time_operators(f"forward {rows}x{width}", self._executor, self._device, feeds, step, width)

    def close(self) -> None:
        """Frees the device's memory. Safe to call twice."""
        if self._lifetime.forked:  # the lock may be held by a thread that is not here
            return
        with self._lock:
            if self._lifetime.close():
                self._places.clear()
                del self._executor
                with suppress(Exception):  # a device that failed gives nothing back
                    self._device.release()

    def _make_room(self) -> None:
        """Drops what was recorded, all of it, as recordings share their memory; runs record it anew."""
        self._device.synchronize()
        self._places.clear()
        self._device.pool = None
        self._device.release()

    def _shape(self, rows: int, width: int, real: int) -> tuple[int, int, int | None]:
        """Rows, their width, and how many tokens are computed; None: the padding too, since that costs as little."""
        rows = power_of_two(rows) if rows <= _MOST_ROWS else _multiple(rows)
        longest = next((length for length in _LENGTHS if length >= width), _multiple(width))
        width = min(longest, max(width, self._longest))
        tokens = token_bucket(max(1, real))
        return rows, width, tokens if self._plan is not None and tokens < token_bucket(rows * width) else None

    def _place(self, rows: int, width: int, tokens: int | None) -> _Place:
        shape = rows, width, tokens
        if shape not in self._places:
            kept = sum(place.bytes for place in self._places.values())
            while self._places and (len(self._places) >= _SHAPES or kept > _KEPT_BYTES):
                kept -= self._places.popitem(last=False)[1].bytes
            if not self._places:
                self._device.pool = None  # what is in it goes with the last recording
            self._places[shape] = self._make_place(*shape)
        self._places.move_to_end(shape)
        return self._places[shape]

    def _make_place(self, rows: int, width: int, tokens: int | None) -> _Place:
        plan = self._plan if tokens is not None else None
        return _Place(
            rows, width, tokens or 0, plan, self._inputs, self._per_token, self._device, self._executor
        )  # fmt: skip


class _Place:
    """A shape's inputs on the device, its recorded run, and what that leaves.

    Args:
        rows, width: B and W, of what is padded.
        tokens: T, which stand side by side; 0: padding stands between them.
        plan: Which values these are; None: none.
        inputs: Names.
        per_token: Names of the outputs that are [B, W, ...].
        device: Where they are.
        executor: Runs the program.
    """

    def __init__(
        self, rows: int, width: int, tokens: int, plan: TokenPlan | None, inputs: list[str], per_token: set[str],
        device: Device, executor: Executor,
    ) -> None:  # fmt: skip
        self._rows, self._width, self._executor, self._plan = rows, width, executor, plan
        self._names, self._per_token = inputs, per_token
        # The last three: each token's place, twice, see Layout; each row's start, then each one's stop, as int32.
        self._sizes = [rows * width] * len(inputs) + [tokens, tokens, rows]
        self._host = device.pinned(sum(self._sizes))
        self._parts = [part.numpy() for part in self._host.split(self._sizes)]
        self._inputs = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device.torch)
        self._replay = Replay(device, self._run)
        self._results: dict[str, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """That its results take on the device."""
        return sum(result.nbytes for result in self._results.values())

    def run(self, feeds: Feeds, rows: int, width: int, lengths: NDArray[np.int64]) -> Feeds:
        for name, part in zip(self._names, self._parts, strict=False):
            padded = part.reshape(self._rows, self._width)
            padded[:] = 0
            if name in feeds:
                padded[:rows, :width] = feeds[name]
            elif name == "attention_mask":
                padded[:rows, :width] = 1
        self._fill_ends(rows, lengths)
        self._inputs.copy_(self._host)
        self._replay.run()
        fetched = {}
        for name, result in self._results.items():
            part = result[:rows, :width] if name in self._per_token else result[:rows]
            fetched[name] = self._fetch(part.contiguous())
        if self._inputs.is_cuda:
            torch.cuda.current_stream(self._inputs.device).synchronize()
        return fetched

    def _fill_ends(self, rows: int, lengths: NDArray[np.int64]) -> None:
        tokens, places, ends = self._parts[-3:]
        starts, stops = ends.view(np.int32).reshape(2, self._rows)
        if self._plan is None:
            starts[:] = np.arange(self._rows) * self._width
            stops[:] = starts
            stops[:rows] += lengths
            return
        stops[:] = lengths.sum()
        stops[:rows] = lengths.cumsum()
        starts[0], starts[1:] = 0, stops[:-1]
        real = np.flatnonzero(np.arange(self._width) < lengths[:, None])
        tokens[: len(real)], tokens[len(real) :] = real, 0
        places[: len(real)], places[len(real) :] = real, self._rows * self._width

    def _fetch(self, part: torch.Tensor) -> NDArray:
        """What the caller wants of an output, on its way to page-locked memory that the caller keeps.

        PyTorch lends that memory anew when the caller has dropped it.
        """
        if not part.is_cuda:
            return part.numpy().copy()
        place = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        return place.copy_(part, non_blocking=True).numpy()

    def _run(self) -> None:
        *tensors, tokens, places, ends = self._inputs.split(self._sizes)
        feeds = {name: tensor.view(self._rows, self._width) for name, tensor in zip(self._names, tensors, strict=True)}
        starts, stops = ends.view(torch.int32).split(self._rows)
        step = StepTensors(starts, starts, stops, longest=self._width)
        if self._plan is None:
            step.room = self._width
            self._results = self._executor.run(feeds, step)
        else:
            layout = Layout(self._rows, self._width, tokens, places)
            self._results = run_unpadded(self._executor, self._plan, feeds, step, layout)


def per_token_outputs(program: Program) -> set[str]:
    """Names of an encoder's outputs that are [B, W, ...], like its ids; other sizes may happen to be W too."""
    ids = next(value for value in program.inputs if value.name == "input_ids")
    outputs = [value for value in program.outputs if value.shape is not None and len(value.shape) > 1]
    return {value.name or "" for value in outputs if ids.shape is not None and value.shape[1] == ids.shape[1]}


def _lengths(mask: NDArray) -> NDArray[np.int64]:
    """How many tokens of each row are real: the first ones."""
    lengths = mask.astype(bool).sum(1)
    if not np.array_equal(mask.astype(bool), np.arange(mask.shape[1]) < lengths[:, None]):
        what = "the cuda engine takes masks whose rows are ones and then zeros"
        raise UncoveredError(what, where="attention_mask", remedy="Pad on the right, or load with another engine")
    return lengths


def _multiple(size: int) -> int:
    return -(-size // 256) * 256


__all__ = ["CudaEncoderSession"]
