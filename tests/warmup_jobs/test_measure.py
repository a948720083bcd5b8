"""Warm-up and timing over the double of TensorRT's runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from accel.builder.profiles import Profile, Range
from accel.engines.session import StepInputs
from accel.warmup_jobs.measure import warm_and_measure
from tests.engines.tensorrt.conftest import built_engine, open_tiny, tiny_bundle, world
from tests.engines.tensorrt.double import World

__all__ = ["built_engine", "open_tiny", "tiny_bundle", "world"]  # fixtures
pytest.importorskip("tensorrt_rtx")
PREFILL = Profile("prefill", Range(1, 1, 1), Range(1, 24, 32))
DECODE = Profile("decode", Range(1, 2, 4), Range(1, 1, 1))
ENCODE = Profile("encode", Range(1, 2, 4), Range(1, 8, 24))


def test_each_profile_of_an_encoder_runs(open_tiny: Callable[..., Any], world: World) -> None:
    session = open_tiny("bert")
    found = warm_and_measure(session, [ENCODE], rounds=3)
    assert list(found) == ["encode"] and found["encode"] > 0
    assert len(world.runs) > 12 and [shape for _, shape in world.runs][-3:] == [(2, 8)] * 3  # at the tuned shape


def test_each_profile_of_a_decoder_runs(
    open_tiny: Callable[..., Any], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_tiny("llama", ir.DataType.FLOAT, max_batch=3)
    steps: list[list[int]] = []
    step = session.step

    def count(inputs: StepInputs) -> Any:
        steps.append([int(length) for length in inputs.query_lengths])
        logits = step(inputs)
        assert logits.shape[0] == np.count_nonzero(inputs.query_lengths)
        return logits

    session.warm_up()
    monkeypatch.setattr(session, "warm_up", lambda: steps.append([]))
    monkeypatch.setattr(session, "step", count)
    found = warm_and_measure(session, [PREFILL, DECODE], rounds=2)
    assert list(found) == ["prefill", "decode"] and min(found.values()) > 0
    assert steps == [[], *[[24, 0, 0]] * 3, *[[1, 1, 0]] * 3]  # warm first; then one call to settle, two timed
