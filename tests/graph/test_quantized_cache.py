from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from accel.errors import FusionError
from accel.graph.quantized_cache import spell_cache
from tests.graph.lowering.ort_cpu.test_decoder_attention import KV, LAYER, decoder, draw_scales
from tests.graph.small import assert_close, count, normal, run


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rotary,per_channel", [(0, True), (16, True), (16, False)])
def test_keys_and_values_are_rounded_before_attention(bits: int, rotary: int, per_channel: bool) -> None:
    kv = draw_scales(LAYER, bits, per_channel)
    spelled = decoder(LAYER, rotary)
    assert spell_cache(spelled, kv) == 1 and count(spelled, "Round") == 2
    past = np.zeros((2, KV, 16, 16), np.float32)
    feeds = {
        "x": normal(9, 24), "position_ids": np.array([0, 1, 2, 3, 4, 5, 0, 1, 2]), "past_key": past, "past_value": past,
        "past_lengths": np.zeros(2, np.int32), "query_lengths": np.array([6, 3], np.int32),
    }  # fmt: skip
    expected, plain = (run(decoder(LAYER, rotary, rounded=rounded), **feeds) for rounded in (kv, None))
    found = run(spelled, **feeds)
    assert_close(found, expected)
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(found, plain))


def test_scales_of_another_size() -> None:
    kv = draw_scales(dataclasses.replace(LAYER, head_dim=32), 8)
    with pytest.raises(FusionError, match="no rows of 2 heads.*layer 0"):
        spell_cache(decoder(LAYER), kv)
