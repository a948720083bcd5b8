"""Many rows times a weight matrix on SM 90, with a job for each group of warps.

Two groups multiply, each one half of a tile's rows, and the first one fetches for both: one copy brings the rows of
both halves, one the weights they share. It knows from its own program which terms it has done with, so only the second
group says so. A third one adds the bias, applies the activation, adds a residual and stores, from its registers, while
the others are at the next tile: an epilogue costs the tensor cores no more than the way of the sums through shared
memory, once, in the engine's type, and what its instructions and stores take from the others. Two halves of 64 x 256
read less from shared memory and from the L2 than any tile that one group can hold.

Written in Gluon: Triton's compiler gives warps no jobs on SM 90. Its interpreter does not know Gluon: where there is no
GPU, the tests simulate the jobs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from accel_kernels.checks import Expect
from accel_kernels.device import has_warp_jobs, multiprocessors
from accel_kernels.narrow_gemm import BODY as NARROW_BODY
from accel_kernels.narrow_gemm import reference
from accel_kernels.tiles import ACTIVATIONS, NO_ACTIVATION, activate
from accel_kernels.wide_gemm import place

BODY = NARROW_BODY.replace("NarrowGemm", "SpecializedGemm")  # one op, computed by other means; so is its reference
# Sums are rounded before bias and activation, and once more behind them.
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
HEIGHT, WIDTH, DEPTH, STAGES = 64, 256, 64, 3  # rows of a half, outputs and terms of a tile, turns in flight
TILE = f"2 x {HEIGHT} by {WIDTH}, {DEPTH} terms, stages {STAGES}"  # in words
HALVED = f"{TILE}, those left halved"
PIECE = 64  # outputs that are stored at once
STRIPE = WIDTH // 2  # rows of the gate, and of the other matrix, in a gated tile
# Triton 3.9 calls it by a shorter name than 3.6.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_NAN = gl.constexpr(tl.PropagateNan.ALL)
_ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def _unit(unit, WHOLE, M, COUNT, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr):
    """First row and first output of a unit of work, and whether it is a tile: WHOLE tiles, then halves of those left.

    Halves are for tiles that would fill half of the programs or fewer: each gets a program of its own.
    """
    behind = gl.maximum(unit - WHOLE, 0)
    m, n = place(unit - behind + behind // 2, M, COUNT, 2 * HEIGHT, WIDTH, GROUP)
    return m + behind % 2 * HEIGHT, n, unit < WHOLE


@gluon.jit
def _onwards(
    ahead, m, n, k, WHOLE, M, COUNT, K, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, DEPTH: gl.constexpr,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The turn behind one: a unit's next terms, or the first ones of the program's next unit."""
    k += DEPTH
    if k >= K:
        k = 0
        ahead += PROGRAMS
        m, n, _ = _unit(ahead, WHOLE, M, COUNT, HEIGHT, WIDTH, GROUP)
    return ahead, m, n, k


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    """The stage behind, and its phase, which changes when all were passed; scalars."""
    wrapped = stage + 1 == STAGES
    return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _fetch(x, weight, xs, ws, full, stage, m, n, k, pred):
    """One turn into a stage: [2 * HEIGHT, DEPTH] from (m, k) of x, the rows of both halves or of one that is alone and
    as many below it, and [WIDTH, DEPTH] from (n, k) of the weights; zeros behind the ends, which are counted as bytes.
    """
    bar = full.index(stage)
    _load(x, [m, k], bar, xs.index(stage), pred=pred)
    _load(weight, [n, k], bar, ws.index(stage), pred=pred)


