"""Pieces of the references in plain PyTorch, in float64, as plain as can be."""

from __future__ import annotations

import torch
from torch.nn import functional

from accel_kernels.tiles import GELU_ERF, GELU_TANH, LAYER_NORM, NO_ACTIVATION, NO_NORM, SILU


def activated(x: torch.Tensor, kind: int) -> torch.Tensor:
    """The activation of float64."""
    if kind == NO_ACTIVATION:
        return x
    if kind == SILU:
        return functional.silu(x)
    return functional.gelu(x, approximate={GELU_ERF: "none", GELU_TANH: "tanh"}[kind])


def normed(
    x: torch.Tensor, kind: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The norm of rows [T, K] in float64."""
    x = x.double()
    if kind == NO_NORM:
        return x
    assert weight is not None
    if kind == LAYER_NORM:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()
    return x if bias is None else x + bias.double()


def gate_and_other(sums: torch.Tensor, stripe: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2N] in stripes as two [T, N]: stripe by stripe of the gate and of the other matrix; None: N."""
    tokens, both = sums.shape
    striped = sums.reshape(tokens, -1, 2, stripe or both // 2)
    return striped[:, :, 0].reshape(tokens, -1), striped[:, :, 1].reshape(tokens, -1)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
    stripe: int | None,
    activation: int,
) -> torch.Tensor:
    """act(x W^T + bias) + residual, gated or not, [T, N] in float64. Of a gated bias [2N] the gate's half is first."""
    sums = x.double() @ weight.double().T
    if gated:
        gate, other = gate_and_other(sums, stripe)
        if bias is not None:
            gate, other = gate + bias.double()[: gate.shape[1]], other + bias.double()[gate.shape[1] :]
        result = activated(gate, activation) * other
    else:
        result = activated(sums if bias is None else sums + bias.double(), activation)
    return result if residual is None else result + residual.double()


def rotated(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """Heads [T, H, D] in float64, turned by their token's line of the tables [T, D / 2]; None: as they are."""
    x = x.double()
    if cos is None or sin is None:
        return x
    first, second = x.chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attended(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    seen: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one row in float64.

    Args:
        query: [M, H, D].
        keys, values: [S, KV, D]; KV divides H.
        seen: bool [M, S]; a query that sees nothing gets zeros.
        bias: [H, M, S], added to the scores.

    Returns:
        [M, H, D].
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = torch.einsum("mhd,shd->hms", query.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hms,shd->mhd", scores.softmax(-1).nan_to_num(0.0), values)


__all__ = ["activated", "attended", "gate_and_other", "normed", "product", "rotated"]
