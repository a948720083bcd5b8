"""Attention in NumPy, token by token in fp64: what the private ops mean, written a second time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def attend(query: Array, keys: Array, values: Array, scale: float, softcap: float | None, bias: Array | None) -> Array:
    """One query [D] over the keys [N, D] that it sees."""
    scores = scale * (keys.astype(np.float64) @ query)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values


def bidirectional(
    q: Array, k: Array, v: Array, mask: NDArray[np.int64], heads: int, kv_heads: int, scale: float,
    window: int | None = None, softcap: float | None = None, bias: Array | None = None,
) -> Array:  # fmt: skip
    """[B, S, W]; a query sees unmasked keys at most ``window`` away; rows of padding are left at zero."""
    batch, length, width = q.shape
    dim, group = width // heads, heads // kv_heads
    out = np.zeros((batch, length, heads, dim))
    for b in range(batch):
        for s in range(length):
            seen = [j for j in range(length) if mask[b, j] and (window is None or abs(j - s) <= window)]
            for h in range(heads if seen else 0):
                part = slice(h // group * dim, (h // group + 1) * dim)
                row = None if bias is None else bias[b % len(bias), h, s, seen]
                query = q[b, s, h * dim : (h + 1) * dim]
                out[b, s, h] = attend(query, k[b, seen, part], v[b, seen, part], scale, softcap, row)
    return out.reshape(batch, length, width)


class CachedReference:
    """Causal attention of packed rows over lists of everything that each row has seen."""

    def __init__(self, rows: int, heads: int, kv_heads: int, scale: float, window: int | None, softcap: float | None):
        self.heads, self.kv_heads, self.scale, self.window, self.softcap = heads, kv_heads, scale, window, softcap
        self.keys: list[list[Array]] = [[] for _ in range(rows)]
        self.values: list[list[Array]] = [[] for _ in range(rows)]

    def step(self, q: Array, k: Array, v: Array, lengths: tuple[int, ...]) -> Array:
        """q [T, H*D], k and v [T, KV*D], rows one after another -> [T, H*D]."""
        out, token = [], 0
        for row, count in enumerate(lengths):
            for _ in range(count):
                self.keys[row].append(k[token])
                self.values[row].append(v[token])
                out.append(self._token(row, q[token]))
                token += 1
        return np.array(out)

    def _token(self, row: int, query: Array) -> Array:
        dim, group = len(query) // self.heads, self.heads // self.kv_heads
        first = 0 if self.window is None else max(0, len(self.keys[row]) - self.window)
        keys, values = (np.array(seen[row][first:]) for seen in (self.keys, self.values))
        heads = []
        for h in range(self.heads):
            part = slice(h // group * dim, (h // group + 1) * dim)
            q = query[h * dim : (h + 1) * dim]
            heads.append(attend(q, keys[:, part], values[:, part], self.scale, self.softcap, None))
        return np.concatenate(heads)
