"""The order of packed bytes and scales, and its inverse."""

from __future__ import annotations

import time

import accel_cpu
import numpy as np
import pytest


def random_values(outputs: int, inputs: int, bits: int) -> np.ndarray:
    low, high = (-128, 128) if bits == 8 else (-8, 8)
    return np.random.default_rng(outputs + inputs).integers(low, high, (outputs, inputs), dtype=np.int8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (17, 9), (64, 32), (65, 100), (100, 33), (130, 64), (200, 7)])
def test_unpacking_inverts_packing(shape: tuple[int, int], bits: int) -> None:
    values = random_values(*shape, bits)
    packed = accel_cpu.pack(values, bits)
    assert packed.dtype == np.uint8 and packed.shape == (accel_cpu.packed_size(*shape, bits),)
    np.testing.assert_array_equal(accel_cpu.unpack(packed, *shape, bits), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_byte_lies_where_the_layout_says(bits: int) -> None:
    outputs, inputs = 100, 20  # a panel of four tiles, one of three; inputs padded to 24
    values = random_values(outputs, inputs, bits)
    packed = accel_cpu.pack(values, bits)
    expected = np.full((112, 24), 0, np.int64)
    expected[:outputs, :inputs] = values
    step = 4 if bits == 8 else 8
    start = 0
    for first, tiles in ((0, 4), (64, 3)):
        panel = packed[start : start + 16 * tiles * 24 * bits // 8].reshape(24 // step, tiles, 16, 4).astype(np.int64)
        start += panel.size
        for o in range(16 * tiles):
            for k in range(24):
                byte = panel[k // step, o // 16, o % 16, k % 4]
                code = byte - 128 if bits == 8 else (byte >> 4 if k % 8 >= 4 else byte & 15) - 8
                assert code == expected[first + o, k], (first + o, k)
    assert start == packed.size


def test_values_that_are_not_contiguous() -> None:
    values = random_values(48, 64, 8)
    np.testing.assert_array_equal(accel_cpu.pack(values[::2, ::2], 8), accel_cpu.pack(values[::2, ::2].copy(), 8))
    np.testing.assert_array_equal(accel_cpu.pack(values.T, 8), accel_cpu.pack(values.T.copy(), 8))


@pytest.mark.parametrize(("outputs", "groups"), [(5, 3), (64, 2), (100, 4), (200, 1)])
def test_scales_by_panel(outputs: int, groups: int) -> None:
    scales = np.random.default_rng(0).random((outputs, groups), np.float32).astype(np.float16).astype(np.float32)
    packed = accel_cpu.pack_scales(scales, 32)
    assert packed.dtype == np.float16
    np.testing.assert_array_equal(accel_cpu.unpack_scales(packed, outputs, groups), scales)
    width = min(64, -(-outputs // 16) * 16)
    np.testing.assert_array_equal(packed[: min(width, outputs)], scales[:width, 0])  # the first panel's first group
    whole = accel_cpu.pack_scales(scales[:, :1], 0)
    assert whole.dtype == np.float32 and whole.shape == (-(-outputs // 16) * 16,)
    np.testing.assert_array_equal(whole[:outputs], scales[:, 0])
    assert not whole[outputs:].any()


def test_gate_and_up_alternate() -> None:
    gate, up = np.arange(20), np.arange(100, 120)
    both = accel_cpu.interleave_gated(gate, up)
    assert both.shape == (64,)
    np.testing.assert_array_equal(both[:16], gate[:16])
    np.testing.assert_array_equal(both[16:32], up[:16])
    np.testing.assert_array_equal(both[32:48], [*gate[16:], *[0] * 12])
    np.testing.assert_array_equal(both[48:], [*up[16:], *[0] * 12])
    with pytest.raises(ValueError, match="gate is"):
        accel_cpu.interleave_gated(gate, up[:-1])


def test_packing_takes_no_time() -> None:
    values = np.zeros((1 << 14, 1024), np.int8)
    for bits in (8, 4):
        start = time.process_time()
        accel_cpu.pack(values, bits)
        assert time.process_time() - start < 2.0  # 136 million of an LM head: below 16 s even on a slow, busy machine


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accel_cpu.pack(np.zeros((2, 8), np.int8), 3), "bits is 3"),
        (lambda: accel_cpu.pack(np.zeros((2, 8), np.int32), 8), "int8 .N, K. is needed"),
        (lambda: accel_cpu.pack(np.zeros((0, 8), np.int8), 8), "int8 .N, K. is needed"),
        (lambda: accel_cpu.pack(np.full((2, 8), 8, np.int8), 4), r"4 bits hold values in \[-8, 7\]"),
        (lambda: accel_cpu.unpack(np.zeros(9, np.uint8), 2, 8, 8), r"uint8 \[128\] is needed"),
        (lambda: accel_cpu.unpack(np.zeros(128, np.uint8), 2, 8, 2), "bits is 2"),
        (lambda: accel_cpu.pack_scales(np.ones((2, 1), np.float32), 16), "block_size is 16"),
        (lambda: accel_cpu.pack_scales(np.ones((2, 2), np.float32), 0), "scales have shape"),
        (lambda: accel_cpu.pack_scales(np.full((2, 1), 1e6, np.float32), 32), "finite in float16"),
        (lambda: accel_cpu.pack_scales(np.full((2, 1), np.nan, np.float32), 0), "finite in float32"),
        (lambda: accel_cpu.unpack_scales(np.ones(7), 2, 1), "16 are needed"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
