"""Scales of integer caches: what they cover, at which positions, and what calibration data is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.compress import kv_scales
from accel.compress.kv_scales import HEADROOM, calibrate_cache
from accel.engines import open_session
from accel.engines.session import SessionOptions, StepInputs
from accel.errors import CheckpointError, InputError
from accel.graph.lowering.ort_cpu import lower
from accel.graph.rotation import KeyRotation
from accel.graph.save import load_canonical

ROW = 40  # tokens of a calibration sample; the model covers 512
IDS = [np.random.default_rng(seed).integers(2, 258, ROW) for seed in range(8)]
HEADS, DIM = 2, 16


@pytest.fixture(scope="module")
def bundle(tiny_decoder_bundle: Path) -> Bundle:
    return Bundle.open(tiny_decoder_bundle)


@pytest.fixture(scope="module")
def canonical(bundle: Bundle) -> ir.Model:
    return load_canonical(bundle.file("canonical.onnx"))


@pytest.fixture(scope="module")
def long_row(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """What the fp32 cache holds of a row over all positions, of other ids than those of the calibration."""
    session: Any = open_session(bundle, "cpu", options=SessionOptions(1, 512, 1)).session
    ids = np.random.default_rng(99).integers(2, 258, 512)
    lengths, past = np.array([512], np.int32), np.zeros(1, np.int32)
    session.step(StepInputs(ids, np.arange(512), lengths, past, np.zeros(0, np.int64)))
    held: dict[str, NDArray[np.float32]] = session.read_row(0, 512)
    session.close()
    return held


def test_short_samples_cover_all_positions(
    bundle: Bundle, canonical: ir.Model, long_row: dict[str, NDArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without turning keys on, what 40 tokens show of the slow channels is cut off later."""

    def cut_off() -> list[float]:
        kv = calibrate_cache(bundle, canonical, IDS, 8)
        return [float((np.abs(long_row[f"{i}.key"]) > 127.5 * kv.keys[i][:, None]).mean()) for i in range(2)]

    covering = cut_off()
    monkeypatch.setattr(kv_scales, "key_rotations", lambda *_: [None, None])
    blind = cut_off()
    assert max(covering) < 2e-3 and sum(covering) < sum(blind), (covering, blind)


def test_kinds_and_shapes(bundle: Bundle, canonical: ir.Model) -> None:
    seen: list[int] = []
    for bits in (8, 4):
        each = calibrate_cache(bundle, canonical, IDS, bits, advance=seen.append)
        whole = calibrate_cache(bundle, canonical, IDS, bits, per_channel=False)
        assert (each.bits, each.per_channel, whole.per_channel) == (bits, True, False)
        assert [scale.shape for scale in (*each.keys, *each.values)] == [(HEADS, DIM)] * 4
        assert [scale.shape for scale in (*whole.keys, *whole.values)] == [(1,)] * 4
        for some, one in zip(each.values, whole.values):
            assert some.max() == one[0]
    assert sum(seen) == 2 * 8 * ROW


def test_four_bits_cut_off_what_costs_more_to_keep(bundle: Bundle, canonical: ir.Model) -> None:
    fine, coarse = (calibrate_cache(bundle, canonical, IDS, bits) for bits in (8, 4))
    for index in range(2):
        largest_key, largest_value = (scales[index] * 127 / HEADROOM for scales in (fine.keys, fine.values))
        assert np.allclose(coarse.values[index] * 7, largest_value)
        ratio = coarse.keys[index] * 7 / largest_key
        assert 0.39 < ratio.min() < 0.95 and ratio.max() <= 1.0 + 1e-6


