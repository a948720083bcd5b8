"""The same ops in plain PyTorch, on the same operands, in the layouts that PyTorch likes best."""

from __future__ import annotations

import torch
from torch.nn import functional

from accel_kernels.benchmark.problem import DTYPE, Copies, Run
from accel_kernels.benchmark.shapes import Layer
from accel_kernels.tiles import GELU_ERF, NO_ACTIVATION, SILU

_ACTIVATIONS = {SILU: "silu", GELU_ERF: "gelu"}


def activated(x: torch.Tensor, kind: int) -> torch.Tensor:
    """SILU, GELU_ERF or NO_ACTIVATION of a tensor."""
    return x if kind == NO_ACTIVATION else getattr(functional, _ACTIVATIONS[kind])(x)


def halves(weight: torch.Tensor, stripe: int | None) -> torch.Tensor:
    """Rows in stripes as all of the gate's, then all of the other matrix's; None: as they are."""
    if stripe is None:
        return weight
    return weight.reshape(-1, 2, stripe, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


def linear(
    layer: Layer,
    x: torch.Tensor,
    weights: Copies[torch.Tensor],
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> Run:
    """A linear layer in fp16, logits too.

    Args:
        x: [M, K].
        weights: [N, K]; gated: [2N, K], the gate first.
        norm_weight: [K], of an RMS norm before.
        bias: [N].
        residual: [M, N].
    """
    low_bias = None if bias is None else bias.to(DTYPE)

    def run(index: int) -> torch.Tensor:
        rows = x if norm_weight is None else functional.rms_norm(x, x.shape[-1:], norm_weight, eps).to(DTYPE)
        result = functional.linear(rows, weights(index), low_bias)
        if layer.gated:
            gate, other = result.chunk(2, -1)
            return activated(gate, layer.activation) * other
        result = activated(result, layer.activation)
        return result if residual is None else result + residual

    return run


def linear_ops(layer: Layer, *, normed: bool = False, residual: bool = False) -> str:
    """What ``linear`` runs, in words."""
    ops = ["rms_norm"] * normed + ["linear"]
    if layer.activation != NO_ACTIVATION:
        ops.append(_ACTIVATIONS[layer.activation])
    return ", ".join(ops + ["mul"] * layer.gated + ["add"] * residual)


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Heads [..., D], half-rotated by tables that broadcast over them; ``out`` may be ``heads``."""
    first, second = heads.chunk(2, -1)
    return torch.add(heads * cos, torch.cat([-second, first], -1) * sin, out=out)


def whole_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables [P, D / 2] as ``turned`` wants them: [P, D] in fp16."""
    return torch.cat([cos, cos], -1).to(DTYPE), torch.cat([sin, sin], -1).to(DTYPE)


def appended(cache: torch.Tensor, new: torch.Tensor, past: int, scales: torch.Tensor | None) -> torch.Tensor:
    """The first ``past`` + 1 positions of a cache [B, KV, C, D], with the new ones [B, KV, D] in their place, in fp16.

    Args:
        scales: float32 [KV, D] of a cache in 8 bits.
    """
    cache[:, :, past] = new if scales is None else narrowed(new, scales, cache.dtype)
    return widened(cache[:, :, : past + 1], scales)


def narrowed(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., KV, D] as a cache in 8 bits holds them: multiples of ``scales`` [KV, D]."""
    ratio = x.float() / scales
    return (ratio.round().clamp(-128, 127) if dtype == torch.int8 else ratio.clamp(-448, 448)).to(dtype)


def widened(cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """A cache [B, KV, C, D] in fp16: of 8 bits with ``scales`` [KV, D], else as it is."""
    return cache if scales is None else cache.to(DTYPE) * scales.to(DTYPE)[:, None]


__all__ = [
    *("activated", "appended", "halves", "linear", "linear_ops", "narrowed", "turned", "whole_tables", "widened"),
]
