"""Attention of encoders beside float64, on each instruction set."""

from __future__ import annotations

from typing import Any

import accel_cpu
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from tests.kernels_cpu.products import assert_close, open_session

# bfloat16 keeps 8 bits; errors are of the largest result.
TOLERANCE = {"avx512bf16": 1.5e-2, "avx512vnni": 3e-6, "avx2": 3e-6, "portable": 3e-6}
SHAPES = [  # batch, length, heads, size
    *((1, length, 2, 32) for length in (1, 2, 7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 65, 127, 129, 200, 513)),
    *((2, 40, 3, size) for size in (1, 2, 7, 16, 31, 33, 47, 48, 64, 80, 96, 127, 128, 200, 255, 256)),
    (5, 20, 1, 8),
    (3, 130, 12, 32),
]


def attend(
    q: NDArray, k: NDArray, v: NDArray, heads: int, scale: float, mask: NDArray | None = None
) -> NDArray[np.float64]:
    """softmax(q k^T scale) v in float64; a row with nothing to look at is NaN."""

    def split(x: NDArray) -> NDArray[np.float64]:
        return x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    scores = split(q) @ split(k).swapaxes(-1, -2) * scale
    if mask is not None:
        scores = np.where(mask[:, None, None, :] == 0, -np.inf, scores)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights @ split(v)).transpose(0, 2, 1, 3).reshape(q.shape)


def open_attention(
    heads: int, scale: float, inputs: tuple[str, ...] = ("q", "k", "v"), threads: int = 2
) -> onnxruntime.InferenceSession:
    kinds: dict[str, Any] = {
        name: (TensorProto.INT32 if name == "mask" else TensorProto.FLOAT, None) for name in inputs if name
    }
    return open_session(accel_cpu.ATTENTION, kinds, {}, list(inputs), threads, num_heads=heads, scale=scale)


def run(session: onnxruntime.InferenceSession, **inputs: NDArray) -> NDArray[np.float32]:
    result: NDArray[np.float32] = session.run(None, inputs)[0]
    return result


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_rows(batch: int, length: int, width: int) -> dict[str, NDArray[np.float32]]:
    return {name: normal(batch, length, width, seed=seed) for seed, name in enumerate("qkv")}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa: str, shape: tuple[int, int, int, int]) -> None:
    batch, length, heads, size = shape
    rows = random_rows(batch, length, heads * size)
    scale = 1.3 / size**0.5
    result = run(open_attention(heads, scale), **rows)
    assert_close(result, attend(**rows, heads=heads, scale=scale), TOLERANCE[isa])


@pytest.mark.parametrize("shape", [(2, 33, 3, 32), (1, 70, 2, 47), (1, 1, 1, 1)], ids=str)
def test_one_tensor_of_all_three(isa: str, shape: tuple[int, int, int, int]) -> None:
    batch, length, heads, size = shape
    rows = random_rows(batch, length, heads * size)
    packed = run(open_attention(heads, 0.2, ("q",)), q=np.concatenate(list(rows.values()), axis=-1))
    np.testing.assert_array_equal(packed, run(open_attention(heads, 0.2), **rows))