class _Session:
    """Keys and values that a test chooses, [KV, n, D]."""

    def __init__(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        self._held = {f"{index}.{part}": x for index in range(2) for part, x in (("key", keys), ("value", values))}

    def step(self, inputs: StepInputs) -> None: ...

    def read_row(self, row: int, length: int) -> dict[str, NDArray[np.float32]]:
        return {name: held[:, :length] for name, held in self._held.items()}

    def close(self) -> None: ...


Chosen = Callable[..., Any]


@pytest.fixture
def scales_of(bundle: Bundle, canonical: ir.Model, monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """``scales_of(keys, values, bits, rotation)`` calibrates on chosen contents."""

    def calibrate(keys: NDArray, values: NDArray, bits: int, rotation: KeyRotation | None = None) -> Any:
        session = SimpleNamespace(session=_Session(keys, values))
        monkeypatch.setattr(kv_scales, "open_session", lambda *_, **__: session)
        monkeypatch.setattr(kv_scales, "key_rotations", lambda *_: [rotation] * 2)
        return calibrate_cache(bundle, canonical, IDS, bits)

    return calibrate


def contents(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((HEADS, ROW, DIM)).astype(np.float32)


def test_channels_that_are_zero_and_channels_that_turn(scales_of: Chosen) -> None:
    keys = contents()
    keys[:, :, 3], keys[:, :, 3 + DIM // 2], keys[:, :, 5] = 0, 0, 2
    keys[:, :, 5 + DIM // 2] = 0
    angles = np.linspace(0, np.pi, 512, dtype=np.float32)[:, None] * np.ones(DIM // 2, np.float32)
    still = scales_of(keys, contents(1), 8).keys[0]
    turning = scales_of(keys, contents(1), 8, KeyRotation(np.cos(angles), np.sin(angles))).keys[0]
    assert (still[:, 3] == 1).all() and np.allclose(still[:, 5], HEADROOM * 2 / 127) and (still[:, 13] == 1).all()
    assert np.allclose(turning[:, [5, 13]], HEADROOM * 2 / 127, rtol=0.02), "each channel of a pair holds both in turn"


def test_least_square_scales(scales_of: Chosen) -> None:
    """Of many candidates none does better; a scale that keeps an outlier does worse."""
    keys = contents()
    keys[0, 7, :] = 6
    scale = scales_of(keys, contents(1), 4).keys[0]

    def lost(step: NDArray) -> NDArray:
        step = step[:, None]
        return ((np.clip(np.round(keys / step), -8, 7) * step - keys) ** 2).mean(axis=1)

    largest = np.abs(keys).max(axis=1)
    assert (lost(scale) <= lost(largest / 7) * (1 + 1e-5)).all()
    for ratio in np.linspace(0.4, 1, 200):
        assert (lost(scale) <= lost(largest * ratio / 7) * 1.1).all()


def test_damaged_weights_are_named(scales_of: Chosen) -> None:
    broken = contents()
    broken[1, 3, 2] = np.nan
    with pytest.raises(CheckpointError, match="NaN or infinite.*layer 0"):
        scales_of(contents(), broken, 8)


def test_bad_calibration_ids(bundle: Bundle, canonical: ir.Model) -> None:
    def refuses(match: str, samples: Any, bits: int = 8) -> None:
        with pytest.raises(InputError, match=match):
            calibrate_cache(bundle, canonical, samples, bits)

    refuses("has 0 tokens.*at least 256", [])
    refuses("has 80 tokens", IDS[:2])
    refuses(r"reach from \d+ to 258, the vocabulary from 0 to 257.*sample 1", [IDS[0], np.append(IDS[1], 258)])
    refuses("from -1", [*IDS, np.array([-1])])
    refuses("float64 .*not a sequence of token ids", [IDS[0] * 1.0])
    refuses(r"int64 \[1, 40\], not a sequence", [IDS[0][None]])
    refuses("8 or 4 bits, not 6", IDS, bits=6)


def test_an_encoder_has_no_cache(minilm_bundle: Path, canonical: ir.Model) -> None:
    with pytest.raises(InputError, match="encoder has no KV cache"):
        calibrate_cache(Bundle.open(minilm_bundle), canonical, IDS, 8)


def test_scales_of_8_bit_floats(bundle: Bundle, canonical: ir.Model) -> None:
    """The same magnitudes at the end of another range."""
    integers, floats = (calibrate_cache(bundle, canonical, IDS, 8, float8=float8) for float8 in (False, True))
    assert (integers.kind, floats.kind, floats.range) == ("int8", "fp8", (-448, 448))
    for ours, theirs in zip((*floats.keys, *floats.values), (*integers.keys, *integers.values), strict=True):
        np.testing.assert_allclose(ours * 448, theirs * 127, rtol=1e-6)
    with pytest.raises(InputError, match="a KV cache of floats has 8 bits, not 4"):
        calibrate_cache(bundle, canonical, IDS, 4, float8=True)
    with pytest.raises(InputError, match="ONNX Runtime has no caches of 8-bit floats"):
        lower(canonical, bundle.manifest.arch, 64, kv=floats)
