"""Decoder session: the cache on the device, a decode step as one graph, and the next step on its way already."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accel_kernels.launches import SHORT_PAST
from accel_kernels.sample import MAX_VOCAB
from numpy.typing import NDArray

from accel.engines.capturing import undisturbed
from accel.engines.cuda.attention import CachedAttention, StepTensors
from accel.engines.cuda.buckets import power_of_two, token_bucket
from accel.engines.cuda.contest import Contest
from accel.engines.cuda.device import Device, is_full
from accel.engines.cuda.executor import Executor
from accel.engines.cuda.operator_times import PhaseTimes, drawn_tokens, time_operators
from accel.engines.cuda.products import Products
from accel.engines.cuda.program import load_program
from accel.engines.cuda.staging import DecodePlace, PackedPlace
from accel.engines.cuda.step_halves import Left, halved_draws, halves, joined
from accel.engines.kv_cache import CacheShape
from accel.engines.lifetime import Lifetime
from accel.engines.session import ChosenTokens, Draws, EngineInfo, StepInputs
from accel.errors import BundleError
from accel.spec import ArchSpec

NAME = "cuda"
CHUNK = 8192  # prompt tokens of a step: enough to fill the GPU
_LEAST_TOKENS = 64  # a step that does not fit in memory is halved down to this
_STEPS_UNTIL_MORE = 256  # that fitted, before more tokens are tried again
_PLACES = 64  # of steps of several tokens, recorded at most; the least recently used goes
_log = logging.getLogger("accel")


class CudaDecoderSession:
    """Implements ``accel.engines.session.DecoderSession`` on the bundle's ``cuda`` graph.

    A step in which every row brings one token replays a graph of its batch size, one for best tokens and one for drawn
    ones. While the host looks at a step's tokens, the device computes the step behind it, as if every row went on with
    its token: when the next step asks for that, it is done or under way. What no row asks for has written one slot
    behind each row's end, where the row's next token goes.

    Args:
        path: The graph; its weights lie beside it.
        arch: The bundle's.
        variant: Its name.
        shape: Of the cache.
        device: Where to run.
        dtype: Of weights that are floats, and of what is computed; of the cache unless the graph says 8 bits.
        kept: Where it is kept which kernels are fastest; None: in this user's cache.

    Raises:
        BundleError: The file is no such graph.
        CapacityError: Weights and cache do not fit.
    """

    mixed_steps = True
    chunk = CHUNK

    def __init__(
        self, path: Path, arch: ArchSpec, variant: str, shape: CacheShape, device: Device, dtype: torch.dtype,
        kept: Path | None = None,
    ) -> None:  # fmt: skip
        self.info = EngineInfo(NAME, device.version, device.title, variant, 1)
        self.max_batch, self.capacity, self.vocab_size = shape.rows, shape.capacity, arch.vocab_size
        self._device, self._lifetime = device, Lifetime("decoder")
        if arch.vocab_size > MAX_VOCAB:  # then the host draws
            self.sample = None  # type: ignore[method-assign,assignment]
        with device.at_work("loading"):
            program = load_program(path, device.torch, dtype)
            nodes = [node for node in program.nodes if node.op_type == "CachedAttention"]
            if len(nodes) != len(arch.layers):
                what = f"The graph has {len(nodes)} attention layers, the model {len(arch.layers)}"
                raise BundleError(what, where=path.name, remedy="Quantize the bundle again")
            sizes = [(shape.rows, layer.kv_heads, shape.capacity, layer.head_dim) for layer in arch.layers]
            made = {"dtype": program.cache_type, "device": device.torch}
            self._caches = [(torch.zeros(size, **made), torch.zeros(size, **made)) for size in sizes]
            products = Products(dtype, device.tensor_memory, Contest(device, kept), warp_jobs=device.warp_jobs)
            attention = CachedAttention(dict(zip(nodes, self._caches, strict=True)), products)
            self._executor = Executor(program, products, attention)
        self._decodes: dict[tuple[int, bool], DecodePlace] = {}
        self._current: DecodePlace | None = None  # whose steps may be under way
        self._packed: OrderedDict[tuple[int, int, int], PackedPlace] = OrderedDict()
        self._most_tokens: int | None = None  # of a step, once more did not fit in memory
        self._fitted = 0  # steps since

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Runs one packed step; see ``DecoderSession.step``.

        Raises:
            EngineError: The session is closed or was forked; the device ran out of memory.
            EngineBrokenError: The device failed.
        """
        return self._run(inputs, PackedPlace.logits, DecodePlace.logits, ahead=False)

    def greedy(self, inputs: StepInputs) -> ChosenTokens:
        """As ``step``, but returns each wanted position's best token and leaves the logits on the device.

        Raises:
            EngineError, EngineBrokenError: see ``step``.
        """
        return self._run(inputs, PackedPlace.greedy, DecodePlace.tokens)

    def sample(self, inputs: StepInputs, draws: Draws) -> ChosenTokens:
        """As ``greedy``, with tokens drawn as ``draws`` says; the step behind is drawn with its second numbers.

        Raises:
            EngineError, EngineBrokenError: see ``step``.
        """
        return self._run(inputs, PackedPlace.sampled, DecodePlace.tokens, draws)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See ``DecoderSession.copy_row``."""

        def copy() -> None:
            for pair in self._caches:
                for cache in pair:
                    cache[target, :, :length] = cache[source, :, :length]

        self._lifetime.check()
        with self._device.at_work("copying a row"):
            self._forget()
            undisturbed(copy)

    def cache_pointers(self) -> list[tuple[int, int]]:
        """Addresses of each layer's key and value buffer; they never change."""
        return [(keys.data_ptr(), values.data_ptr()) for keys, values in self._caches]

    def operator_times(self, rows: int, prompt: int, past: int) -> tuple[PhaseTimes, PhaseTimes]:
        """Where the time of a prompt's step and of a decode step goes, on the device. The cache is written to.

        Args:
            rows: Sequences of a step; at most ``max_batch``.
            prompt: Tokens that each brings, at least 2.
            past: Positions that a decode step finds in each row.

        Raises:
            EngineError, EngineBrokenError: See ``step``.
        """
        self._lifetime.check()
        place = self._device.torch
        self._forget()
        with self._device.at_work("decoder step"):
            zeros = torch.zeros(rows, dtype=torch.int32, device=place)
            index = torch.arange(rows * prompt, dtype=torch.int32, device=place)
            slots, starts = index % prompt, torch.arange(rows, dtype=torch.int32, device=place) * prompt
            step = StepTensors(zeros, starts, starts + prompt, index // prompt, slots, prompt)
            ids = drawn_tokens((rows * prompt,), self.vocab_size, self._device)
            feeds = {"input_ids": ids, "position_ids": slots.long()}
            last = (starts + prompt - 1).long()
            mean, name = (prompt + 1) / 2, f"prompt {rows}x{prompt}"
            first = time_operators(name, self._executor, self._device, feeds, step, mean, last)
            lengths = zeros + past
            feeds = {"input_ids": ids[:rows], "position_ids": lengths.long()}
            step = StepTensors(lengths, long_past=past >= SHORT_PAST)
            name = f"token, batch {rows}"
            return first, time_operators(name, self._executor, self._device, feeds, step, past + 1)

    def close(self) -> None:
        """Frees the device's memory. Safe to call twice."""
        if self._lifetime.close() and not self._lifetime.forked:
            with suppress(Exception):  # a device that failed waits for nothing
                self._device.synchronize()  # a step that ran ahead writes to page-locked memory that others get next
            self._drop_places()
            self._caches.clear()
            del self._executor
            with suppress(Exception):
                self._device.release()

    def _decode_place(self, inputs: StepInputs) -> DecodePlace:
        rows = inputs.rows or int(np.flatnonzero(inputs.query_lengths)[-1]) + 1
        size = min(power_of_two(rows), self.max_batch)
        long_past = self.capacity > SHORT_PAST and int(inputs.past_lengths[:rows].max()) >= SHORT_PAST
        key = size, long_past
        if key not in self._decodes:
            self._decodes[key] = DecodePlace(*key, self._device, self._executor)
        if self._current is not self._decodes[key]:
            self._forget()
            self._current = self._decodes[key]
        return self._current

    def _forget(self) -> None:
        """The cache is about to be written to otherwise: what ran ahead may have seen a row's last sequence."""
        if self._current is not None:
            self._current.forget()

    def _run(
        self, inputs: StepInputs, several: Callable[..., Left], single: Callable[[DecodePlace, StepInputs], Left],
        draws: Draws | None = None, ahead: bool = True,
    ) -> Left:  # fmt: skip
        """Runs a step; once more, if another thread's capture came between.

        Args:
            inputs: The step.
            several, single: What of a place runs it or reads its results, see ``_several`` and ``_single``.
            draws: How tokens are drawn, where they are.
            ahead: Whether the step behind may run too.
        """

        def run() -> Left:
            if is_decode(inputs):
                return self._single(inputs, single, draws, ahead)
            return self._several(inputs, several, draws)

        self._lifetime.check()
        with self._device.at_work("decoder step"):
            return undisturbed(run, self._make_room)

    def _single(
        self, inputs: StepInputs, read: Callable[[DecodePlace, StepInputs], Left], draws: Draws | None, ahead: bool
    ) -> Left:
        """Runs a step of one token per row; once more, if memory was full, when what was recorded has made room."""

        def run() -> Left:
            place = self._decode_place(inputs)
            place.start(inputs, self.capacity, ahead, draws)
            return read(place, inputs)

        try:
            return run()
        except Exception as error:  # while it is handled, it holds what the run had made
            if not is_full(error):
                raise
        self._make_room()
        return run()

    def _several(self, inputs: StepInputs, read: Callable[..., Left], draws: Draws | None) -> Left:
        """Runs a step of several tokens per row; one that does not fit in memory in halves, one after the other.

        Args:
            inputs: The step.
            read: What of a place runs it, and what of its results is wanted.
            draws: How tokens are drawn, where they are.

        Raises:
            RuntimeError: Not even a few tokens fit; see ``is_full``.
        """
        count = len(inputs.input_ids)
        if self._most_tokens is None or count <= self._most_tokens:
            try:
                return self._whole(inputs, read, draws)
            except Exception as error:  # while it is handled, it holds what the run had made
                if not is_full(error):
                    raise
            self._make_room()
            if count < 2 * _LEAST_TOKENS:
                return self._whole(inputs, read, draws)
            self._most_tokens, self._fitted = (count + 1) // 2, 0
            _log.warning("the GPU's memory is full: steps have %d tokens at most from now on", self._most_tokens)
        first, second = halves(inputs)
        drawn = (None, None) if draws is None else halved_draws(draws, len(first.logits_positions))
        return joined(self._several(first, read, drawn[0]), self._several(second, read, drawn[1]))

    def _whole(self, inputs: StepInputs, read: Callable[..., Left], draws: Draws | None) -> Left:
        left = read(self._packed_place(inputs), inputs, *([] if draws is None else [draws]))
        self._note_fitted()
        return left

    def _note_fitted(self) -> None:
        """Memory that was full may be free again: after some steps twice as many tokens are tried."""
        if self._most_tokens is None:
            return
        self._fitted += 1
        if self._fitted >= _STEPS_UNTIL_MORE:
            self._fitted, more = 0, 2 * self._most_tokens
            self._most_tokens = more if more < CHUNK else None

    def _make_room(self) -> None:
        """Drops what was recorded, all of it, as recordings share their memory; steps record it anew."""
        self._device.synchronize()  # a step that ran ahead may be under way
        self._drop_places()
        self._device.pool = None
        self._device.release()

    def _drop_places(self) -> None:
        self._current = None
        self._decodes.clear()
        self._packed.clear()

    def _packed_place(self, inputs: StepInputs) -> PackedPlace:
        self._forget()
        sizes = int(inputs.query_lengths.max()), len(inputs.logits_positions)
        longest, wanted = (power_of_two(max(1, size)) for size in sizes)
        key = token_bucket(len(inputs.input_ids)), longest, wanted
        if key not in self._packed:
            if len(self._packed) >= _PLACES:
                self._packed.popitem(last=False)
            self._packed[key] = PackedPlace(*key, self.max_batch, self._device, self._executor)
        self._packed.move_to_end(key)
        return self._packed[key]


def is_decode(inputs: StepInputs) -> bool:
    """Whether every row that takes part brings one token, whose logits are wanted."""
    width = inputs.width or int(inputs.query_lengths.max())
    return width == 1 and len(inputs.logits_positions) == len(inputs.input_ids)


__all__ = ["CHUNK", "NAME", "CudaDecoderSession"]
