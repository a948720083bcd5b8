"""The simulation notices what would go wrong on a GPU now and then: each case breaks one rule of a kernel."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.kernels.comparing import Maker, error_of
from tests.kernels.warp_jobs import simulated
from tests.loaded_modules import load_module

torch = pytest.importorskip("torch")
from accel_kernels import specialized_gemm as made  # noqa: E402
from accel_kernels.device import INTERPRETED  # noqa: E402

FULL = "            mbarrier.wait(full.index(stage), phase)\n"


def altered(folder: Path, old: str, new: str) -> ModuleType:
    """The kernel's module with other words in place of some."""
    source = Path(made.__file__).read_text()
    assert old in source
    path = folder / "altered_gemm.py"
    path.write_text(source.replace(old, new))
    return load_module(path)


def goes_wrong(module: ModuleType, seed: int) -> bool:
    """Whether an error or a wrong number shows in one schedule: of six tiles for four programs, then of gated ones."""
    make = Maker(torch.device("cpu"), torch.float16)
    for gated in (False, True):
        x, weight, out = make.normal(300, 264), make.normal(512, 264), make.poison(300, 256 if gated else 512)
        options = {"gated": gated, "activation": 0 if gated else -1}
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
@pytest.mark.parametrize(
    "old, new",
    [
        ("empty.index(last), count=1, pred=turn > 0", "empty.index(stage), count=1"),  # before its products end
        ("        mbarrier.arrive(empty.index(last), count=1)\n", ""),  # all wait for good
        ("mbarrier.init(empty.index(stage), count=2)", "mbarrier.init(empty.index(stage), count=1)"),
        (FULL, ""),
        ("                mbarrier.wait(empty.index(stage_ahead), phase_ahead, pred=more)\n", ""),
        ("        total = warpgroup_mma_wait(0, deps=[total])\n", ""),
        ("        mbarrier.wait(free.index(HALF), sent)\n", ""),
        ("            mbarrier.wait(ready.index(half), phase)\n", ""),
        ("tma.store_wait(0)", "tma.store_wait(1)"),
        ("                fence_async_shared()\n", ""),
        ("for _ in range(STAGES - 1):", "for _ in range(STAGES):"),
        ("if HALF == 1:  #", "if False:  #"),
        (f"{FULL}            mbarrier.arrive", "            mbarrier.arrive"),  # of a half that is not its own
        ("mbarrier.expect(bar, ONE,", "mbarrier.expect(bar, BOTH,"),
        ("m + behind % 2 * HEIGHT", "m"),
        ("use_acc=turn > 0", "use_acc=True"),  # a tile begins with the sums of the last one
        ("pred=pred & both)\n\n", "pred=pred)\n\n"),
    ],
)
def test_a_broken_rule_shows(tmp_path: Path, old: str, new: str) -> None:
    module = altered(tmp_path, old, new)
    assert any(goes_wrong(module, seed) for seed in range(20))


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here; TRITON_INTERPRET=1 runs them on the CPU")
def test_nothing_shows_without_one() -> None:
    assert not any(goes_wrong(made, seed) for seed in range(4))
