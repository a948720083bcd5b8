"""Operators for ONNX Runtime on CPUs, in the domain ``accel.cpu``, most on quantised weights, and how those are packed.

``QuantizedMatMul(x, weight, scales, bias?, x_scale?, residual?, norm_weight?, norm_bias?) -> y, normalised?``
    y = activation(x @ dequantised(weight).T + bias) + residual, float32 ``[..., N]`` from float32 ``[..., K]``. With
    ``norm_weight`` x is first normalised, by LayerNorm over K with the attribute ``epsilon``, and the second output
    holds it. The other attributes are all required: ``N``, ``K``, ``bits`` (8 or 4), ``block_size`` (0: one float32
    scale per output; 32, 64, 128: one float16 scale per output and group of that many inputs), ``activation`` ("",
    "gelu", "gelu_tanh", "silu"), ``gated`` (1: the weight holds a gate and an up projection, see
    ``interleave_gated``; y = activation(gate(x)) * up(x) + residual).

``QuantizedGather(ids, weight, scales) -> y``
    Rows of the same packed weight, dequantised: float32 ``[..., K]`` from int64 ``[...]``. Attributes ``N``, ``K``,
    ``bits``, ``block_size``.

``ArgMax(x) -> (index, value)``
    The largest value of each row and its place, the first among equals; a NaN wins. int64 and float32 ``[...]`` from
    float32 ``[..., N]``.

``Attention(q, k?, v?, mask?) -> y``
    softmax(q k^T scale) v of encoders, head by head: float32 ``[B, S, num_heads * D]`` from three such tensors, or from
    one of ``[B, S, 3 * num_heads * D]`` that holds q, k and v side by side. Keys are hidden where ``mask``, int32
    ``[B, S]``, is 0; a row with nothing to look at gives finite numbers. Attributes ``num_heads``, ``scale``; D is at
    most 256. Products are formed in bfloat16, with sums in float32, where the CPU has AVX512_BF16; else in float32.

Activations of products with a weight are quantised at run time to int8 in [-127, 127], symmetric, rounded to even: one
scale per row of x where ``block_size`` is 0, else one per row and group of inputs; or the given ``x_scale`` for all.
Products are summed up in int32, exactly, and scaled in float32. A row of x that holds NaN or infinity gives a row of
NaN.

The environment variable ACCEL_CPU_ISA (avx512bf16, avx512vnni, avx2, portable) forces an instruction set, for tests.
"""

from accel_cpu.library import instruction_set, library_path, unavailable_reason
from accel_cpu.packing import (
    PANEL,
    TILE,
    interleave_gated,
    pack,
    pack_scales,
    packed_size,
    unpack,
    unpack_scales,
)

DOMAIN = "accel.cpu"
ARGMAX = "ArgMax"
ATTENTION = "Attention"
MATMUL = "QuantizedMatMul"
GATHER = "QuantizedGather"
LARGEST_HEAD = 256  # numbers, of Attention

__all__ = [
    "ARGMAX",
    "ATTENTION",
    "DOMAIN",
    "GATHER",
    "LARGEST_HEAD",
    "MATMUL",
    "PANEL",
    "TILE",
    "instruction_set",
    "interleave_gated",
    "library_path",
    "pack",
    "pack_scales",
    "packed_size",
    "unavailable_reason",
    "unpack",
    "unpack_scales",
]
