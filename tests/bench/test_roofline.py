from __future__ import annotations

import pytest

from accel.bench.roofline import GpuLimits, Roofline, shares_of

pytest.importorskip("triton", reason="Triton has no build for this system")
from accel.engines.cuda.operator_times import OperatorTime, PhaseTimes

LIMITS = GpuLimits("Some GPU", "float16", copy_bytes_s=2e12, product_flops_s=500e12)
PHASE = PhaseTimes(
    "token, batch 1",
    1e-3,
    (OperatorTime("Linear 8 to 4", 16, 0.8e-3, 800e6, 100e9), OperatorTime("CachedAttention", 16, 0.1e-3, 1e6, 25e9)),
)


def test_the_slower_of_bytes_and_operations_limits() -> None:
    assert LIMITS.seconds(2e12, 1e12) == 1.0 and LIMITS.seconds(1e12, 1e15) == 2.0
    whole, linear, attention = shares_of(PHASE, LIMITS)
    assert (linear.limit_ms, attention.limit_ms) == pytest.approx((0.4, 0.05))
    assert (whole.operator, whole.count, whole.ms, whole.limit_ms) == ("", 32, 1.0, pytest.approx(0.45))


def test_the_table_says_how_much_is_reached() -> None:
    head, columns, *lines = str(Roofline("fp16", LIMITS, tuple(shares_of(PHASE, LIMITS)))).splitlines()
    assert head == "cuda fp16 on Some GPU: copy 2.00 TB/s, float16 500 TFLOP/s"
    assert columns.split() == ["ms", "roofline", "ms", "reached"]
    assert [line.split()[-1] for line in lines] == ["45%", "50%", "50%"]
    assert lines[1].split()[:3] == ["16", "x", "Linear"]
