from __future__ import annotations

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.activation import TOLERANCES, activation, reference  # noqa: E402
from accel_kernels.block_gemm import BlockTile, block_gemm  # noqa: E402
from accel_kernels.tiles import GELU_ERF, GELU_TANH, SILU  # noqa: E402

KINDS = [SILU, GELU_ERF, GELU_TANH]


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(make: Maker, kind: int) -> None:
    x, out = make.normal(3, 100, scale=4.0), make.poison(3, 100)
    assert activation(x, out, kind=kind, gated=False, block=64) is out
    assert_close(out, reference(x, kind=kind, gated=False), TOLERANCES[make.dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stripe", [None, 1, 20, 50])
def test_gate_and_other_alternate_in_stripes(make: Maker, kind: int, stripe: int | None) -> None:
    x, out = make.normal(3, 200), make.poison(3, 100)
    activation(x, out, kind=kind, gated=True, stripe=stripe, block=64)
    assert_close(out, reference(x, kind=kind, gated=True, stripe=stripe), TOLERANCES[make.dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero_it_is_zero_or_the_input(device: object, kind: int) -> None:
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device)
    expected = x.clamp(min=0.0)
    activation(x, x, kind=kind, gated=False)  # in place
    assert_close(x, expected, 1e-6)


def test_a_product_rounded_to_float16_has_the_gelu_that_float16_tells(device: object) -> None:
    """The epilogue's polynomial, over what a float16 product can hold."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-6e4, -100.0, 100.0, 6e4])])
    x = x.to(device, torch.float16)[:, None].repeat(1, 16)
    weight, out = torch.eye(16, device=device, dtype=torch.float16), torch.empty_like(x)
    block_gemm(x, weight, out, activation=GELU_ERF, tile=BlockTile(64, 16, 16))
    expected = torch.nn.functional.gelu(x.double())
    # Half a unit in float16's last place, and the polynomial's error.
    allowed = expected.abs() * 2**-11 + 5e-5
    assert ((out.double() - expected).abs() <= allowed).all()
