"""Launch parameters: what a shape gets."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this system")
from accel_kernels.launches import decode_launch  # noqa: E402


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
def test_programs_of_a_long_past_fill_the_gpu_twice_at_most(rows: int, kv_heads: int) -> None:
    launch = decode_launch(rows, kv_heads, 64, True, torch.float16)
    programs = rows * kv_heads * launch["splits"]
    assert launch["splits"] == 1 or programs <= 2 * 132
    assert 1 <= launch["splits"] <= 16 and (launch["splits"] == 16 or programs > 132)
    assert launch["warps"] == (8 if programs <= 132 else 4)


def test_larger_heads_and_caches_in_8_bits_take_shorter_turns() -> None:
    blocks = [decode_launch(32, 8, dim, True, torch.float16)["block"] for dim in (64, 128, 256)]
    assert blocks == [256, 128, 64]
    for narrow in (torch.int8, torch.float8_e4m3fn):
        blocks = [decode_launch(32, 8, dim, True, narrow)["block"] for dim in (64, 128, 256)]
        assert blocks == [128, 64, 64]
    assert decode_launch(32, 8, 64, False, torch.float16) == {"splits": 1, "block": 128, "least": 256, "warps": 4}