@pytest.mark.parametrize("length", [1, 8, 33, 64, 150])
def test_masks(isa: str, length: int) -> None:
    rows = random_rows(6, length, 96)
    mask = np.ones((6, length), np.int32)
    mask[1, length // 2 + 1 :] = 0  # padded on the right
    mask[2, : length // 2] = 0  # and on the left
    mask[3] = np.random.default_rng(5).integers(0, 2, length)  # anywhere
    mask[3, length // 2] = 7  # whatever is not 0 counts
    mask[4] = 0
    mask[5, :-1] = 0
    result = run(open_attention(3, 0.2, ("q", "k", "v", "mask")), **rows, mask=mask)
    seen = mask.any(axis=1)
    expected = attend(**rows, heads=3, scale=0.2, mask=mask)
    assert_close(result[seen], expected[seen], TOLERANCE[isa])
    assert np.isfinite(result).all(), "where there is nothing to look at, too"
    whole = run(open_attention(3, 0.2), **rows)
    np.testing.assert_array_equal(result[0], whole[0])


def test_hidden_keys_count_for_nothing(isa: str) -> None:
    rows = random_rows(1, 50, 64)
    mask = (np.arange(50) < 40).astype(np.int32)[None]
    session = open_attention(2, 0.3, ("q", "k", "v", "mask"))
    expected = run(session, **rows, mask=mask)
    rows["k"][:, 40:], rows["v"][:, 40:] = 1e4, 1e20
    assert_close(run(session, **rows, mask=mask), expected, 1e-7)


@pytest.mark.parametrize("size", [50.0, 1e4])
def test_large_scores(isa: str, size: float) -> None:
    rows = random_rows(1, 70, 32)
    rows["q"] *= size
    if isa == "avx512bf16":  # so that rounding changes none of the scores
        rows = {name: (value.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, value in rows.items()}
    result = run(open_attention(1, 1.0), **rows)
    assert np.isfinite(result).all()
    expected = attend(**rows, heads=1, scale=1.0)
    far = np.abs(result - expected).max(axis=-1) > (0.3 if isa == "avx512bf16" else 5e-3)
    assert far.mean() < 0.1, "but for a tie here and there"


def test_nan_stays_in_its_sequence(isa: str) -> None:
    rows = random_rows(3, 40, 64)
    session = open_attention(2, 0.3)
    expected = run(session, **rows)
    for name in "qkv":
        spoilt = {key: value.copy() for key, value in rows.items()}
        spoilt[name][1, 5, 3], spoilt[name][1, 6, 4] = np.nan, np.inf
        result = run(session, **spoilt)
        np.testing.assert_array_equal(result[[0, 2]], expected[[0, 2]])
        assert np.isnan(result[1, 5, 3])
    rows["q"][1, 5, 3] = np.nan
    assert np.isfinite(np.delete(run(session, **rows)[1], 5, axis=0)).all(), "a query's NaN is its own"


@pytest.mark.parametrize("shape", [(1, 512, 12, 32), (3, 77, 2, 64), (1, 300, 1, 32)], ids=str)
def test_number_of_threads_changes_nothing(isa: str, shape: tuple[int, int, int, int]) -> None:
    batch, length, heads, size = shape
    rows = random_rows(batch, length, heads * size)
    one = run(open_attention(heads, 0.2, threads=1), **rows)
    for threads in (2, 5):
        np.testing.assert_array_equal(run(open_attention(heads, 0.2, threads=threads), **rows), one)


def test_nothing_at_all(isa: str) -> None:
    session = open_attention(2, 0.3, ("q", "k", "v", "mask"))
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        rows = random_rows(batch, length, 64)
        assert run(session, **rows, mask=np.ones((batch, length), np.int32)).shape == (batch, length, 64)


def test_refusals() -> None:
    rows = random_rows(2, 5, 64)
    with pytest.raises(Exception, match="num_heads = 0; must be positive"):
        open_attention(0, 1.0)
    session = open_attention(3, 1.0)
    with pytest.raises(Exception, match=r"q must be \[batch, length, num_heads \* size\], size at most 256"):
        run(session, **rows)
    with pytest.raises(Exception, match="three times as wide"):
        run(open_attention(2, 1.0, ("q",)), q=normal(2, 5, 64))
    with pytest.raises(Exception, match="at most 256"):
        run(open_attention(1, 1.0), **random_rows(1, 2, 257))
    with pytest.raises(Exception, match="q must be"):
        run(session, **random_rows(2, 5, 0))
    session = open_attention(2, 1.0)
    for name, shape in (("k", (2, 4, 64)), ("v", (1, 5, 64)), ("k", (2, 5, 32)), ("v", (5, 64))):
        with pytest.raises(Exception, match="k and v must have the shape of q"):
            run(session, **(rows | {name: normal(*shape)}))
    with pytest.raises(Exception, match="k and v must have the shape of q"):
        run(open_attention(2, 1.0, ("q", "", "v")), q=rows["q"], v=rows["v"])
    with pytest.raises(Exception, match=r"mask must be \[batch, length\] = \[2, 5\]"):
        run(open_attention(2, 1.0, ("q", "k", "v", "mask")), **rows, mask=np.ones((2, 4), np.int32))
