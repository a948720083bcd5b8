from __future__ import annotations

import pytest

from tests.kernels.comparing import Maker

torch = pytest.importorskip("torch")
from accel_kernels.packing import pack, pack_integers, unpack  # noqa: E402


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 96])
def test_round_trip_is_within_half_a_step(bits: int, group: int) -> None:
    weight = Maker("cpu").normal(7, 192)
    words, scales = pack(weight, bits, group)
    assert words.dtype == torch.int32 and words.shape == (7, 192 * bits // 32)
    assert scales.dtype == torch.float16 and scales.shape == (7, 192 // group)
    step = scales.float().repeat_interleave(group, 1)
    # a scale rounded to float16 may leave the largest weight a little outside the range
    assert ((unpack(words, scales, bits) - weight).abs() <= step * (0.5 + 128 * 2**-11)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_packed_packs_to_itself(bits: int) -> None:
    words, scales = pack(Maker("cpu").normal(5, 64), bits, 32)
    again, same = pack(unpack(words, scales, bits), bits, 32)
    assert torch.equal(again, words) and torch.equal(same, scales)


def test_neighbours_of_int4_stand_four_fields_apart() -> None:
    """Fields 0 to 7 hold weights 0, 2, 4, 6, 1, 3, 5, 7, with 8 for zero."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -7.0]])
    words, scales = pack(weight, 4, 8)
    assert words.item() & 0xFFFFFFFF == 0x1EC_AFDB9 and scales.item() == 1.0


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_packed_as_they_are(bits: int) -> None:
    """Every number in every place, with scales of both signs."""
    half, fields = 1 << (bits - 1), 32 // bits
    numbers = torch.arange(2 * half).repeat_interleave(fields)[None] + torch.arange(fields)[:, None] * 7
    values = (numbers % (2 * half) - half).to(torch.int8)
    scales = torch.tensor([[0.5], [-0.25]] * (fields // 2))
    words = pack_integers(values, bits)
    assert words.dtype == torch.int32 and words.shape == (fields, values.shape[1] // fields)
    assert torch.equal(unpack(words, scales, bits), values * scales)


def test_integers_that_cannot_be_packed() -> None:
    values = torch.tensor([[8, -8] * 4], dtype=torch.int8)
    with pytest.raises(ValueError, match=r"beyond \[-8, 7\]"):
        pack_integers(values, 4)
    with pytest.raises(ValueError, match="rows of 6 are no whole words"):
        pack_integers(values[:, :6], 8)
    with pytest.raises(ValueError, match="2 bits"):
        pack_integers(values, 2)


def test_a_group_of_zeros_stays_zero() -> None:
    words, scales = pack(torch.zeros(2, 32), 8, 32)
    assert (unpack(words, scales, 8) == 0).all() and scales.isfinite().all()


@pytest.mark.parametrize(
    ("weight", "bits", "group", "message"),
    [
        (torch.zeros(2, 32), 3, 32, "3 bits"),
        (torch.zeros(2, 32), 4, 24, "groups of 24 for rows of 32"),
        (torch.zeros(2, 32), 4, 4, "whole words"),
        (torch.zeros(2, 32), 4, 0, "groups of 0"),
        (torch.full((1, 32), 1e6), 4, 32, "does not fit float16"),
        (torch.full((1, 32), float("nan")), 8, 32, "NaN"),
    ],
)
def test_what_cannot_be_packed(weight: object, bits: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(weight, bits, group)
