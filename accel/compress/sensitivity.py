"""Mixed precision: the layers that lose most are kept in a higher precision, as far as a budget reaches.

A layer's sensitivity is the relative squared error of its output, || y - y' ||^2 / || y ||^2, from the second moments
of the inputs it had when it was rounded (of its weights, where no text was looked at). Layers are raised in the order
of what they lose per byte that raising costs: from 4 bits to 8, from 8 to float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from accel.compress.layers import Layer
from accel.compress.likelihood import mean_log_likelihood, measured_samples
from accel.compress.passes import Work
from accel.compress.plan import FLOAT_BITS
from accel.compress.rtn import round_to_nearest
from accel.compress.weights import read_weight, weight_error
from accel.errors import InputError
from accel.graph.quantized import QuantizedWeight, quantized_of


@dataclass(frozen=True)
class Budget:
    """What a quantised model may take, or lose. None: no limit.

    Attributes:
        max_bytes: Of all weights together. As many layers are raised as fit.
        bits_per_weight: The same, in bits per parameter of the model.
        max_error: Of a layer's output, relative (Frobenius). Layers above it are raised.
        max_q_drop: Of Q = mean log p on the calibration text, for decoders. The fewest layers are raised that do.
    """

    max_bytes: int | None = None
    bits_per_weight: float | None = None
    max_error: float | None = None
    max_q_drop: float | None = None

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if limit is not None and not limit > 0:
                raise InputError(f"{name} is {limit}, and must be above zero", where="budget")

    def bytes_of(self, parameters: int) -> int | None:
        """The smaller of both sizes."""
        sizes = [] if self.max_bytes is None else [self.max_bytes]
        if self.bits_per_weight is not None:
            sizes.append(int(self.bits_per_weight * parameters / 8))
        return min(sizes, default=None)


@dataclass(frozen=True)
class Raise:
    """One layer in the next higher precision.

    Attributes:
        layer: Which.
        bits: Its new width.
        cost: Bytes more.
        gain: Relative squared error that goes.
    """

    layer: Layer
    bits: int
    cost: int
    gain: float


def candidates(work: Work) -> list[Raise]:
    """All layers that can be raised, those that lose most per byte first; ties in graph order."""
    found = []
    for layer in work.quantized:
        quantized = quantized_of(layer.weight)
        assert quantized is not None, layer.name
        gain = work.errors.get(layer.name, 0.0) ** 2
        if quantized.bits < 8:
            found.append(Raise(layer, 8, layer.parameters * (8 - quantized.bits) // 8, gain))
        else:
            found.append(Raise(layer, FLOAT_BITS, 4 * layer.parameters - quantized.nbytes, gain))
    return sorted(found, key=lambda item: -item.gain / item.cost)


def keep_worst(work: Work, budget: Budget, before: ir.Model) -> None:
    """Raises layers of a quantised graph in place; their choices, errors and notes follow.

    Args:
        work: All layers are rounded.
        budget: At least one limit.
        before: The model in float32.

    Raises:
        InputError: The scheme alone exceeds the size; the quality needs more than the size allows; nothing would be
            rounded; or there is nothing to measure Q on.
    """
    ordered = candidates(work)
    room = _room(work, budget, before)
    finer = {item.layer: _finer(work, item) for item in ordered}
    chosen = _chosen(work, ordered, finer, budget, room, before)
    by_size = budget.max_error is None and budget.max_q_drop is None
    if by_size and sum(item.bits == FLOAT_BITS for item in chosen) == len(work.quantized) > 0:
        what = "the size leaves every layer in float32: nothing would be rounded"
        raise InputError(what, where="budget", remedy="Give a lower limit, or none")
    for item in chosen:
        name = item.layer.name
        work.choices[name].bits = item.bits
        work.choices[name].note = f"raised: it lost {work.errors[name]:.2%} of its {work.error_of}"
        item.layer.weight.const_value = finer[item.layer]
        if item.bits == FLOAT_BITS:
            work.errors.pop(name)
            work.input_scales.pop(name, None)
        else:
            work.errors[name] = work.finer_errors[name]
    cost = sum(item.cost for item in chosen)
    work.notes.append(f"{len(chosen)} of {len(ordered)} layers raised to a higher precision, for {cost:,} bytes")


def _room(work: Work, budget: Budget, before: ir.Model) -> int | None:
    """Bytes that are left of a budget; None: there is no limit."""
    tensors = [value.const_value for value in before.graph.initializers.values() if value.const_value is not None]
    size = sum(tensor.nbytes for tensor in tensors)
    for layer in work.quantized:
        quantized = quantized_of(layer.weight)
        size -= 4 * layer.parameters - (quantized.nbytes if quantized is not None else 0)
    limit = budget.bytes_of(sum(tensor.size for tensor in tensors))
    if limit is not None and limit < size:
        remedy = "Raise the limit, or take a scheme of fewer bits or larger groups"
        raise InputError(f"the scheme alone takes {size:,} bytes, {limit:,} are allowed", where="budget", remedy=remedy)
    return None if limit is None else limit - size


def _finer(work: Work, item: Raise) -> ir.TensorProtocol:
    """The layer's weights in the next higher precision."""
    layer = item.layer
    tensor = work.floats[layer.name]
    if item.bits == FLOAT_BITS:
        return tensor
    rounded, coarse = quantized_of(layer.weight), layer.weight.const_value
    assert rounded is not None, layer.name
    layer.weight.const_value = tensor
    weight = read_weight(layer)
    layer.weight.const_value = coarse
    finer = round_to_nearest(weight, item.bits, rounded.group, name=layer.name)
    work.finer_errors.setdefault(layer.name, weight_error(weight, finer))
    return QuantizedWeight(finer, layer.transposed, layer.name)


