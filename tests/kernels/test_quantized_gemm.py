from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.packing import pack, pack_integers  # noqa: E402
from accel_kernels.quantized_gemm import TOLERANCES, QuantizedTile, quantized_gemm, reference  # noqa: E402
from accel_kernels.tiles import GELU_ERF, SILU  # noqa: E402

TILE = QuantizedTile(16, 16, 64, 4, 2)


def quantized(make: Maker, count: int, size: int, bits: int, group: int) -> tuple[Any, Any]:
    """Integers over their whole range, scales of both signs."""
    half = 1 << (bits - 1)
    values = (torch.arange(count * size) * 7919 % (2 * half) - half).to(torch.int8).reshape(count, size)
    return pack_integers(values.to(make.device), bits), make.normal(count, size // group, dtype=torch.float16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "count", "size", "group"),
    [(3, 21, 192, 32), (17, 16, 64, 64), (2, 5, 256, 128), (1, 33, 96, 96), (5, 7, 48, 16)],
)
def test_agrees_with_the_reference(make: Maker, bits: int, rows: int, count: int, size: int, group: int) -> None:
    """Rows, outputs and inputs that fill no tile; groups within a turn and beyond one."""
    x, bias, residual = make.normal(rows, size), make.normal(count), make.normal(rows, count, dtype=torch.float32)
    words, scales = quantized(make, count, size, bits, group)
    options: dict[str, Any] = {"bits": bits, "bias": bias, "residual": residual, "activation": GELU_ERF}
    out = make.poison(rows, count)
    assert quantized_gemm(x, words, scales, out, tile=TILE, **options) is out
    assert_close(out, reference(x, words, scales, **options), TOLERANCES[make.dtype])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stripe", [None, 3])
def test_gate_and_other_alternate_in_stripes(device: Any, bits: int, stripe: int | None) -> None:
    make = Maker(device, torch.float16)
    x, bias, out = make.normal(4, 96), make.normal(36), make.poison(4, 18, dtype=torch.float32)
    words, scales = pack(make.normal(36, 96), bits, 32)
    options: dict[str, Any] = {"bits": bits, "bias": bias, "gated": True, "stripe": stripe, "activation": SILU}
    quantized_gemm(x, words, scales, out, tile=TILE, **options)
    assert_close(out, reference(x, words, scales, **options), TOLERANCES[torch.float16])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "group", "splits"), [(512, 32, 4), (320, 64, 2), (192, 96, 4), (384, 128, 3)])
def test_several_programs_share_a_sum(make: Maker, bits: int, size: int, group: int, splits: int) -> None:
    """Also where the last programs have fewer turns, or none."""
    x, bias = make.normal(5, size), make.normal(21)
    words, scales = quantized(make, 21, size, bits, group)
    out = make.poison(splits, 5, 21, dtype=torch.float32)
    quantized_gemm(x, words, scales, out, bits=bits, bias=bias, tile=QuantizedTile(16, 16, 64, 4, 2, splits))
    assert_close(out.sum(0), reference(x, words, scales, bits=bits, bias=bias), TOLERANCES[make.dtype])


@pytest.mark.parametrize(
    ("group", "wanted"), [(32, 128), (64, 128), (128, 128), (256, 128), (96, 32), (16, 128)], ids=str
)
def test_turns_hold_whole_groups_or_groups_whole_turns(device: Any, group: int, wanted: int) -> None:
    tile = QuantizedTile().fitting(Maker(device, torch.float16).normal(3, 768), group, 4, False)
    assert tile.block_k == wanted and tile.block_m == 16
    assert tile.block_k % group == 0 or group % tile.block_k == 0


def test_refused(device: Any) -> None:
    make = Maker(device, torch.float16)
    words, scales = pack(make.normal(4, 64), 4, 32)
    x, out = make.normal(2, 64), make.poison(2, 4)
    with pytest.raises(ValueError, match="3 bits"):
        quantized_gemm(x, words, scales, out, bits=3)
    with pytest.raises(ValueError, match=r"weight has shape \[4, 8\], not \[4, 16\]"):
        quantized_gemm(x, words, scales, out, bits=8)
    with pytest.raises(ValueError, match="parts have no gate"):
        parts = make.poison(2, 2, 4, dtype=torch.float32)
        quantized_gemm(x, words, scales, parts, bits=4, activation=SILU, tile=QuantizedTile(splits=2))
    with pytest.raises(ValueError, match="groups of 8"):
        quantized_gemm(x, *pack(make.normal(4, 64), 4, 8), out, bits=4)
    with pytest.raises(ValueError, match="3 scales do not divide a row of 64"):
        quantized_gemm(x, words, make.normal(4, 3), out, bits=4)
