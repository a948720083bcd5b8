"""Sampling as an ONNX function and in plain PyTorch: what ``sample`` is compared with."""

from __future__ import annotations

import torch

from accel_kernels.argmax import BEST
from accel_kernels.argmax import reference as best_tokens
from accel_kernels.bodies import HEADER

LEAST_TEMPERATURE = 1e-30  # what float32 can divide by; far below, all but the best token weigh nothing

BODY = (
    HEADER
    + """
Sample (logits, draws) => (ids, values)
{
"""
    + BEST
    + """
    zero_index = Constant <value_ints = [0]> ()
    temperature, top_k, top_p, min_p, uniform = Split <axis = 1, num_outputs = 5> (draws)
    zero = Constant <value_float = 0.0> ()
    double_zero = Cast <to = 11> (zero)
    is_hot = Greater (temperature, double_zero)
    is_infinite = IsInf (found)
    is_bad = Or (is_infinite, has_nan)
    is_good = Not (is_bad)
    is_drawn = And (is_hot, is_good)
    coldest = Constant <value_float = 1e-30> ()
    float_temperature = Cast <to = 1> (temperature)
    divisor = Max (float_temperature, coldest)
    differences = Sub (found, numbers)
    depths = Div (differences, divisor)
    heights = Neg (depths)
    float_weights = Exp (heights)
    all_weights = Cast <to = 11> (float_weights)
    width = Shape <start = 1, end = 2> (logits)
    one = Constant <value_ints = [1]> ()
    int_top_k = Cast <to = 7> (top_k)
    is_filter = Equal (int_top_k, zero_index)
    asked = Where (is_filter, width, int_top_k)
    many = Min (asked, width)
    place = Sub (many, one)
    descending, unread = TopK <axis = -1> (numbers, width)
    floor = GatherElements <axis = 1> (descending, place)
    is_near = GreaterOrEqual (numbers, floor)
    weights = Where (is_near, all_weights, double_zero)
    total = ReduceSum (weights, last)
    float_one = Constant <value_float = 1.0> ()
    double_one = Cast <to = 11> (float_one)
    share = Sub (double_one, top_p)
    spared = Mul (share, total)
    sorted_heights, order = TopK <axis = -1, largest = 0> (heights, width)
    sorted_weights = GatherElements <axis = 1> (weights, order)
    axis = Constant <value_int = 1> ()
    reached = CumSum (sorted_weights, axis)
    is_above = Greater (reached, spared)
    is_whole = GreaterOrEqual (top_p, double_one)
    heaviest = Sub (width, one)
    step_zero = Constant <value_int = 0> ()
    step_one = Constant <value_int = 1> ()
    width_scalar = Squeeze (width)
    numbered = Range (step_zero, width_scalar, step_one)
    is_heaviest = Equal (numbered, heaviest)
    is_left = Or (is_above, is_heaviest)
    is_taken = Or (is_left, is_whole)
    taken_floats = Cast <to = 1> (is_taken)
    scattered = ScatterElements <axis = 1> (float_weights, order, taken_floats)
    in_nucleus = Cast <to = 9> (scattered)
    float_min_p = Cast <to = 1> (min_p)
    is_heavy = GreaterOrEqual (float_weights, float_min_p)
    near_and_in = And (is_near, in_nucleus)
    is_kept = And (near_and_in, is_heavy)
    kept = Where (is_kept, all_weights, double_zero)
    ends = CumSum (kept, axis)
    whole = ReduceMax (ends, last)
    target = Mul (uniform, whole)
    is_before = LessOrEqual (ends, target)
    before = Cast <to = 7> (is_before)
    counted = ReduceSum (before, last)
    final = ArgMax <axis = -1, keepdims = 1> (ends)
    drawn = Min (counted, final)
    chosen = Where (is_drawn, drawn, best)
    chosen_logits = GatherElements <axis = -1> (logits, chosen)
    ids = Squeeze (chosen, last)
    values = Squeeze (chosen_logits, last)
}
"""
)
TOLERANCES = {torch.float32: 0.0}  # it chooses; where rounding moves a border, another token


def kept_weights(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The weights, relative to the best token's, of the tokens that may be drawn; the others' are 0. float64 [R, V].

    Of rows that are drawn and whose largest logit is finite.
    """
    temperature, top_k, top_p, min_p = draws[:, :4].T[:, :, None]
    cold = temperature.float().clamp(min=LEAST_TEMPERATURE)
    heights = (logits - logits.amax(1, keepdim=True)) / cold
    weights, count = heights.exp(), logits.shape[1]
    place = torch.where(top_k == 0, count, top_k.clamp(max=count)).long() - 1
    near = logits >= logits.sort(dim=1, descending=True).values.gather(1, place)
    order = heights.sort(dim=1, stable=True).indices
    reached = (weights.double() * near).gather(1, order).cumsum(1)
    taken = (reached > (1 - top_p) * reached[:, -1:]) | (top_p >= 1)
    taken[:, -1] = True
    nucleus = torch.zeros_like(taken).scatter(1, order, taken)
    return weights.double() * (near & nucleus & (weights >= min_p.float()))


def reference(
    logits: torch.Tensor, draws: torch.Tensor, *, turn: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``sample`` finds: ids int64 [R] and values float32 [R]."""
    if turn is not None:
        draws = draws[int(turn)]
    ids, values = best_tokens(logits)
    drawn = torch.nonzero((draws[:, 0] > 0) & values.isfinite())[:, 0]
    if len(drawn):
        ends = kept_weights(logits[drawn], draws[drawn]).cumsum(1)
        found = (ends <= draws[drawn, 4:5] * ends[:, -1:]).sum(1)
        ids[drawn] = torch.minimum(found, ends.argmax(1))  # rounding may push it onto the end
    return ids, logits.gather(1, ids[:, None])[:, 0]


__all__ = ["BODY", "LEAST_TEMPERATURE", "TOLERANCES", "kept_weights", "reference"]
