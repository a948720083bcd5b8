"""The simulation notices what would go wrong on a GPU now and then: each case breaks one rule of a kernel."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.kernels.comparing import Maker, error_of
from tests.kernels.warp_jobs import simulated
from tests.loaded_modules import load_module

torch = pytest.importorskip("torch")
from accel_kernels import specialized_gemm as made  # noqa: E402
from accel_kernels.device import INTERPRETED  # noqa: E402

Changes = tuple[tuple[str, str], ...]
FULL = "            mbarrier.wait(full.index(stage), phase)\n"
EMPTY = "                mbarrier.wait(empty.index(stage_ahead), phase_ahead, pred=more)\n"
FETCH = "                _fetch(x, weight, xs, ws, full, stage_ahead, m, n, k, more)\n"
EXPECT = "                mbarrier.expect(full.index(stage_ahead), SIZE, pred=more)\n"
DONE = "                total = warpgroup_mma_wait(1, deps=[total])\n"  # each half has one
EACH_TURN = "                mbarrier.arrive(empty.index(last), count=1, pred=turn > 0)\n"  # the second half's
LAST_TURN = "        if HALF == 1:\n            mbarrier.arrive(empty.index(last), count=1)\n"
HAND_OVER = "        _hand_over(total.to(parts.dtype), parts, PIECES * HALF, PIECES)\n"
READY = "        mbarrier.arrive(ready.index(HALF), count=1)\n"
PIECES = "            for piece in gl.static_range(STORED):\n"
FREE = "            mbarrier.arrive(free.index(half), count=1)\n"
INIT = "mbarrier.init(empty.index(stage), count=1)"
BYTES = "SIZE: gl.constexpr = (2 * HEIGHT + WIDTH)"
SLICE = "slice(HEIGHT * HALF, HEIGHT)"

# What a GPU would show and the simulation cannot, whose groups of warps move as one: the barriers that Triton places
# between a group's warps, without which one warp would expect, fetch, arrive or multiply while another one still waits,
# reads or has products under way; that shared memory is swizzled as the products and the copies take it to be, x's
# layout for the sums too; and that the jobs' sizes stay constexprs, with registers for all.
RULES: dict[str, Changes] = {
    "the second half gives a turn back before its products end": ((f"{DONE}{EACH_TURN}", EACH_TURN),),
    "the second half gives back the turn that it multiplies": (
        (EACH_TURN, EACH_TURN.replace("last", "stage").replace(", pred=turn > 0", "")),
        (LAST_TURN, ""),
    ),
    "the second half gives no turn back": ((EACH_TURN, ""), (LAST_TURN, "")),
    "the second half keeps a unit's last turn": ((LAST_TURN, ""),),
    "the first half gives turns back too": ((LAST_TURN, LAST_TURN.replace("HALF == 1", "True")),),
    "both halves have to give a turn back": ((INIT, INIT.replace("1", "2")),),
    "a half that is alone is not skipped": (("if HALF == 1:  # a program", "if False:  # a program"),),
    "it is skipped before it is there": ((f"{FULL[4:]}        mbarrier.arrive", "        mbarrier.arrive"),),
    "both halves multiply it": (("UNITS if HALF == 0 else WHOLE", "UNITS"),),
    "turns are multiplied before they are there": ((FULL, ""),),
    "turns are fetched over what the second half reads": ((EMPTY, ""),),
    "turns are fetched before that is asked": ((f"{EMPTY}{FETCH}", f"{FETCH}{EMPTY}"),),
    "turns are fetched over what the first half reads": ((f"{DONE}{EMPTY}", f"{DONE.replace('1', '2', 1)}{EMPTY}"),),
    "they are fetched before its products end": ((f"{DONE}{EMPTY}{FETCH}", f"{EMPTY}{FETCH}{DONE}"),),
    "more turns are in flight than there are stages": (("for _ in range(STAGES - 1):", "for _ in range(STAGES):"),),
    "turns are fetched behind the last unit": ((FETCH, FETCH.replace("more", "True")),),
    "the bytes of one half are expected": ((BYTES, "SIZE: gl.constexpr = (HEIGHT + WIDTH)"),),
    "the bytes of the weights alone are expected": ((BYTES, "SIZE: gl.constexpr = WIDTH"),),
    "bytes are not expected": ((EXPECT, ""),),
    "bytes are expected in another stage": ((EXPECT, EXPECT.replace("stage_ahead", "stage")),),
    "both halves multiply the upper rows": ((SLICE, "slice(0, HEIGHT)"),),
    "each half multiplies the other one's rows": ((SLICE, "slice(HEIGHT * (1 - HALF), HEIGHT)"),),
    "halves that are alone are all upper ones": (("m + behind % 2 * HEIGHT", "m"),),
    "a unit begins with the sums of the last one": (("use_acc=turn > 0", "use_acc=True"),),
    "sums are handed over before the last product ends": (
        ("        total = warpgroup_mma_wait(0, deps=[total])\n", ""),
    ),
    "sums are handed over before the last ones are stored": (
        ("        mbarrier.wait(free.index(HALF), sent)\n", ""),
    ),
    "sums are said to be there before they are": ((f"{HAND_OVER}{READY}", f"{READY}{HAND_OVER}"),),
    "sums are read before they are there": (("            mbarrier.wait(ready.index(half), phase)\n", ""),),
    "sums are given back before they are read": ((FREE, ""), (PIECES, f"{FREE}{PIECES}")),
    "all pieces get the first one's bias": (("                column += PIECE\n", ""),),
    "all pieces go to the first one's place": (("                there += PIECE\n", ""),),
    "a piece is stored where the next one has outputs": (("mask=stored", "mask=inside"),),
    "barriers are not fenced": (("    fence_async_shared()\n", ""),),
}


def altered(folder: Path, changes: Changes) -> ModuleType:
    """The kernel's module with other words in place of some that stand there once."""
    source = Path(made.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    path = folder / "altered_gemm.py"
    path.write_text(source)
    return load_module(path)


def goes_wrong(module: ModuleType, seed: int) -> bool:
    """Whether an error or a wrong number shows in one schedule: of six tiles for four programs, then of gated ones."""
    make = Maker(torch.device("cpu"), torch.float16)
    for gated in (False, True):
        x, weight, out = make.normal(300, 264), make.normal(512, 264), make.poison(300, 256 if gated else 512)
        options: dict[str, Any] = {"gated": gated, "activation": 0 if gated else -1}
        if not gated:
            options |= {"bias": make.normal(512, dtype=torch.float32), "residual": make.normal(300, 512)}
        try:
            with simulated(module, "specialized_gemm_kernel", seed, programs=4):
                module.specialized_gemm(x, weight, out, halves=True, **options)
        except AssertionError:
            return True
        expected = made.reference(x, weight, stripe=made.STRIPE if gated else None, **options)
        if error_of(out, expected) > 2 * made.TOLERANCES[torch.float16]:
            return True
    return False


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here; TRITON_INTERPRET=1 runs them on the CPU")
@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_shows(tmp_path: Path, rule: str) -> None:
    module = altered(tmp_path, RULES[rule])
    assert any(goes_wrong(module, seed) for seed in range(20))


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here; TRITON_INTERPRET=1 runs them on the CPU")
def test_nothing_shows_without_one() -> None:
    assert not any(goes_wrong(made, seed) for seed in range(4))
