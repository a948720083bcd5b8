"""ONNX Runtime's own operators, computed with PyTorch as its CUDA kernels do: products and softmax add in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch.nn import functional

Tensor: TypeAlias = torch.Tensor


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    value = node.attributes.get_int(name, default)
    assert value is not None
    return value


def _number(node: ir.Node, name: str, default: float) -> float:
    value = node.attributes.get_float(name, default)
    assert value is not None
    return value


def _product(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return a @ (b.transpose(-1, -2) if _int(node, "transB") else b)


def _bias_gelu(node: ir.Node, x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


def _fast_gelu(node: ir.Node, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(node: ir.Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(_number(node, "alpha", 1.702) * x)


def _skip_layer_norm(
    node: ir.Node, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> list[Tensor | None]:
    total = x + skip if bias is None else x + skip + bias
    normed = functional.layer_norm(total, scale.shape, scale, shift, _number(node, "epsilon", 1e-12))
    return [normed, None, None, total][: len(node.outputs)]


def _skip_rms_norm(
    node: ir.Node, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> list[Tensor | None]:
    total = x + skip if bias is None else x + skip + bias
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + _number(node, "epsilon", 1e-12)) * scale
    return [normed, None, None, total][: len(node.outputs)]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * D] -> [B, heads, S, D]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """[B, S, H * D] from heads; ``scores`` finishes the scaled products, in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (item.repeat_interleave(groups, 1) for item in (key, value))
    weights = torch.softmax(scores(scale * (query.float() @ key.float().transpose(-1, -2))), -1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)


def _multi_head_attention(
    node: ir.Node,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """``mask`` int32 [B], keys per row, or [B, S]."""
    heads = _int(node, "num_heads")
    if bias is not None:
        query, key, value = (item + part for item, part in zip((query, key, value), bias.chunk(3), strict=True))
    hidden = _number(node, "mask_filter_value", -10000.0)

    def finish(scores: Tensor) -> Tensor:
        if score_bias is not None:
            scores = scores + score_bias.float()
        if mask is None:
            return scores
        real = torch.arange(scores.shape[-1]) < mask[:, None] if mask.dim() == 1 else mask != 0
        return scores + torch.where(real, 0.0, -torch.inf if mask.dim() == 1 else hidden)[:, None, None]

    scale = _number(node, "scale", 0.0) or (query.shape[-1] // heads) ** -0.5
    return _attend(_heads(query, heads), _heads(key, heads), _heads(value, heads), finish, scale)


def _group_query_attention(
    node: ir.Node,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_length: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> list[Tensor]:
    """Every row brings S tokens, the last of which goes to slot ``seqlens_k``."""
    heads, kv_heads, dim = _int(node, "num_heads"), _int(node, "kv_num_heads"), past_key.shape[-1]
    assert int(total_length) >= int(seqlens_k.max()) + 1, "total_sequence_length is the longest row's"
    if key is None or value is None:
        query, key, value = query.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    queries, keys, values = (_heads(x, count) for x, count in ((query, heads), (key, kv_heads), (value, kv_heads)))
    own = seqlens_k.long()[:, None] + 1 - query.shape[1] + torch.arange(query.shape[1])  # [B, S]
    if cos is not None and sin is not None:
        queries, keys = (_turn(x, cos[own][:, None], sin[own][:, None]) for x in (queries, keys))
    present = [past_key.clone(), past_value.clone()]
    for row, slots in enumerate(own.tolist()):
        for cache, new in zip(present, (keys, values), strict=True):
            cache[row, :, slots] = new[row]
    slots = torch.arange(past_key.shape[2])
    seen = slots <= own[..., None]
    window = _int(node, "local_window_size", -1)
    if window > 0:
        seen &= slots > own[..., None] - window
    softcap = _number(node, "softcap", 0.0)

    def finish(scores: Tensor) -> Tensor:
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        return scores.masked_fill(~seen[:, None], -torch.inf)

    mixed = _attend(queries, present[0], present[1], finish, _number(node, "scale", 0.0) or dim**-0.5)
    return [mixed, *present]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * R of the columns, half against half."""
    part = 2 * cos.shape[-1]
    first, second = x[..., :part].chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, x[..., part:]], -1)


def _weights(node: ir.Node, blocks: Tensor, scales: Tensor) -> Tensor:
    """Unsigned integers uint8 [.., groups, bytes] and scales [.., groups] -> floats of the scales' type, [.., K]."""
    bits = _int(node, "bits", 4)
    fields = blocks[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & ((1 << bits) - 1)
    whole = fields.flatten(-2).float() - (1 << (bits - 1))
    return (whole * scales.float()[..., None]).flatten(-2).to(scales.dtype)


def _mat_mul_n_bits(node: ir.Node, x: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    return x @ _weights(node, blocks, scales.reshape(blocks.shape[:2])).T


def _gather_block_quantized(node: ir.Node, blocks: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
    """Rows of [N, groups, bytes] and [N, groups, 1] -> [.., groups, group]."""
    return _weights(node, blocks[ids], scales[ids][..., 0]).unflatten(-1, (blocks.shape[1], -1))


CONTRIB: dict[str, Callable[..., Any]] = {
    "FusedMatMul": _product,
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _group_query_attention,
    "MatMulNBits": _mat_mul_n_bits,
    "GatherBlockQuantized": _gather_block_quantized,
}
# Attributes that are not looked at, with the only value at which that is right.
CONTRIB_FIXED: dict[str, dict[str, Any]] = {
    "FusedMatMul": {"alpha": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0},
    "MultiHeadAttention": {"unidirectional": 0},
    "GatherBlockQuantized": {"gather_axis": 0, "quantize_axis": 2},
    "GroupQueryAttention": {"rotary_interleaved": 0, "smooth_softmax": 0},
}

__all__ = ["CONTRIB", "CONTRIB_FIXED"]
