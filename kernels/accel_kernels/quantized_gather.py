"""Rows of an embedding table of int4 or int8 weights in groups; without ids, the whole table in floats."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import INDICES, Expect
from accel_kernels.device import launch_options, next_power_of_2
from accel_kernels.packing import unpack
from accel_kernels.tiles import let_successor_start, unpacked, wait_for_predecessor

BODY = (
    HEADER
    + """
QuantizedGather <bits> (table, scales, ids) => (out)
{
    words = Gather <axis = 0> (table, ids)
    factors = Gather <axis = 0> (scales, ids)
    out = accel.kernels.Unpack <bits: int = @bits> (words, factors)
}
"""
)
# Exact in float32: an integer times a scale of 11 bits. Otherwise rounded once.
TOLERANCES = {torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_MOST_WORDS = 512  # of a row at a time


def reference(table: torch.Tensor, scales: torch.Tensor, ids: torch.Tensor | None = None, *, bits: int) -> torch.Tensor:
    """What ``quantized_gather`` reads: float64 [T, K]."""
    if ids is not None:
        table, scales = table[ids.long()], scales[ids.long()]
    return unpack(table, scales, bits).double()


@triton.jit
def quantized_gather_kernel(
    table, scales, ids, out, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_W: tl.constexpr, HAS_IDS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[t] = table[ids[t]] of words [V, K * BITS / 32] and scales [V, K / GROUP]; one program per row and piece."""
    FIELDS: tl.constexpr = 32 // BITS
    row = tl.program_id(0)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    k = tl.program_id(1) * BLOCK_W * FIELDS + tl.arange(0, BLOCK_W * FIELDS)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    line = row.to(tl.int64)
    if HAS_IDS:
        line = tl.load(ids + row).to(tl.int64)
    words = tl.load(table + line * (K // FIELDS) + w, mask=w < K // FIELDS, other=0)
    factor = tl.load(scales + line * (K // GROUP) + k // GROUP, mask=k < K, other=0.0).to(tl.float32)
    value = tl.reshape(unpacked(words[None], BITS), (BLOCK_W * FIELDS,)).to(tl.float32) * factor
    tl.store(out + row.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=k < K)


def quantized_gather(
    table: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    ids: torch.Tensor | None = None,
    *,
    bits: int,
    dependent: bool | None = None,
) -> torch.Tensor:
    """Rows of a quantised table, dequantised. Every tensor on one device, contiguous.

    Args:
        table, scales: As ``packing`` has them for [V, K].
        out: [T, K], written; of any float type.
        ids: int32 or int64 [T], from 0 to V - 1; nothing checks that on the device. None: all rows, T = V.
        bits: 4 or 8.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; another number of bits.
    """
    expect = Expect("quantized_gather", table.device)
    expect.that(bits in (4, 8), f"weights of {bits} bits; there are 4 and 8")
    expect.tensor("table", table, -1, -1, dtypes=(torch.int32,))
    expect.tensor("scales", scales, len(table), -1)
    fields = 32 // bits
    size = table.shape[1] * fields
    expect.groups(scales.shape[1], size, fields)
    expect.tensor("ids", ids, -1, dtypes=INDICES)
    rows = len(table) if ids is None else ids.numel()
    expect.tensor("out", out, rows, size)
    if rows == 0:
        return out
    block = min(_MOST_WORDS, next_power_of_2(table.shape[1]))
    quantized_gather_kernel[(rows, triton.cdiv(table.shape[1], block))](
        table, scales, ids, out, size, BITS=bits, GROUP=size // scales.shape[1], BLOCK_W=block,
        HAS_IDS=ids is not None, **launch_options(table.device, dependent, 4),
    )  # fmt: skip
    return out


__all__ = ["BODY", "TOLERANCES", "quantized_gather", "reference"]
