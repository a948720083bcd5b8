"""Scales of a rounded KV cache, from the keys and values that calibration text leaves in a float32 cache.

Scales per channel must hold at every position. Text of some hundred tokens shows the slowly turning channels of keys
over a part of their turn only; what lies in one of a pair there lies in the other one later on. So each key counts at
positions spread over all that the model covers: it is turned on by the steps between.

    8 bits, integers or floats: the largest magnitude times ``HEADROOM``, so that other text is not cut off.
    4 bits: of keys, the scale that loses least in the mean square; of values, the largest magnitude (what is cut off
        adds up over the tokens that attention averages, what is rounded does not).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import SessionOptions, StepInputs
from accel.errors import CheckpointError, EngineUnavailableError, InputError
from accel.graph.rotation import KeyRotation, key_rotations
from accel.kv_quantization import KvQuantization, check_bits
from accel.quantized_tensor import FLOAT8_MAX
from accel.spec import ArchSpec

MIN_TOKENS = 256
MAX_TOKENS = 16384  # more changes little
SPREAD = 16  # positions at which each key counts
HEADROOM = 1.25  # of 8 bits: costs a third of a bit
RATIOS = np.linspace(1.0, 0.4, 25)  # of the largest magnitude, tried as the last one that is not cut off
SAMPLES = 512  # keys per layer that scales are tried on
CHUNK = 512  # tokens of a step
Values = NDArray[np.float32]
_log = logging.getLogger("accel")


def calibrate_cache(
    bundle: Bundle,
    canonical: ir.Model,
    samples: Sequence[NDArray[np.int64]],
    bits: int,
    *,
    float8: bool = False,
    per_channel: bool = True,
    advance: Callable[[int], None] | None = None,
) -> KvQuantization:
    """Runs samples through the fp32 engine and takes the scales from what its caches hold.

    Where that engine cannot run (ONNX Runtime's wheel for GPUs has not its kernels), PyTorch evaluates the canonical
    graph instead.

    Args:
        bundle: A decoder's, with its fp32 graph for ``ort-cpu``.
        canonical: Its canonical graph, which says how keys turn; left as it is.
        samples: Token ids, int64 [n] each, one sequence each; at most ``MAX_TOKENS`` in all are read.
        bits: 8 or 4.
        float8: Whether the cache holds 8-bit floats.
        per_channel: One scale per channel of each head; otherwise one per layer for keys and one for values.
        advance: Called with the number of tokens of each step.

    Raises:
        InputError: No decoder, other bits, ids of the wrong form or outside of the vocabulary, or fewer than
            ``MIN_TOKENS``.
        CheckpointError: Keys or values are no finite numbers.
    """
    arch = bundle.manifest.arch
    if arch.kind != "decoder":
        raise InputError("an encoder has no KV cache", where="kv")
    check_bits(bits, float8)
    rows = _checked(samples, arch)
    rotations = key_rotations(canonical, arch.max_positions)
    highest = FLOAT8_MAX if float8 else float((1 << bits - 1) - 1)
    statistics = [_Layer(rotation, arch.max_positions, bits, highest, per_channel) for rotation in rotations]
    session = _open(bundle, canonical, max(map(len, rows)))
    stride = max(1, sum(map(len, rows)) // SAMPLES)
    try:
        for row in rows:
            for inputs in _steps(row):
                session.step(inputs)
                if advance is not None:
                    advance(len(inputs.input_ids))
            held = session.read_row(0, len(row))
            for index, layer in enumerate(statistics):
                layer.see(held[f"{index}.key"], held[f"{index}.value"], stride, f"layer {index}")
    finally:
        session.close()
    keys, values = zip(*(layer.scales() for layer in statistics), strict=True)
    found = KvQuantization(bits, keys, values, float8)
    found.check(arch)
    return found


def _open(bundle: Bundle, canonical: ir.Model, capacity: int) -> Any:
    """A session of one row in float32 that tells what its cache holds."""
    options = SessionOptions(capacity=capacity, max_batch=1)
    try:
        return open_session(bundle, "cpu", engine="ort-cpu", variant="fp32", options=options).session
    except EngineUnavailableError as error:
        _log.info("The cache is calibrated with PyTorch: %s", error.what)
        from accel.graph.evaluation.sessions import PackedDecoder
        from accel.graph.evaluation.torch_graph import TorchGraph

        return PackedDecoder(TorchGraph(canonical).run, bundle.manifest.arch, 1, capacity)


def _checked(samples: Sequence[NDArray[np.int64]], arch: ArchSpec) -> list[NDArray[np.int64]]:
    """Samples within the model's positions, up to ``MAX_TOKENS``."""
    rows, total = [], 0
    for index, sample in enumerate(samples):
        row = np.asarray(sample)
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            what = f"a sample is {row.dtype} {list(row.shape)}, not a sequence of token ids"
            raise InputError(what, where=f"calibration sample {index}")
        if len(row) and not (row.min() >= 0 and row.max() < arch.vocab_size):
            what = f"token ids reach from {row.min()} to {row.max()}, the vocabulary from 0 to {arch.vocab_size - 1}"
            raise InputError(what, where=f"calibration sample {index}", remedy="Use this model's tokenizer")
        row = row[: min(arch.max_positions, MAX_TOKENS - total)].astype(np.int64)
        total += len(row)
        if len(row):
            rows.append(row)
    if total < MIN_TOKENS:
        what = f"the calibration text has {total} tokens; a cache's scales need at least {MIN_TOKENS}"
        raise InputError(what, where="calibration", remedy="Give more text")
    return rows


def _steps(row: NDArray[np.int64]) -> Iterator[StepInputs]:
    for start in range(0, len(row), CHUNK):
        part = row[start : start + CHUNK]
        positions = np.arange(start, start + len(part))
        lengths, past = np.array([len(part)], np.int32), np.array([start], np.int32)
        yield StepInputs(part, positions, lengths, past, np.zeros(0, np.int64))


class _Layer:
    """What is known of one layer's keys and values."""

    def __init__(
        self, rotation: KeyRotation | None, positions: int, bits: int, highest: float, per_channel: bool
    ) -> None:
        self._rotation, self._positions, self._bits, self._per_channel = rotation, positions, bits, per_channel
        self._highest = highest  # of the numbers that a scale multiplies
        self._largest: list[Values | None] = [None, None]  # of keys and values, [KV, D]
        self._kept: list[Values] = []  # some keys [KV, n, D], each turned on

    def see(self, keys: Values, values: Values, stride: int, where: str) -> None:
        """Takes in one sequence's keys and values [KV, L, D]; every ``stride``-th key is kept where that is needed."""
        if not (np.isfinite(keys).all() and np.isfinite(values).all()):
            what = "keys or values of the calibration text are NaN or infinite"
            raise CheckpointError(what, where=where, remedy="The checkpoint's weights are damaged")
        for index, held in enumerate((keys, values)):
            for turned in self._turned(held) if index == 0 else (held,):
                largest = np.abs(turned).max(axis=1)
                known = self._largest[index]
                self._largest[index] = largest if known is None else np.maximum(known, largest)
        if self._bits == 4:
            self._kept += list(self._turned(keys[:, ::stride]))

    def _turned(self, keys: Values) -> Iterator[Values]:
        """The keys as they are, and as they would be further on."""
        yield keys
        if self._rotation is not None:
            room = self._positions - keys.shape[1]
            for steps in sorted({room * number // SPREAD for number in range(1, SPREAD + 1)} - {0}):
                yield self._rotation.turn(keys, steps)

    def scales(self) -> tuple[Values, Values]:
        """Of keys and of values."""
        highest = self._highest
        keys, values = (_shared(largest, self._per_channel) for largest in self._largest if largest is not None)
        if self._bits == 8:
            return tuple(_positive(HEADROOM * largest / highest) for largest in (keys, values))  # type: ignore[return-value]
        samples = np.concatenate(self._kept, axis=1).transpose(0, 2, 1)  # [KV, D, n]
        if not self._per_channel:
            samples = samples.reshape(1, -1)
        return _positive(_least_square(samples, keys / highest, highest)), _positive(values / highest)


def _shared(largest: Values, per_channel: bool) -> Values:
    return largest if per_channel else largest.max(keepdims=True).reshape(1)


def _positive(scales: NDArray) -> Values:
    """A channel that is always 0 gets a scale all the same."""
    return np.where(scales > 0, scales, 1).astype(np.float32)


def _least_square(samples: Values, scales: NDArray, highest: float) -> NDArray:
    """The scale [...] among ``RATIOS`` times ``scales`` that loses least on the samples [..., n]."""
    best, least = scales, np.full(scales.shape, np.inf)
    for ratio in RATIOS:
        step = np.maximum(scales * ratio, np.finfo(np.float32).tiny)[..., None]
        lost = np.square(np.clip(np.rint(samples / step), -highest - 1, highest) * step - samples).mean(axis=-1)
        best, least = np.where(lost < least, scales * ratio, best), np.minimum(least, lost)
    return best


__all__ = ["HEADROOM", "MAX_TOKENS", "MIN_TOKENS", "calibrate_cache"]
