"""Pooling of token vectors into one vector per text, as sentence-transformers defines it, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from accel.errors import InputError

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_ALIASES = {"mean_sqrt_len": "mean_sqrt_len_tokens", "cls_token": "cls", "last_token": "lasttoken"}
_EPSILON = 1e-9  # sentence-transformers' floor for a denominator
_PAIR_BLOCK = 1 << 24  # elements of one [block, M, D] difference in the Manhattan distance (64 MiB)


def parse_modes(pooling: str | Sequence[str], where: str = "pooling") -> tuple[str, ...]:
    """The modes that ``pooling`` names, in order; several are concatenated.

    Raises:
        InputError: An unknown mode, or none at all.
    """
    names = [pooling] if isinstance(pooling, str) else list(pooling)
    modes = tuple(_ALIASES.get(name, name) if isinstance(name, str) else name for name in names)
    for mode in modes or (None,):
        if mode not in POOLING_MODES:
            remedy = f"Choose one or several of: {', '.join(POOLING_MODES)}"
            raise InputError(f"Unknown pooling mode {mode!r}", where=where, remedy=remedy)
    return modes


def pool(
    hidden: NDArray[np.float32],
    mask: NDArray[np.int64] | None,
    modes: Sequence[str],
    prompt_length: int = 0,
) -> NDArray[np.float32]:
    """Pools each row's token vectors.

    Args:
        hidden: float32 [B, S, H].
        mask: int64 [B, S] of 0 and 1; None: all ones.
        modes: Valid modes; their results are concatenated.
        prompt_length: This many leading tokens of each row are left out.

    Returns:
        float32 [B, len(modes) * H].
    """
    kept = _without_prompt(hidden, mask, prompt_length) if prompt_length else mask
    parts = [_pool_one(hidden, kept, mask, mode) for mode in modes]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _without_prompt(hidden: NDArray, mask: NDArray | None, prompt_length: int) -> NDArray:
    rows, length = hidden.shape[:2]
    kept = np.ones((rows, length), np.int64) if mask is None else mask.copy()
    first = kept.argmax(axis=1)  # not 0 where the padding is on the left
    kept[np.arange(length) < (first + prompt_length)[:, None]] = 0
    return kept


def _pool_one(hidden: NDArray, kept: NDArray | None, mask: NDArray | None, mode: str) -> NDArray:
    rows, length = hidden.shape[:2]
    if mode == "cls":
        return hidden[:, 0].copy() if kept is None else hidden[np.arange(rows), kept.argmax(axis=1)]
    if mode == "lasttoken":
        if kept is None:
            return hidden[:, -1].copy()
        any_kept = kept.max(axis=1)
        last = np.where(any_kept == 1, length - 1 - kept[:, ::-1].argmax(axis=1), 0)
        return hidden[np.arange(rows), last] * any_kept[:, None].astype(hidden.dtype)
    if mode == "max":
        return (hidden if kept is None else np.where(kept[:, :, None] == 1, hidden, -np.inf)).max(axis=1)
    weights = _weights(kept, mask, mode, rows, length)
    if weights is None:
        total, denominator = hidden.sum(axis=1), np.float32(length)
    else:
        total = np.matmul(weights[:, None, :], hidden)[:, 0]
        denominator = np.maximum(weights.sum(axis=1, keepdims=True), np.float32(_EPSILON))
    return total / (np.sqrt(denominator) if mode == "mean_sqrt_len_tokens" else denominator)


def _weights(kept: NDArray | None, mask: NDArray | None, mode: str, rows: int, length: int) -> NDArray | None:
    """float32 [B, S] weights of a mean; None: all one."""
    if mode != "weightedmean":
        return None if kept is None else kept.astype(np.float32)
    positions = np.arange(1, length + 1, dtype=np.float32)
    if kept is None:
        return np.broadcast_to(positions, (rows, length))
    start = np.zeros((rows, 1), np.int64) if mask is None else mask.argmax(axis=1)[:, None]
    return (kept * (positions - start)).astype(np.float32)


def normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales each row of [..., D] to unit length; a zero row stays zero."""
    norms = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
    return vectors / np.maximum(norms, np.float32(1e-12))


def similarity(a: NDArray[np.float32], b: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """Similarity of every row of a to every row of b.

    Args:
        a: float32 [N, D].
        b: float32 [M, D].
        kind: ``cosine``, ``dot``, ``euclidean`` or ``manhattan`` (distances are negated: larger is nearer).

    Returns:
        float32 [N, M].
    """
    if kind == "cosine":
        return normalize(a) @ normalize(b).T
    if kind == "dot":
        return a @ b.T
    result = np.empty((len(a), len(b)), np.float32)
    step = max(1, _PAIR_BLOCK // max(1, b.size))
    for start in range(0, len(a), step):
        difference = a[start : start + step, None] - b[None]
        if kind == "manhattan":
            result[start : start + step] = -np.abs(difference).sum(axis=-1)
        else:
            result[start : start + step] = -np.sqrt(np.einsum("nmd,nmd->nm", difference, difference))
    return result


__all__ = ["POOLING_MODES", "SIMILARITIES", "normalize", "parse_modes", "pool", "similarity"]
