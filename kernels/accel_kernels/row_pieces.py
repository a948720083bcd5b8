"""Rows in pieces: tuples of [ROWS, PIECE], where PIECE is a power of two and a row's size need not be one.

Where rows are many and short a program takes several, each warp one: sums over a row of a multiple of four elements
need no barrier then, at most PIECE - 1 elements are padding, and memory is always asked for the next rows. A few rows,
or long ones, get a program each.
"""

# Triton's tuples can be added, not unpacked, and grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from accel_kernels.device import next_power_of_2

_MANY = 2048  # rows from which several share a program
_SHORT = 1024  # elements up to which a warp's registers hold a row, and what is added to it, and others besides
_REGISTERS = 64  # of a thread where a program has one such row
_TOGETHER, _PIECE = 4, 128  # rows of a program of four warps; elements that one warp reads at once


def row_options(rows: int, size: int, together: bool | None = None) -> dict[str, int]:
    """ROWS and PIECE, perhaps maxnreg, of a kernel's launch of four warps, for so many rows of ``size`` elements.

    Args:
        together: Whether several rows share a program; None: where that is faster.
    """
    together = rows >= _MANY and size <= _SHORT if together is None else together
    longest = next_power_of_2(size)
    if together:
        return {"ROWS": _TOGETHER, "PIECE": min(_PIECE, longest)}
    # Of itself the assembler saves registers where it should ask for all that is added before the first is there.
    # Where rows go together it does ask, and the same bound made them take half as long again.
    return {"ROWS": 1, "PIECE": longest} | ({"maxnreg": _REGISTERS} if size <= _SHORT else {})


@triton.jit
def _inside(there, piece, K: tl.constexpr, PIECE: tl.constexpr):
    """Which elements of a piece exist: [ROWS, PIECE], or [ROWS, 1] where none is behind a row's end."""
    if K % PIECE == 0:
        return there
    else:
        return there & (piece * PIECE + tl.arange(0, PIECE) < K)[None, :]


@triton.jit
def load_pieces(base, line, there, K: tl.constexpr, PIECE: tl.constexpr):
    """Rows of K elements that start at ``line`` [ROWS, 1], in their type; zeros behind their ends, and where
    ``there`` [ROWS, 1] says that there is no row.
    """
    COUNT: tl.constexpr = (K + PIECE - 1) // PIECE
    pieces = ()
    for piece in tl.static_range(COUNT):
        place = base + line + (piece * PIECE + tl.arange(0, PIECE))[None, :]
        pieces = pieces + (tl.load(place, mask=_inside(there, piece, K, PIECE), other=0.0),)
    return pieces


@triton.jit
def store_pieces(base, line, there, pieces, K: tl.constexpr, PIECE: tl.constexpr):
    """Where ``load_pieces`` reads, in the type of what is there."""
    for piece in tl.static_range(len(pieces)):
        place = base + line + (piece * PIECE + tl.arange(0, PIECE))[None, :]
        tl.store(place, pieces[piece].to(base.dtype.element_ty), mask=_inside(there, piece, K, PIECE))


@triton.jit
def add_pieces(pieces, others):
    """The sums, float32."""
    sums = ()
    for piece in tl.static_range(len(pieces)):
        sums = sums + (pieces[piece].to(tl.float32) + others[piece].to(tl.float32),)
    return sums


@triton.jit
def multiply_pieces(pieces, others):
    """The products, float32."""
    products = ()
    for piece in tl.static_range(len(pieces)):
        products = products + (pieces[piece].to(tl.float32) * others[piece].to(tl.float32),)
    return products


@triton.jit
def _row_sums(pieces):
    """[ROWS, 1], of float32."""
    total = pieces[0]
    for piece in tl.static_range(1, len(pieces)):
        total += pieces[piece]
    return tl.sum(total, 1)[:, None]


@triton.jit
def _centred(pieces, K: tl.constexpr, PIECE: tl.constexpr):
    """Rows, float32, less their means; zeros behind their ends."""
    mean = _row_sums(pieces) / K
    centred = ()
    for piece in tl.static_range(len(pieces)):
        value = pieces[piece] - mean
        if K % PIECE != 0:
            value = tl.where((piece * PIECE + tl.arange(0, PIECE) < K)[None, :], value, 0.0)
        centred = centred + (value,)
    return centred


@triton.jit
def normalize_pieces(pieces, K: tl.constexpr, PIECE: tl.constexpr, eps, NORM: tl.constexpr):
    """The norms of rows, without weights, float32. NORM: RMS_NORM or LAYER_NORM of ``tiles``."""
    rows = ()
    for piece in tl.static_range(len(pieces)):
        rows = rows + (pieces[piece].to(tl.float32),)
    if NORM == 2:
        rows = _centred(rows, K, PIECE)
    scale = tl.rsqrt(_row_sums(multiply_pieces(rows, rows)) / K + eps)
    normal = ()
    for piece in tl.static_range(len(rows)):
        normal = normal + (rows[piece] * scale,)
    return normal


__all__ = ["add_pieces", "load_pieces", "multiply_pieces", "normalize_pieces", "row_options", "store_pieces"]
