"""RMS norm and layer norm of rows, a residual added first if there is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel_kernels.bodies import HEADER
from accel_kernels.checks import Expect
from accel_kernels.device import launch_options
from accel_kernels.plain import normed
from accel_kernels.row_pieces import (
    add_pieces,
    load_pieces,
    multiply_pieces,
    normalize_pieces,
    row_options,
    store_pieces,
)
from accel_kernels.tiles import LAYER_NORM, RMS_NORM, from_the_end, let_successor_start, wait_for_predecessor

BODY = (
    HEADER
    + """
Norm <kind: int = 1, eps> (x, residual, weight, bias) => (out, stream)
{
    rows = Cast <to = 1> (x)
    parts = Cast <to = 1> (residual)
    first = Constant <value_ints = [0]> ()
    added = ReduceSum <keepdims = 0> (parts, first)
    stream = Add (rows, added)
    out = accel.kernels.Normalize <norm: int = @kind, eps: float = @eps> (stream, weight, bias)
}
"""
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    kind: int = RMS_NORM,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``norm`` computes of the same arguments: norm and sum, float64 [T, K] each."""
    stream = x.double()
    if residual is not None:
        stream = stream + residual.double().reshape(-1, *x.shape).sum(0)
    return normed(stream, kind, weight, bias, eps), stream


@triton.jit(do_not_specialize=["T"])  # a T of 1 would be a number without a type
def norm_kernel(
    x, residual, stream, out, weight, bias, T, eps,
    K: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr,
    HAS_STREAM: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """stream = x + residual, which may come in parts; out = norm(stream); ROWS of T rows of K per program."""
    row = (from_the_end(0) * ROWS + tl.arange(0, ROWS))[:, None]
    there, line, same = row < T, row.to(tl.int64) * K, tl.zeros((ROWS, 1), tl.int32)
    factors = load_pieces(weight, same, there, K, PIECE)
    if HAS_BIAS:
        shifts = load_pieces(bias, same, there, K, PIECE)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    rows = load_pieces(x, line, there, K, PIECE)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            added = load_pieces(residual + part * T.to(tl.int64) * K, line, there, K, PIECE)
            rows = add_pieces(rows, added)
        if HAS_STREAM:
            store_pieces(stream, line, there, rows, K, PIECE)
    rows = multiply_pieces(normalize_pieces(rows, K, PIECE, eps, NORM), factors)
    if HAS_BIAS:
        rows = add_pieces(rows, shifts)
    store_pieces(out, line, there, rows, K, PIECE)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
    kind: int = RMS_NORM,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stream: torch.Tensor | None = None,
    together: bool | None = None,
    dependent: bool | None = None,
) -> torch.Tensor:
    """out = norm(x + residual), the sum also into ``stream``. Every tensor on one device, contiguous.

    Args:
        x: [T, K].
        weight, bias: [K]; read before the predecessor ends: no kernel of ours in the same run may write them.
        out: [T, K], written.
        kind: RMS_NORM or LAYER_NORM.
        residual: [T, K], or [P, T, K]: parts to be added up.
        stream: [T, K], written; may be ``x``; only with a residual.
        together: Whether several rows share a program, see ``row_pieces``; None: where that is faster.
        dependent: Start before the predecessor ends; None: where the device can.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; a stream without a residual.
    """
    _check(x, weight, out, kind, bias, residual, stream)
    rows, size = x.shape
    options = row_options(rows, size, together)
    norm_kernel[(triton.cdiv(rows, options["ROWS"]),)](
        x, residual, stream, out, weight, bias, rows, eps,
        K=size, NORM=kind, PARTS=0 if residual is None else len(residual) if residual.ndim == 3 else 1,
        HAS_STREAM=stream is not None, HAS_BIAS=bias is not None, **options,
        **launch_options(x.device, dependent, 4),
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    kind: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stream: torch.Tensor | None,
) -> None:
    expect = Expect("norm", x.device)
    expect.tensor("x", x, -1, -1)
    rows, size = x.shape
    expect.tensor("weight", weight, size)
    expect.tensor("bias", bias, size)
    expect.tensor("out", out, rows, size)
    parts = (-1,) * (residual is not None and residual.ndim == 3)
    expect.tensor("residual", residual, *parts, rows, size)
    expect.tensor("stream", stream, rows, size)
    expect.that(stream is None or residual is not None, "a stream without a residual would stay unwritten")
    expect.that(kind in (RMS_NORM, LAYER_NORM), f"unknown norm {kind}")


__all__ = ["BODY", "TOLERANCES", "norm", "reference"]