@gluon.jit
def _hand_over(sums, parts, first, COUNT: gl.constexpr):
    """The columns of sums [HEIGHT, COUNT * PIECE] into parts[first] and the ones behind it, [HEIGHT, PIECE] each."""
    if COUNT == 1:
        parts.index(first).store(sums)
    else:
        HIGH: gl.constexpr = sums.shape[0]
        WIDE: gl.constexpr = sums.shape[1] // 2
        left, right = sums.reshape((HIGH, 2, WIDE)).permute((0, 2, 1)).split()
        _hand_over(left, parts, first, COUNT // 2)
        _hand_over(right, parts, first + COUNT // 2, COUNT // 2)


@gluon.jit
def _skip(full, empty, stage, phase, turns, STAGES: gl.constexpr):
    """The turns of a half that is alone, which the second group does not multiply."""
    for _ in range(turns):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _after(stage, phase, STAGES)


@gluon.jit
def _multiply(
    x, weight, xs, ws, parts, full, empty, ready, free, M, COUNT, K, WHOLE, UNITS,
    HALF: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Sums [HEIGHT, WIDTH], float32, of one half of each tile's rows. The first half's warps fetch for both, as soon as
    their own products of a turn are done and the second half's warps say the same, and multiply halves that are alone.
    """
    STAGES: gl.constexpr = ws.shape[0]
    HEIGHT: gl.constexpr = xs.shape[1] // 2
    WIDTH: gl.constexpr = ws.shape[1]
    DEPTH: gl.constexpr = ws.shape[2]
    SIZE: gl.constexpr = (2 * HEIGHT + WIDTH) * DEPTH * 2  # bytes of a turn's elements with 16 bits
    PIECES: gl.constexpr = parts.shape[0] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ahead = gl.program_id(0)  # the unit that is fetched, its place, term, stage
    m, n, _ = _unit(ahead, WHOLE, M, COUNT, HEIGHT, WIDTH, GROUP)
    k, stage_ahead, phase_ahead = 0, 0, 1
    if HALF == 0:
        for _ in range(STAGES - 1):
            mbarrier.expect(full.index(stage_ahead), SIZE, pred=ahead < UNITS)
            _fetch(x, weight, xs, ws, full, stage_ahead, m, n, k, ahead < UNITS)
            stage_ahead += 1
            ahead, m, n, k = _onwards(ahead, m, n, k, WHOLE, M, COUNT, K, HEIGHT, WIDTH, DEPTH, GROUP, PROGRAMS)
    stage, phase, last, sent = 0, 0, 0, 1
    total = gl.zeros((HEIGHT, WIDTH), gl.float32, layout)  # once: a unit's first turn does not read it
    for _ in range(gl.program_id(0), UNITS if HALF == 0 else WHOLE, PROGRAMS):
        for turn in range(gl.cdiv(K, DEPTH)):
            mbarrier.wait(full.index(stage), phase)
            rows, lines = xs.index(stage).slice(HEIGHT * HALF, HEIGHT), ws.index(stage).permute((1, 0))
            total = warpgroup_mma(rows, lines, total, use_acc=turn > 0, is_async=True)
            if HALF == 0:  # what costs a barrier of the group goes where it waits anyway
                more = ahead < UNITS
                mbarrier.expect(full.index(stage_ahead), SIZE, pred=more)
                total = warpgroup_mma_wait(1, deps=[total])
                mbarrier.wait(empty.index(stage_ahead), phase_ahead, pred=more)
                _fetch(x, weight, xs, ws, full, stage_ahead, m, n, k, more)
                stage_ahead, phase_ahead = _after(stage_ahead, phase_ahead, STAGES)
                ahead, m, n, k = _onwards(ahead, m, n, k, WHOLE, M, COUNT, K, HEIGHT, WIDTH, DEPTH, GROUP, PROGRAMS)
            else:
                total = warpgroup_mma_wait(1, deps=[total])
                mbarrier.arrive(empty.index(last), count=1, pred=turn > 0)
            last = stage
            stage, phase = _after(stage, phase, STAGES)
        total = warpgroup_mma_wait(0, deps=[total])
        if HALF == 1:
            mbarrier.arrive(empty.index(last), count=1)
        mbarrier.wait(free.index(HALF), sent)
        sent ^= 1
        _hand_over(total.to(parts.dtype), parts, PIECES * HALF, PIECES)
        mbarrier.arrive(ready.index(HALF), count=1)
    if HALF == 1:  # a program has at most one half that is alone
        _skip(full, empty, stage, phase, gl.where(WHOLE + gl.program_id(0) < UNITS, gl.cdiv(K, DEPTH), 0), STAGES)


@gluon.jit
def _sums(part, layout: gl.constexpr, ACTIVATION: gl.constexpr):
    """A piece of sums, float32. An activation is 0 of a sum below all float16, but no number of -inf."""
    value = part.load(layout)
    if ACTIVATION >= 0 and part.dtype == gl.float16:
        value = gl.maximum(value, gl.full(part.shape, -65504.0, part.dtype, layout), propagate_nan=_NAN)
    return value.to(gl.float32)


@gluon.jit
def _finish(
    out, bias, residual, parts, ready, free, M, COUNT, WHOLE, UNITS,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Bias [N], activation, residual [M, N] and stores of both halves' sums, one piece [HEIGHT, PIECE] after another;
    N outputs of COUNT lines.

    Registers go straight to memory: the way through shared memory took as long, and needed fences and waits.
    """
    N = COUNT // (16 if GATED else 8) * 8  # rows are multiples of 16 bytes: so the compiler knows, and takes 16 at once
    HEIGHT: gl.constexpr = parts.shape[1]
    PIECE: gl.constexpr = parts.shape[2]
    WIDTH: gl.constexpr = parts.shape[0] * PIECE // 2
    STORED: gl.constexpr = WIDTH // PIECE // (2 if GATED else 1)  # pieces of a half
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    phase = 0
    for unit in range(gl.program_id(0), UNITS, PROGRAMS):
        m, n, both = _unit(unit, WHOLE, M, COUNT, HEIGHT, WIDTH, GROUP)
        left = n // 2 if GATED else n
        for half in range(gl.where(both, 2, 1)):
            row = m + half * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout))
            column = left + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
            there = row.to(gl.int64)[:, None] * N + column[None, :]
            inside = (row < M)[:, None] & (column < N)[None, :]
            # What is added is asked for ahead of the sums, then one piece ahead: memory takes longer than a piece does.
            if HAS_BIAS:
                next_line = gl.load(bias + column, mask=column < N, other=0.0)
            if HAS_RESIDUAL:
                next_added = gl.load(residual + there, mask=inside, other=0.0)
            mbarrier.wait(ready.index(half), phase)
            for piece in gl.static_range(STORED):
                target, stored = out + there, inside
                column += PIECE
                there += PIECE
                inside = (row < M)[:, None] & (column < N)[None, :]
                value = _sums(parts.index(half * (WIDTH // PIECE) + piece), layout, ACTIVATION)
                if HAS_BIAS:
                    value += next_line.to(gl.float32)[None, :]
                    if piece + 1 < STORED:
                        next_line = gl.load(bias + column, mask=column < N, other=0.0)
                if ACTIVATION >= 0:
                    value = activate(value, ACTIVATION, True)
                if GATED:
                    value *= parts.index(half * (WIDTH // PIECE) + STORED + piece).load(layout).to(gl.float32)
                if HAS_RESIDUAL:
                    value += next_added.to(gl.float32)
                    if piece + 1 < STORED:
                        next_added = gl.load(residual + there, mask=inside, other=0.0)
                gl.store(target, value.to(parts.dtype), mask=stored)
            mbarrier.arrive(free.index(half), count=1)
        phase ^= 1


@gluon.jit(do_not_specialize=["WHOLE", "UNITS"])
def specialized_gemm_kernel(
    x, weight, out, bias, residual, M, COUNT, K, WHOLE, UNITS,
    PIECE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """out[m, n] = act(x[m] . weight[n] + bias[n]) (* its partner, gated) + residual[m, n]; x and weight are
    descriptors. UNITS of work: WHOLE tiles, a multiple of PROGRAMS unless they are all, and halves.
    """
    HEIGHT: gl.constexpr = x.block_shape[0] // 2
    DEPTH: gl.constexpr = x.block_shape[1]
    WIDTH: gl.constexpr = weight.block_shape[0]
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, 2 * HEIGHT, DEPTH], x.layout)
    ws = gl.allocate_shared_memory(weight.dtype, [STAGES, WIDTH, DEPTH], weight.layout)
    parts = gl.allocate_shared_memory(x.dtype, [2 * WIDTH // PIECE, HEIGHT, PIECE], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())  # a turn is there
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())  # the second half is done
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # a half's sums are there
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # they are stored
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for half in gl.static_range(2):
        mbarrier.init(ready.index(half), count=1)
        mbarrier.init(free.index(half), count=1)
    fence_async_shared()
    # Registers of each thread: 128 sums and their addresses, and what an activation takes. The tuples have no names:
    # what is assigned to one is no constexpr any more.
    gl.warp_specialize(
        [
            (_multiply, (
                x, weight, xs, ws, parts, full, empty, ready, free, M, COUNT, K, WHOLE, UNITS, 0, GROUP, PROGRAMS,
            )),
            (_multiply, (
                x, weight, xs, ws, parts, full, empty, ready, free, M, COUNT, K, WHOLE, UNITS, 1, GROUP, PROGRAMS,
            )),
            (_finish, (
                out, bias, residual, parts, ready, free, M, COUNT, WHOLE, UNITS, GROUP, PROGRAMS, HAS_BIAS,
                HAS_RESIDUAL, GATED, ACTIVATION,
            )),
        ],
        [4, 4],
        [200, 96],
    )  # fmt: skip


def specialized_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    activation: int = NO_ACTIVATION,
    group: int = 8,
    programs: int | None = None,
    halves: bool = False,
) -> torch.Tensor:
    """act(x W^T + bias) + residual. Every tensor on one device, contiguous, each row a multiple of 16 bytes.

    x W^T has to be within x's type before the bias comes, as where cuBLAS computes it, and so has the sum with the
    residual.

    Args:
        x: [M, K] in float16 or bfloat16.
        weight: [N, K]; gated: [2N, K] in stripes of ``STRIPE`` rows that divide N, and no bias.
        out: [M, N] in x's type, written.
        bias: [N], float32 or x's type.
        residual: [M, N], likewise; not gated.
        activation: SILU, GELU_ERF, GELU_TANH or NO_ACTIVATION (not gated); gated: of the gate.
        group: Tiles of rows that share their weights in the L2.
        programs: How many stay; None: one per multiprocessor.
        halves: Of tiles that are left for half of the programs or fewer, each half gets a program.

    Raises:
        TypeError, ValueError: A tensor has another type, shape or place; the GPU has no SM 90.
    """
    _check(x, weight, out, bias, residual, gated, activation)
    (rows, size), lines = x.shape, len(weight)
    tiles = _tiles(rows, lines)
    programs = multiprocessors(x.device) if programs is None else programs
    whole, units = shares(tiles, programs) if halves else (tiles, tiles)
    programs = min(programs, units)
    blocks = (x, [2 * HEIGHT, DEPTH]), (weight, [WIDTH, DEPTH])
    specialized_gemm_kernel[(programs,)](
        *(_described(tensor, block) for tensor, block in blocks), out,
        *(out if tensor is None else tensor for tensor in (bias, residual)), rows, lines, size, whole, units,
        PIECE=PIECE, STAGES=STAGES, GROUP=group, PROGRAMS=programs, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, GATED=gated, ACTIVATION=activation, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def can_halve(x: torch.Tensor, lines: int) -> bool:
    """Whether ``halves`` makes a difference for x [M, K] and a matrix of so many lines, on x's device."""
    tiles = _tiles(len(x), lines)
    return shares(tiles, multiprocessors(x.device))[0] < tiles


def _tiles(rows: int, lines: int) -> int:
    return triton.cdiv(rows, 2 * HEIGHT) * triton.cdiv(lines, WIDTH)


def shares(tiles: int, programs: int) -> tuple[int, int]:
    """(tiles that are computed as a whole, units of work): those left for half of the programs or fewer are halved."""
    left = tiles % programs
    whole = tiles - left if 2 * left <= programs else tiles
    return whole, 2 * tiles - whole


def _described(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
    activation: int,
) -> None:
    expect = Expect("specialized_gemm", x.device)
    expect.that(has_warp_jobs(x.device), "the GPU has no SM 90, or the interpreter runs the kernels")
    expect.tensor("x", x, -1, -1, dtypes=tuple(_ELEMENTS))
    (rows, size), count = x.shape, out.shape[-1]
    expect.tensor("weight", weight, (1 + gated) * count, size, dtypes=(x.dtype,))
    expect.tensor("out", out, rows, count, dtypes=(x.dtype,))
    expect.tensor("bias", bias, count)
    expect.tensor("residual", residual, rows, count)
    expect.that(not gated or (bias is None and residual is None), "a gated product has no bias and no residual")
    expect.that(activation in ACTIVATIONS, f"unknown activation {activation}")
    expect.that(not gated or activation != NO_ACTIVATION, "a gated product needs an activation")
    expect.that(not gated or count % STRIPE == 0, f"stripes of {STRIPE} do not divide {count}")
    expect.described(x=x, weight=weight, out=out)


__all__ = ["BODY", "HALVED", "STRIPE", "TILE", "TOLERANCES", "can_halve", "reference", "shares", "specialized_gemm"]
