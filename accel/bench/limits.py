"""What the machine allows: streaming read and fp32 matrix product, and what a model asks of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from accel.manifest import Manifest

STREAM_BYTES = 1 << 29  # far larger than any cache
GEMM_M, GEMM_K = 512, 1536
TRIES = 5


@dataclass(frozen=True)
class Limits:
    """Best of several tries: bytes per second read from memory, fp32 operations per second in a matrix product."""

    read_bytes_s: float
    gemm_flops_s: float


@dataclass(frozen=True)
class Work:
    """What one forward asks for.

    Attributes:
        flops: Multiplications and additions of the matrix products, attention included.
        weight_bytes: Weights read once, whatever the batch, and each row's own cache.
    """

    flops: float
    weight_bytes: float

    def seconds(self, limits: Limits) -> float:
        """The time it takes at least: the slower of computing and reading."""
        return max(self.flops / limits.gemm_flops_s, self.weight_bytes / limits.read_bytes_s)


def measure_limits(threads: int) -> Limits:
    """Measures this machine with NumPy alone (its BLAS uses the cores this process is kept on)."""
    data = np.ones(STREAM_BYTES // 4, np.float32)
    parts = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        read = STREAM_BYTES / _best_seconds(lambda: list(pool.map(np.max, parts)))
    a = np.random.default_rng(0).random((GEMM_M, GEMM_K), np.float32)
    b = np.random.default_rng(1).random((GEMM_K, GEMM_K), np.float32)
    out = np.empty((GEMM_M, GEMM_K), np.float32)
    gemm = 2 * GEMM_M * GEMM_K * GEMM_K / _best_seconds(lambda: np.matmul(a, b, out=out))
    return Limits(read, gemm)


def work_of(manifest: Manifest, batch: int, tokens: int, past: int = 0) -> Work:
    """Work of a forward over ``tokens`` new tokens per row after ``past`` cached ones; a decoder's head sees one.

    So does what follows its last attention, which is counted for all: of a prompt, up to 1 / layers too much.
    """
    head, body = _weights(manifest)
    rows = batch * tokens
    head_rows = batch if manifest.arch.kind == "decoder" else rows
    flops = 2.0 * rows * body + 2.0 * head_rows * head
    for layer in manifest.arch.layers:
        keys = past + (tokens + 1) / 2 if layer.causal else tokens
        seen = min(keys, layer.window) if layer.causal and layer.window else keys
        flops += 4.0 * rows * seen * layer.heads * layer.head_dim
    # A window, whose last position is the token's own, is all that is read.
    cached = ((layer, min(past, layer.window - 1 if layer.window else past)) for layer in manifest.arch.layers)
    cache = batch * sum(2 * layer.kv_heads * layer.head_dim * positions for layer, positions in cached)
    return Work(flops, 4.0 * (body + head + cache))


def _weights(manifest: Manifest) -> tuple[int, int]:
    """Numbers of weights in the language model head, and in all other matrices that every token is multiplied by."""
    head = body = 0
    tied_head = manifest.arch.tied_embeddings and manifest.arch.task in ("text-generation", "fill-mask")
    for name, entry in manifest.parameters.items():
        if len(entry.shape) != 2 or name in manifest.tied:
            continue
        size = entry.shape[0] * entry.shape[1]
        if manifest.arch.vocab_size in entry.shape:
            if not _is_table(name) or tied_head:
                head += size
        elif not _is_table(name):
            body += size
    return head, body


def _is_table(name: str) -> bool:
    """Embedding tables are looked up, not multiplied."""
    return "embed" in name or not {"wte", "wpe"}.isdisjoint(name.split("."))


def _best_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
