from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close
from tests.kernels.warp_jobs import simulated

torch = pytest.importorskip("torch")
from accel_kernels import specialized_gemm as made  # noqa: E402
from accel_kernels.device import has_warp_jobs  # noqa: E402
from accel_kernels.specialized_gemm import (  # noqa: E402
    STRIPE,
    TOLERANCES,
    can_halve,
    reference,
    shares,
    specialized_gemm,
)
from accel_kernels.tiles import GELU_ERF, GELU_TANH, NO_ACTIVATION, SILU  # noqa: E402

ROWS, COUNT, SIZE = 300, 712, 416  # the last tiles and the last turn are not full
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from accel_kernels import specialized_gemm as made

def described(*block):
    layout = gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, "{name}"))
    return f"tensordesc<{short}[{{block[0]}}, {{block[1]}}],{{layout!r}}>"

kernel = made.specialized_gemm_kernel
types = {{"x": described(2 * made.HEIGHT, made.DEPTH), "weight": described(made.WIDTH, made.DEPTH)}}
types |= {{"out": "*{short}", "bias": "*fp32", "residual": "*{short}"}}
types |= {{name: "i32" for name in ("M", "COUNT", "K", "WHOLE", "UNITS")}}
sizes = {{"STAGES": made.STAGES, "GROUP": 8, "PROGRAMS": 132, "HAS_BIAS": not {gated}, "HAS_RESIDUAL": not {gated}}}
sizes |= {{"GATED": {gated}, "ACTIVATION": {activation}, "PIECE": made.PIECE}}
signature = {{name: types.get(name, "constexpr") for name in kernel.arg_names}}
constants = {{(kernel.arg_names.index(name),): size for name, size in sizes.items()}}
multiples = ("out", "bias", "residual", "M", "COUNT", "K") if {aligned} else ()  # of 16, which a launch sees by itself
attributes = {{(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}}
source = GluonASTSource(kernel, signature, constants, attributes)
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
assert compiled.asm["ptx"].count("wgmma.mma_async") >= 8 and compiled.asm["cubin"]
assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
"""


@pytest.fixture
def half(device: Any) -> Iterator[Maker]:
    """On SM 90, and simulated where the other kernels run in the interpreter."""
    if device.type == "cpu":
        with simulated(made, "specialized_gemm_kernel", seed=0, programs=2):
            yield Maker(device, torch.float16)
    elif has_warp_jobs(device):
        yield Maker(device, torch.float16)
    else:
        pytest.skip("runs on SM 90 alone")


@pytest.mark.parametrize("kind", TOLERANCES, ids=str)
@pytest.mark.parametrize("activation", [NO_ACTIVATION, SILU, GELU_ERF, GELU_TANH])
@pytest.mark.parametrize("programs", [1, None])
def test_agrees_with_the_reference(half: Maker, kind: Any, activation: int, programs: int | None) -> None:
    x, weight, bias = (half.normal(*shape, dtype=kind) for shape in ((ROWS, SIZE), (COUNT, SIZE), (COUNT,)))
    out = half.poison(ROWS, COUNT, dtype=kind)
    options: dict[str, Any] = {"bias": bias, "activation": activation}
    assert specialized_gemm(x, weight, out, programs=programs, **options) is out
    assert_close(out, reference(x, weight, **options), TOLERANCES[kind])


@pytest.mark.parametrize("kind", TOLERANCES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["low", "float32"])
def test_a_residual_is_added_last(half: Maker, kind: Any, biased: bool, wide: bool) -> None:
    x, weight = half.normal(ROWS, SIZE, dtype=kind), half.normal(COUNT, SIZE, dtype=kind)
    options = {"residual": half.normal(ROWS, COUNT, scale=20.0, dtype=torch.float32 if wide else kind)}
    if biased:
        options |= {"bias": half.normal(COUNT, dtype=torch.float32), "activation": GELU_ERF}
    out = half.poison(ROWS, COUNT, dtype=kind)
    specialized_gemm(x, weight, out, **options)
    assert_close(out, reference(x, weight, **options), TOLERANCES[kind])


@pytest.mark.parametrize("rows", [1, 64, 65, 128, None])
@pytest.mark.parametrize("size", [40, 64])
def test_any_number_of_rows(half: Maker, rows: int | None, size: int) -> None:
    """Down to a tile whose second half has none, and to a turn that is not full; and more tiles than programs."""
    rows = rows or 2 * made.HEIGHT * made.multiprocessors(half.device) + 200
    x, weight, out = half.normal(rows, size), half.normal(8, size), half.poison(rows, 8)
    specialized_gemm(x, weight, out)
    assert_close(out, reference(x, weight), TOLERANCES[torch.float16])


@pytest.mark.parametrize(
    "tiles, programs, whole, units",
    [(576, 132, 528, 624), (9, 5, 9, 9), (9, 6, 6, 12), (9, 17, 9, 9), (9, 20, 0, 18), (1, 1, 1, 1)],
)
def test_tiles_that_half_of_the_programs_could_take_are_halved(
    tiles: int, programs: int, whole: int, units: int
) -> None:
    assert shares(tiles, programs) == (whole, units)


def test_whether_halves_make_a_difference_here(half: Maker) -> None:
    count = made.multiprocessors(half.device)
    assert can_halve(half.poison(2 * made.HEIGHT * count + 1, 8), 8)
    assert not can_halve(half.poison(2 * made.HEIGHT * count, 8), 8)


@pytest.mark.parametrize("programs", [2, 4, 5, 6, 8, 20, 132])
@pytest.mark.parametrize("rows", [1152, 1034, 1090])
def test_halves_and_whole_tiles_side_by_side(half: Maker, rows: int, programs: int) -> None:
    """Nine tiles, of which none, one, three or all are halved; the last one has rows in one half, or in both."""
    x, weight, residual = half.normal(rows, 104), half.normal(200, 104), half.normal(rows, 200)
    for halves in (False, True):
        out = half.poison(rows, 200)
        specialized_gemm(x, weight, out, residual=residual, programs=programs, halves=halves)
        assert_close(out, reference(x, weight, residual=residual), TOLERANCES[torch.float16])
    x, weight, out = half.normal(rows, 72), half.normal(2 * STRIPE, 72), half.poison(rows, STRIPE)
    specialized_gemm(x, weight, out, gated=True, activation=GELU_TANH, programs=programs)
    expected = reference(x, weight, gated=True, stripe=STRIPE, activation=GELU_TANH)
    assert_close(out, expected, 2 * TOLERANCES[torch.float16])


@pytest.mark.parametrize("kind", TOLERANCES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_gate_and_other_alternate_in_stripes(half: Maker, kind: Any, group: int) -> None:
    x, weight = half.normal(ROWS, SIZE, dtype=kind), half.normal(6 * STRIPE, SIZE, dtype=kind)
    out = half.poison(ROWS, 3 * STRIPE, dtype=kind)
    specialized_gemm(x, weight, out, gated=True, activation=SILU, group=group)
    expected = reference(x, weight, gated=True, stripe=STRIPE, activation=SILU)
    assert_close(out, expected, 2 * TOLERANCES[kind])  # two rounded sums are multiplied


@pytest.mark.parametrize("activation", [SILU, GELU_ERF, GELU_TANH])
def test_an_activation_of_sums_below_all_float16_is_zero(half: Maker, activation: int) -> None:
    x, weight, out = half.normal(8, 16).fill_(-200.0), half.normal(8, 16).fill_(200.0), half.poison(8, 8)
    specialized_gemm(x, weight, out, activation=activation)
    assert (out == 0).all()


@pytest.mark.parametrize("programs", [2, 5])
@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_what_is_under_way_changes_a_result(device: Any, seed: int, programs: int) -> None:
    """Nine tiles: a half is left for each of two programs, or a tile for four of five."""
    if device.type != "cpu":
        pytest.skip("a GPU has its own order")
    make = Maker(device, torch.float16)
    x, weight, out = make.normal(ROWS, SIZE), make.normal(COUNT, SIZE), make.poison(ROWS, COUNT)
    with simulated(made, "specialized_gemm_kernel", seed, programs):
        specialized_gemm(x, weight, out, halves=True)
    assert_close(out, reference(x, weight), TOLERANCES[torch.float16])


def test_runs_in_a_recording_whose_descriptors_are_gone(half: Maker) -> None:
    if half.device.type == "cpu":
        pytest.skip("only a GPU records")
    x, weight, out = half.normal(ROWS, SIZE), half.normal(COUNT, SIZE), half.poison(ROWS, COUNT)
    specialized_gemm(x, weight, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        specialized_gemm(x, weight, out)
    x.copy_(half.normal(ROWS, SIZE))
    out.fill_(float("nan"))
    graph.replay()
    assert_close(out, reference(x, weight), TOLERANCES[torch.float16])


def test_engines_lay_gates_out_in_these_stripes() -> None:
    from accel.engines.cuda import program

    assert program.STRIPE == STRIPE


def test_residuals_that_do_not_fit_are_refused(half: Maker) -> None:
    x, weight, out = half.normal(8, 64), half.normal(STRIPE * 2, 64), half.poison(8, STRIPE * 2)
    with pytest.raises(ValueError, match="residual has shape"):
        specialized_gemm(x, weight, out, residual=half.normal(7, STRIPE * 2))
    out = half.poison(8, STRIPE)
    with pytest.raises(ValueError, match="no bias and no residual"):
        specialized_gemm(x, weight, out, residual=half.normal(8, STRIPE), gated=True, activation=SILU)


def test_other_gpus_are_refused(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_kernels import device as features

    make = Maker(device, torch.float16)
    monkeypatch.setattr(features, "capability", lambda _: (10, 0))
    with pytest.raises(ValueError, match="SM 90"):
        specialized_gemm(make.normal(64, 64), make.normal(64, 64), make.poison(64, 64))


@pytest.mark.parametrize(
    "name, short, activation, gated, aligned",
    [
        ("float16", "fp16", SILU, True, True),
        ("float16", "fp16", NO_ACTIVATION, False, True),
        ("bfloat16", "bf16", GELU_ERF, False, False),
    ],
)
def test_compiles_where_it_cannot_run(name: str, short: str, activation: int, gated: bool, aligned: bool) -> None:
    """With the Triton that is here, whose Gluon may call things by other names than the last one's."""
    code = COMPILE.format(name=name, short=short, activation=activation, gated=gated, aligned=aligned)
    root = Path(__file__).resolve().parents[2] / "kernels"
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
