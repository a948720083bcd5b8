"""Activations of whole tensors, gated or not: what follows a matrix product that another library computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import Expect
from accel_kernels.device import launch_options
from accel_kernels.plain import activated, gate_and_other
from accel_kernels.tiles import (
    ACTIVATIONS,
    NO_ACTIVATION,
    activate,
    let_successor_start,
    matrix_line,
    wait_for_predecessor,
)

BODY = (
    HEADER
    + """
Activation <kind, gated: int = 0, stripe> (x) => (out)
{
    rows = Cast <to = 1> (x)
    axis = Constant <value_ints = [1]> ()
    width = Shape <start = 1, end = 2> (x)
    nothing = ConstantOfShape <value = float[1] {0}> (width)
    out = accel.kernels.Gate <gated: int = @gated, stripe: int = @stripe, activation: int = @kind> (rows, nothing)
}
"""
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(x: torch.Tensor, *, kind: int, gated: bool, stripe: int | None = None) -> torch.Tensor:
    """What ``activation`` computes of the same arguments: float64 [T, N]."""
    if not gated:
        return activated(x.double(), kind)
    gate, other = gate_and_other(x.double(), stripe)
    return activated(gate, kind) * other


@triton.jit
def activation_kernel(
    x, out, N, STRIPE, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """out[t, n] = act(x[t, n]) (* its partner, STRIPE columns on, gated)."""
    line = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    place = x + line * N * (2 if GATED else 1) + matrix_line(n, STRIPE, GATED)
    value = activate(tl.load(place, mask=n < N, other=0.0).to(tl.float32), KIND, out.dtype.element_ty != tl.float32)
    if GATED:
        value *= tl.load(place + STRIPE, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + line * N + n, value.to(out.dtype.element_ty), mask=n < N)


def activation(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    kind: int,
    gated: bool,
    stripe: int | None = None,
    block: int = 2048,
    warps: int = 4,
    dependent: bool | None = None,
) -> torch.Tensor:
    """act(x), gated or not. Both tensors on one device, contiguous.

    Args:
        x: [T, N]; gated: [T, 2N], ``stripe`` columns of the gate, as many of the other, and so on.
        out: [T, N], written; may be ``x`` if not gated.
        kind: SILU, GELU_ERF or GELU_TANH.
        stripe: Divides N; None: N.
        block: Elements per program.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place.
    """
    expect = Expect("activation", x.device)
    expect.tensor("out", out, -1, -1)
    tokens, count = out.shape
    expect.tensor("x", x, tokens, (1 + gated) * count)
    expect.that(kind in ACTIVATIONS and kind != NO_ACTIVATION, f"unknown activation {kind}")
    expect.stripe(stripe, count)
    activation_kernel[(tokens, triton.cdiv(count, block))](
        x, out, count, stripe or count, KIND=kind, GATED=gated, BLOCK=block,
        **launch_options(x.device, dependent, warps),
    )  # fmt: skip
    return out


__all__ = ["BODY", "TOLERANCES", "activation", "reference"]
