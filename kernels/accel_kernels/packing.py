"""int4 and int8 weights in groups, as the kernels read them: packed as they are, or rounded to nearest first.

A word of 32 bits holds 8 (4) neighbouring weights of one output as unsigned numbers with 8 (128) for zero. Of int4,
field i and field i + 4 are neighbours, so that one mask leaves a pair for the GPU's two-at-a-time float16 arithmetic.
"""

from __future__ import annotations

import torch


def _places(bits: int, device: torch.device) -> torch.Tensor:
    """The first bit of each neighbour, int64 [32 / bits]."""
    order = torch.arange(32 // bits, device=device)
    return (order // 2 + order % 2 * 4 if bits == 4 else order) * bits


def pack(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest, symmetric per group.

    Args:
        weight: [N, K], K a multiple of ``group``.
        bits: 4 or 8.
        group: A multiple of 32 / ``bits``.

    Returns:
        int32 [N, K * bits / 32] and scales float16 [N, K / group].

    Raises:
        ValueError: Another number of bits, a group that does not divide K, weights beyond float16's scales.
    """
    count, size = weight.shape
    if bits not in (4, 8):
        raise ValueError(f"pack: weights of {bits} bits; there are 4 and 8")
    if group <= 0 or size % group or group % (32 // bits):
        raise ValueError(f"pack: groups of {group} for rows of {size}; they divide the row into whole words")
    grouped = weight.float().reshape(count, size // group, group)
    top = (1 << (bits - 1)) - 1
    scales = (grouped.abs().amax(-1) / top).clamp(min=torch.finfo(torch.float16).tiny).half()
    if not scales.isfinite().all():
        raise ValueError("pack: a weight is NaN, or so large that its group's scale does not fit float16")
    whole = (grouped / scales.float()[..., None]).round().clamp(-top - 1, top).to(torch.int64) + top + 1
    words = (whole.reshape(count, -1, 32 // bits) << _places(bits, weight.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32), scales


def pack_integers(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs weights that somebody else rounded.

    Args:
        values: int8 [N, K], K a multiple of 32 / ``bits``; with 4 bits in [-8, 7].
        bits: 4 or 8.

    Returns:
        int32 [N, K * bits / 32].

    Raises:
        ValueError: Another number of bits, rows of no whole words, integers beyond the bits' range.
    """
    if bits not in (4, 8):
        raise ValueError(f"pack_integers: weights of {bits} bits; there are 4 and 8")
    count, size = values.shape
    fields = 32 // bits
    if size % fields:
        raise ValueError(f"pack_integers: rows of {size} are no whole words of {fields} weights")
    half = 1 << (bits - 1)
    if values.numel() and not -half <= int(values.min()) <= int(values.max()) < half:
        raise ValueError(f"pack_integers: weights beyond [{-half}, {half - 1}]")
    grouped = values.reshape(count, -1, fields)
    words = torch.zeros(grouped.shape[:2], dtype=torch.int32, device=values.device)
    for place, field in zip(_places(bits, values.device).tolist(), grouped.unbind(-1)):
        words |= (field.to(torch.int32) + half) << place
    return words


def unpack(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights that words and scales stand for, float32 [N, K]."""
    count, groups = scales.shape
    fields = (words.long()[..., None] >> _places(bits, words.device)) & ((1 << bits) - 1)
    whole = fields.reshape(count, groups, -1) - (1 << (bits - 1))
    return (whole * scales.float()[..., None]).reshape(count, -1)


__all__ = ["pack", "pack_integers", "unpack"]
