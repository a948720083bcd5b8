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
    """What stands before this reads nothing that a kernel of the same run writes: each lets its successor start before
    it waits itself, so that several may still be under way.
    """
    if DEPENDENT:
        cuda.gdc_wait()


@triton.jit
def let_successor_start(DEPENDENT: tl.constexpr):
    """From here on the next kernel may take what room is left, up to its own wait."""
    if DEPENDENT:
        cuda.gdc_launch_dependents()


@triton.jit
def from_the_end(AXIS: tl.constexpr):
    """The program's place along an axis of the grid, counted from its end: what the kernel before wrote last is read
    first, while the L2 has it, and what this one writes last the next one reads first.
    """
    return tl.num_programs(AXIS) - 1 - tl.program_id(AXIS)


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
def _field(words, place, BITS: tl.constexpr):
    """The field that starts at a bit, as a weight; with the bits of 1024 it is the float16 1024 + field."""
    bits = ((words >> place) & ((1 << BITS) - 1)) | 0x6400
    ZERO: tl.constexpr = 1024.0 + (1 << (BITS - 1))
    return bits.to(tl.int16).to(tl.float16, bitcast=True) - ZERO


@triton.jit
def _four_fields(words, first, BITS: tl.constexpr, STEP: tl.constexpr):
    """Four fields, STEP bits from one to the next, along two new axes."""
    even = tl.join(_field(words, first, BITS), _field(words, first + 2 * STEP, BITS))
    odd = tl.join(_field(words, first + STEP, BITS), _field(words, first + 3 * STEP, BITS))
    return tl.join(even, odd)


@triton.jit
def unpacked(words, BITS: tl.constexpr):
    """The weights [N, W * 32 / BITS] of words [N, W], see ``packing``: whole numbers, float16, which holds them.

    Joined pair by pair: so a word's weights stay in the thread that read it.
    """
    FIELDS: tl.constexpr = 32 // BITS
    if BITS == 4:
        whole = tl.join(_four_fields(words, 0, BITS, 4), _four_fields(words, 16, BITS, 4))
    else:
        whole = _four_fields(words, 0, BITS, 8)
    return tl.reshape(whole, (words.shape[0], words.shape[1] * FIELDS))


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
def _above_half(a, b):
    """1/2 + a * b, but at least 0 and at most 1."""
    if _INTERPRETED:
        return tl.minimum(tl.maximum(0.5 + a * b, 0.0), 1.0)
    else:  # the multiplication's own saturation
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _rounded_gelu(x):
    """gelu(x) by the error function to 5e-5, which float16 does not tell from it, without exponential or division: the
    units that compute these are few, and an epilogue waits for them.

    x Phi(x), where Phi(x) - 1/2 is an odd polynomial, fitted for the least error of gelu up to |x| = 4.4. Farther out
    it leaves -1/2 .. 1/2 and never returns, so that saturation gives 0 far below, and x far above.
    """
    square = x * x
    series = -3.7544039e-9 + square * 3.56986e-11
    series = 1.74097053e-7 + square * series
    series = -4.72509601e-6 + square * series
    series = 8.4295425e-5 + square * series
    series = -0.0010550071 + square * series
    series = 0.00964307506 + square * series
    series = -0.0660765022 + square * series
    series = 0.39876166 + square * series
    return x * _above_half(x, series)


@triton.jit
def activate(x, KIND: tl.constexpr, ROUNDED: tl.constexpr = False):
    """silu(x), or gelu(x) by the error function or by tanh; float32. ROUNDED: the result is, to 16 bits."""
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    elif KIND == 1 and ROUNDED:
        return _rounded_gelu(x)
    elif KIND == 1:
        return 0.5 * x * (1.0 + erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))


@triton.jit
def finish(total, up, KIND: tl.constexpr, GATED: tl.constexpr, ROUNDED: tl.constexpr = False):
    """act(total), times ``up`` if gated; float32. ROUNDED: the result is, to 16 bits."""
    if KIND >= 0:
        total = activate(total, KIND, ROUNDED)
    if GATED:
        total = total * up
    return total


@triton.jit
def load_or_zeros(vector, n, end, WANTED: tl.constexpr):
    """Elements n of a bias or residual, as they are; zeros from ``end`` on, and everywhere if there is no vector."""
    if WANTED:
        return tl.load(vector + n, mask=n < end, other=0.0)
    else:
        return tl.zeros(n.shape, tl.float32)


@triton.jit
def store_line(
    total, up, bias_line, up_bias_line, added, out, n, N, GATED: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Writes one row's outputs n: act(total + bias_line) (* (up + up_bias_line), gated) + added."""
    total = finish(total + bias_line.to(tl.float32), up + up_bias_line.to(tl.float32), ACTIVATION, GATED)
    total += added.to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


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
