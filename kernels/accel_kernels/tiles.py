"""Pieces of Triton code that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from accel_kernels.device import INTERPRETED

NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
NO_ACTIVATION, SILU, GELU_ERF, GELU_TANH = -1, 0, 1, 2
NORMS = (NO_NORM, RMS_NORM, LAYER_NORM)
ACTIVATIONS = (NO_ACTIVATION, SILU, GELU_ERF, GELU_TANH)

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """What stands before this reads nothing that the kernel before may write."""
    if DEPENDENT:
        cuda.gdc_wait()


@triton.jit
def let_successor_start(DEPENDENT: tl.constexpr):
    """From here on the next kernel may take what room is left, up to its own wait."""
    if DEPENDENT:
        cuda.gdc_launch_dependents()


@triton.jit
def operand(tile):
    """A tile as ``tl.dot`` takes it. The interpreter multiplies the bits of bfloat16 as if they were integers."""
    if _INTERPRETED:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def matrix_line(n, STRIPE, GATED: tl.constexpr):
    """The weights' line of output n: gated ones alternate STRIPE lines of the gate and as many of the other matrix."""
    if GATED:
        return n // STRIPE * (2 * STRIPE) + n % STRIPE
    else:
        return n


@triton.jit
def unpacked(words, BITS: tl.constexpr):
    """The weights [N, W * 32 / BITS] of words [N, W], see ``packing``: whole numbers, float16, which holds them."""
    FIELDS: tl.constexpr = 32 // BITS
    i = tl.arange(0, FIELDS)
    places = i * BITS
    if BITS == 4:
        places = (i // 2 + i % 2 * 4) * 4
    fields = (words[:, :, None] >> places[None, None, :]) & ((1 << BITS) - 1)
    whole = fields - (1 << (BITS - 1))
    return tl.reshape(whole.to(tl.float16), (words.shape[0], words.shape[1] * FIELDS))


@triton.jit
def rotate(first, second, cos, sin):
    """The halves of heads, turned; float32."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def cap_scores(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(scores / softcap)."""
    if HAS_SOFTCAP:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    return scores


@triton.jit
def erf(x):
    """The error function to 2e-7, a third of the instructions of the exact one.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = 1.0 - series * tl.exp(-size * size)
    return tl.where(x < 0, -value, value)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """silu(x), or gelu(x) by the error function or by tanh; float32."""
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        return 0.5 * x * (1.0 + erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))


@triton.jit
def finish(total, up, KIND: tl.constexpr, GATED: tl.constexpr):
    """act(total), times ``up`` if gated; float32."""
    if KIND >= 0:
        total = activate(total, KIND)
    if GATED:
        total = total * up
    return total


@triton.jit
def store_line(
    total, up, bias, residual, out, n, N,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Writes one row's outputs n: act(total + bias) (* (up + the other bias), gated) + residual."""
    inside = n < N
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
    total = finish(total, up, ACTIVATION, GATED)
    if HAS_RESIDUAL:
        total += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def row_statistics(x, K, eps, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Mean (0 for RMS norm) and reciprocal deviation of one row of K values, float32; BLOCK >= K."""
    k = tl.arange(0, BLOCK)
    row = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    mean = 0.0
    if NORM == 2:
        mean = tl.sum(row, 0) / K
        row = tl.where(k < K, row - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(row * row, 0) / K + eps)


@triton.jit
def normalized(x, k, inside, mean, scale, norm_weight, norm_bias, NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr):
    """A piece of one row, normalized, float32; NORM 0: as it is."""
    piece = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    if NORM != 0:
        piece = (piece - mean) * scale * tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM_BIAS:
            piece += tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)
    return piece
