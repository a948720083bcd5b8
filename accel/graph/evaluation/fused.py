"""The fused nodes of the ``cuda`` engine's dialect on PyTorch: products in the weights' type, the rest in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from accel_kernels.packing import unpack
from torch.nn import functional

from accel.engines.torch_operators import TYPES, Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def _products(node: ir.Node, x: Tensor, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """x W_i^T + b_i for each weight, float32 again after rounding to the weights' type; integers' is float16."""
    count = node.attributes["weights"].as_int()
    turned = node.attributes["transposed"].as_int()
    bits = node.attributes.get_int("bits", None)
    weights, biases = tensors[:count], tensors[count:]
    if bits is not None:
        scales, biases = biases[:count], biases[count:]
        pairs = zip(weights, scales, strict=True)
        weights = tuple(unpack(words, scale, bits).to(scale.dtype) for words, scale in pairs)
    results = []
    for place, weight in enumerate(weights):
        product = (x.to(weight.dtype) @ (weight.T if turned else weight)).float()
        results.append(product + biases[place] if biases else product)
    return results


def _linear(node: ir.Node, x: Tensor, *tensors: Tensor) -> Tensor:
    result = torch.cat(_products(node, x, tensors), -1)
    kind = node.attributes.get_string("activation", None)
    return result if kind is None else _ACTIVATIONS[kind](result)


def _gated_linear(node: ir.Node, x: Tensor, *tensors: Tensor) -> Tensor:
    parts = _products(node, x, tensors)
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
    return _ACTIVATIONS[node.attributes["activation"].as_string()](gate) * up


def _rows(node: ir.Node, words: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    """Rows of an integer table, float32."""
    flat = ids.reshape(-1)
    return unpack(words[flat], scales[flat], node.attributes["bits"].as_int()).reshape(*ids.shape, -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D], tables [T, D / 2]: rotation by halves."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _weights(node: ir.Node, scores: Tensor, seen: Tensor) -> Tensor:
    cap = node.attributes.get_float("softcap", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return torch.softmax(scores.masked_fill(~seen, -1e30), -1)


def _held(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values [T, KV, D] as a cache holds them: floats, or multiples of the scales [KV, D]."""
    if scales is None:
        return x.to(dtype)
    if dtype == torch.int8:
        return torch.clamp(torch.round(x / scales), -128, 127).to(dtype)
    return torch.clamp(x / scales, -448, 448).to(dtype)


def _put(cache: Tensor, row: Tensor, slot: Tensor, held: Tensor) -> Tensor:
    """A copy of the cache with new keys or values; PyTorch writes no 8-bit floats by index, but their bytes."""
    made = cache.clone()
    by_byte = cache.dtype == torch.float8_e4m3fn
    (made.view(torch.uint8) if by_byte else made)[row, :, slot] = held.view(torch.uint8) if by_byte else held
    return made


def _meaning(cache: Tensor, scales: Tensor | None) -> Tensor:
    """What the numbers of a cache [T, KV, C, D] stand for, float32."""
    return cache if scales is None else cache * scales[:, None]


def _cached_attention(
    node: ir.Node, query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
    past_lengths: Tensor, query_lengths: Tensor, cos: Tensor | None = None, sin: Tensor | None = None,
    key_scales: Tensor | None = None, value_scales: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See ``accel.graph.lowering.cuda``; caches are copied."""
    heads, groups = node.attributes["num_heads"].as_int(), past_key.shape[1]
    dim, low = past_key.shape[3], past_key.dtype
    if key_scales is not None:
        low = TYPES[ir.DataType(node.attributes["dtype"].as_int())]
    if key is None or value is None:
        query, key, value = query.split([heads * dim, groups * dim, groups * dim], -1)
    query, key, value = (part.to(low).float().reshape(len(query), -1, dim) for part in (query, key, value))
    lengths = query_lengths.long()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    slot = past_lengths.long()[row] + torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    if cos is not None and sin is not None:
        query, key = _turn(query, cos[slot], sin[slot]).to(low).float(), _turn(key, cos[slot], sin[slot])
    keys = _put(past_key, row, slot, _held(key, key_scales, past_key.dtype))
    values = _put(past_value, row, slot, _held(value, value_scales, past_value.dtype))
    share = heads // groups
    scores = torch.einsum("thd,thcd->thc", query, _meaning(keys.float()[row], key_scales).repeat_interleave(share, 1))
    places = torch.arange(keys.shape[2])
    seen = places <= slot[:, None]
    window = node.attributes.get_int("window", None)
    if window is not None:
        seen &= places > slot[:, None] - window
    weights = _weights(node, scores * node.attributes["scale"].as_float(), seen[:, None]).to(low).float()
    meant = _meaning(values.float()[row], value_scales).repeat_interleave(share, 1)
    result = torch.einsum("thc,thcd->thd", weights, meant)
    return [result.reshape(len(row), -1).to(low).float(), keys, values]


def _attention(
    node: ir.Node, query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor, bias: Tensor | None = None
) -> Tensor:
    """See ``accel.graph.lowering.cuda``."""
    heads, groups = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    if key is None or value is None:
        dim = query.shape[-1] // (heads + 2 * groups)
        query, key, value = query.split([heads * dim, groups * dim, groups * dim], -1)
    rows, length = query.shape[:2]
    query, key, value = (part.reshape(rows, length, -1, query.shape[-1] // heads) for part in (query, key, value))
    share = heads // groups
    key, value = key.repeat_interleave(share, 2), value.repeat_interleave(share, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * node.attributes["scale"].as_float()
    scores = scores if bias is None else scores + bias
    seen = (mask == 1)[:, None, None]
    window = node.attributes.get_int("window", None)
    if window is not None:
        places = torch.arange(length)
        seen = seen & ((places[:, None] - places).abs() <= window)
    result = torch.einsum("bhqk,bkhd->bqhd", _weights(node, scores, seen), value)
    return result.reshape(rows, length, -1)


FUSED: dict[str, Callable[..., Any]] = {
    "Linear": _linear,
    "GatedLinear": _gated_linear,
    "Gather": _rows,
    "CachedAttention": _cached_attention,
    "Attention": _attention,
}


__all__ = ["FUSED"]
