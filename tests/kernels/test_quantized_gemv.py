from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.gemv import GemvTile  # noqa: E402
from accel_kernels.packing import pack  # noqa: E402
from accel_kernels.quantized_gemv import TOLERANCES, quantized_gemv, reference  # noqa: E402
from accel_kernels.tiles import GELU_ERF, SILU  # noqa: E402

TILE = GemvTile(4, 16, 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("count", "size", "group"), [(37, 192, 32), (5, 96, 96), (8, 64, 16)])
def test_agrees_with_the_reference(make: Maker, bits: int, count: int, size: int, group: int) -> None:
    dtype = torch.float16 if bits == 4 else make.dtype
    x, bias = make.normal(size, dtype=dtype), make.normal(count)
    words, scales = pack(make.normal(count, size), bits, group)
    residual, out = make.normal(count, dtype=torch.float32), make.poison(count)
    options: dict[str, Any] = {"bits": bits, "bias": bias, "residual": residual, "activation": GELU_ERF}
    assert quantized_gemv(x, words, scales, out, tile=TILE, **options) is out
    limit = max(TOLERANCES[make.dtype], TOLERANCES[dtype])
    assert_close(out, reference(x, words, scales, **options), limit)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stripe", [None, 3, 18])
def test_gate_and_other_alternate_in_stripes(device: Any, bits: int, stripe: int | None) -> None:
    make = Maker(device, torch.float16)
    x, out = make.normal(192), make.poison(36)
    words, scales = pack(make.normal(72, 192), bits, 32)
    options: dict[str, Any] = {"bits": bits, "gated": True, "stripe": stripe, "activation": SILU}
    options |= {"bias": make.normal(72), "residual": make.normal(36)}
    quantized_gemv(x, words, scales, out, tile=TILE, **options)
    assert_close(out, reference(x, words, scales, **options), TOLERANCES[torch.float16])


def test_extreme_weights_keep_their_sign(device: Any) -> None:
    """The ends of the range and the top bit of a word."""
    make = Maker(device, torch.float16)
    weight = torch.tensor([[7.0, -7.0] * 16, [-7.0] * 32, [7.0] * 32], device=device)
    words, scales = pack(weight, 4, 32)
    x, out = make.normal(32), make.poison(3)
    quantized_gemv(x, words, scales, out, bits=4, tile=TILE)
    assert_close(out, weight.double() @ x.double(), TOLERANCES[torch.float16])


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e3, 6e4])
def test_rows_of_any_size(device: Any, size: float) -> None:
    """Elements of one sign meet weights of one sign: sums in float16 must hold up to its largest number."""
    make = Maker(device, torch.float16)
    x = (make.normal(256, dtype=torch.float32).abs().clamp(0.5, 1.0) * size).half()
    words, scales = pack(make.normal(8, 256).abs().clamp(0.5, 1.0) * 1e-3, 4, 32)
    out = make.poison(8, dtype=torch.float32)
    quantized_gemv(x, words, scales, out, bits=4, tile=TILE)
    assert_close(out, reference(x, words, scales, bits=4), TOLERANCES[torch.float16])