def _chosen(
    work: Work,
    ordered: Sequence[Raise],
    finer: Mapping[Layer, ir.TensorProtocol],
    budget: Budget,
    room: int | None,
    before: ir.Model,
) -> list[Raise]:
    if budget.max_error is None and budget.max_q_drop is None:
        chosen, left = list[Raise](), room or 0
        for item in ordered:
            if item.cost <= left:
                chosen.append(item)
                left -= item.cost
        return chosen
    limit = float("inf") if budget.max_error is None else budget.max_error
    chosen = [item for item in ordered if item.gain > limit**2]
    if budget.max_q_drop is not None:
        rest = [item for item in ordered if item not in chosen]
        chosen += rest[: _fewest(work, chosen, rest, finer, budget.max_q_drop, before)]
    cost = sum(item.cost for item in chosen)
    if room is not None and cost > room:
        what = f"this quality takes {cost:,} bytes more than the scheme, and {room:,} are left"
        raise InputError(what, where="budget", remedy="Allow more bytes or a larger loss, or take a finer scheme")
    return chosen


def _fewest(
    work: Work,
    raised: Sequence[Raise],
    rest: Sequence[Raise],
    finer: Mapping[Layer, ir.TensorProtocol],
    max_drop: float,
    before: ir.Model,
) -> int:
    """How many of ``rest`` must be raised besides; found by halving, as more layers lose less."""
    if work.arch.kind != "decoder" or not work.samples:
        remedy = "Give calibration text, or max_error instead" if work.arch.kind == "decoder" else "Give max_error"
        raise InputError("there is no Q to measure", where="budget.max_q_drop", remedy=remedy)
    some, advance = measured_samples(work.samples), work.progress.advance
    work.progress.stage("Measuring mixed precisions", (1 + len(rest).bit_length()) * sum(map(len, some)))
    reference = mean_log_likelihood(before, work.arch, some, advance)
    coarse = {item.layer: item.layer.weight.const_value for item in [*raised, *rest]}
    low, high = 0, len(rest)
    while low < high:
        middle = (low + high) // 2
        for item in [*raised, *rest[:middle]]:
            item.layer.weight.const_value = finer[item.layer]
        drop = reference - mean_log_likelihood(work.model, work.arch, some, advance)
        for layer, tensor in coarse.items():
            layer.weight.const_value = tensor
        low, high = (low, middle) if drop <= max_drop else (middle + 1, high)
    return low


__all__ = ["Budget", "Raise", "candidates", "keep_worst"]
