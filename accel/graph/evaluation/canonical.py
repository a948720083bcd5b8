"""The private ops of canonical graphs on PyTorch, as their function bodies define them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from accel.engines.torch_operators import Tensor


def _linear(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight if node.attributes["transposed"].as_int() else weight.T, bias)


def _dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [N, K], scale [N, G] -> [N, K]."""
    return (weight.float().reshape(*scale.shape, -1) * scale[..., None]).reshape(weight.shape)


def round_input(x: Tensor, step: Tensor) -> Tensor:
    """The nearest multiples of ``step``, at most 127 of them to either side."""
    return torch.clamp(torch.round(x / step), -127, 127) * step


def row_step(x: Tensor) -> Tensor:
    """The step that a row of x has when it is rounded by itself: [..., K] -> [..., 1]."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step == 0, torch.ones_like(step), step)


def _quantized_linear(
    node: ir.Node, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, step: Tensor | None = None
) -> Tensor:
    activation = node.attributes["activation"].as_string()
    if activation == "dynamic":
        step = row_step(x)
    elif activation == "grouped":
        groups = x.unflatten(-1, (scale.shape[-1], -1))
        x = round_input(groups, row_step(groups)).flatten(-2)
    x = x if step is None else round_input(x, step)
    return torch.nn.functional.linear(x, _dequantized(weight, scale), bias)


def _quantized_gather(node: ir.Node, weight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    flat = ids.reshape(-1)
    return _dequantized(weight[flat], scale[flat]).reshape(*ids.shape, -1)


def _attend(node: ir.Node, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    """query [..., H, S, D], key and value [..., KV, C, D], seen broadcasts to [..., H, S, C] -> [..., H, S, D]."""
    share = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(share, -3), value.repeat_interleave(share, -3)
    scores = query @ key.transpose(-1, -2) * node.attributes["scale"].as_float()
    cap = node.attributes.get_float("softcap", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    return torch.softmax(scores.masked_fill(~seen, -1e9), -1) @ value


def _attention(
    node: ir.Node, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None = None
) -> Tensor:
    rows, length = query.shape[:2]
    heads, groups = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    seen = (mask == 1)[:, None, None]
    window = node.attributes.get_int("window", None)
    if window is not None:
        places = torch.arange(length)
        seen = seen & ((places[:, None] - places).abs() <= window)
    query = query.reshape(rows, length, heads, -1).transpose(1, 2)
    key, value = (part.reshape(rows, length, groups, -1).transpose(1, 2) for part in (key, value))
    return _attend(node, query, key, value, seen, bias).transpose(1, 2).flatten(2)


def _cached_attention(
    node: ir.Node, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor,
    past_lengths: Tensor, query_lengths: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Row by row, over the slots that are filled; caches are copied. A row may bring no token."""
    heads, groups = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    keys, values = past_key.clone(), past_value.clone()
    window = node.attributes.get_int("window", None)
    results, start = [], 0
    for row, (past, fresh) in enumerate(zip(past_lengths.tolist(), query_lengths.tolist(), strict=True)):
        if fresh == 0:  # the row sits this step out
            continue
        here, end = slice(start, start + fresh), past + fresh
        keys[row, :, past:end] = key[here].unflatten(-1, (groups, -1)).transpose(0, 1)
        values[row, :, past:end] = value[here].unflatten(-1, (groups, -1)).transpose(0, 1)
        own, slots = torch.arange(past, end)[:, None], torch.arange(end)
        seen = slots <= own
        if window is not None:
            seen &= slots > own - window
        asked = query[here].unflatten(-1, (heads, -1)).transpose(0, 1)
        found = _attend(node, asked, keys[row, :, :end], values[row, :, :end], seen, None)
        results.append(found.transpose(0, 1).flatten(1))
        start += fresh
    return [torch.cat(results), keys, values]


CANONICAL: dict[str, Callable[..., Any]] = {
    "Linear": _linear,
    "Attention": _attention,
    "CachedAttention": _cached_attention,
    "QuantizedLinear": _quantized_linear,
    "QuantizedGather": _quantized_gather,
}


__all__ = ["CANONICAL", "round_input", "row_step"]
