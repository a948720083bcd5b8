from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close
from tests.kernels.test_quantized_gemm import quantized

torch = pytest.importorskip("torch")
from accel_kernels.quantized_gather import TOLERANCES, quantized_gather, reference  # noqa: E402


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "group"), [(96, 32), (128, 128), (96, 96)])
@pytest.mark.parametrize("ids_type", ["int32", "int64"])
def test_agrees_with_the_reference(make: Maker, bits: int, size: int, group: int, ids_type: str) -> None:
    table, scales = quantized(make, 11, size, bits, group)
    ids = make.ints(3, 10, 0, 3, dtype=getattr(torch, ids_type))
    for dtype in (make.dtype, torch.float32):
        out = make.poison(4, size, dtype=dtype)
        assert quantized_gather(table, scales, out, ids, bits=bits) is out
        assert_close(out, reference(table, scales, ids, bits=bits), TOLERANCES[dtype])


def test_rows_longer_than_a_piece(device: Any) -> None:
    make = Maker(device, torch.float16)
    table, scales = quantized(make, 2, 4096 + 64, 4, 32)
    out = make.poison(1, 4096 + 64, dtype=torch.float32)
    quantized_gather(table, scales, out, make.ints(1), bits=4)
    assert_close(out, reference(table, scales, make.ints(1), bits=4), TOLERANCES[torch.float32])


@pytest.mark.parametrize("bits", [4, 8])
def test_without_ids_the_whole_table(make: Maker, bits: int) -> None:
    table, scales = quantized(make, 5, 64, bits, 32)
    out = make.poison(5, 64)
    quantized_gather(table, scales, out, bits=bits)
    assert_close(out, reference(table, scales, bits=bits), TOLERANCES[make.dtype])


def test_no_ids_are_no_rows(device: Any) -> None:
    make = Maker(device)
    table, scales = quantized(make, 5, 64, 8, 64)
    assert quantized_gather(table, scales, make.poison(0, 64), make.ints(), bits=8).shape == (0, 64)


def test_refused(device: Any) -> None:
    make = Maker(device)
    table, scales = quantized(make, 5, 64, 8, 64)
    with pytest.raises(ValueError, match=r"out has shape \[5, 32\], not \[5, 64\]"):
        quantized_gather(table, scales, make.poison(5, 32), bits=8)
    with pytest.raises(ValueError, match="2 bits"):
        quantized_gather(table, scales, make.poison(5, 64), bits=2)
