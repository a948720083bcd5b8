"""Activations of whole tensors, gated or not: what follows a matrix product that another library computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.device import has_dependent_launch
from accel_kernels.tiles import activate, let_successor_start, wait_for_predecessor


@triton.jit
def activation_kernel(
    x, out, N, STRIPE, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """out[t, n] = act(x[t, n]) (* its partner, STRIPE columns on, gated)."""
    line = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    if GATED:
        place = x + line * 2 * N + n // STRIPE * (2 * STRIPE) + n % STRIPE
    else:
        place = x + line * N + n
    value = activate(tl.load(place, mask=n < N, other=0.0).to(tl.float32), KIND)
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
    """x: [T, N], gated [T, 2N] in ``stripe`` columns of the gate, as many of the other ... (None: N); out: [T, N]."""
    tokens, count = out.shape
    dependent = has_dependent_launch(x.device) if dependent is None else dependent
    activation_kernel[(tokens, triton.cdiv(count, block))](
        x,
        out,
        count,
        stripe or count,
        KIND=kind,
        GATED=gated,
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=warps,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
